"""One signature for an op everywhere: on every backend, in the reference, and in the package."""

import inspect

import pytest

import mamba_core as mc
from mamba_core.backend import Backend
from mamba_core.spec import ops

OPS = ops.public()


def arguments(function) -> list[tuple]:
    """(name, kind, default) of each, without self and annotations."""
    found = inspect.signature(function).parameters.values()
    return [(item.name, item.kind, item.default) for item in found if item.name != "self"]


@pytest.mark.parametrize("name", OPS)
def test_a_backend_s_op_has_the_reference_s_signature_and_a_kernel(backend, name):
    functions, op = backend.op(name), OPS[name]
    *wanted, last = arguments(getattr(functions, name))
    assert wanted == arguments(op.forward)
    assert (last[0], last[2]) == ("kernel", "auto")
    assert arguments(getattr(functions, op.step.__name__)) == arguments(op.step)


@pytest.mark.parametrize("name", OPS)
def test_the_package_s_function_has_the_backends_signature(name):
    op = OPS[name]
    *wanted, last = arguments(getattr(mc, name))
    assert (last[0], last[2]) == ("kernel", "auto")
    assert wanted == arguments(op.forward)
    assert arguments(getattr(mc, op.step.__name__)) == arguments(op.step)
    for function in (getattr(mc, name), getattr(mc, op.step.__name__)):
        assert "Args:" in function.__doc__
        assert "Returns:" in function.__doc__


@pytest.mark.parametrize("name", OPS)
def test_a_backend_says_which_kernels_an_op_has(backend, name):
    kernels = backend.available_kernels()[name]
    assert None in kernels.values(), "none runs here"
    assert list(kernels.values())[-1] is None, "the last is the plain one, which always runs"


def test_every_function_of_the_contract_is_there(backend):
    wanted = {name for name, value in vars(Backend).items() if callable(value) and not name.startswith("_")}
    assert wanted <= set(dir(backend))
    for name in wanted:
        given = inspect.signature(getattr(backend, name)).parameters
        expected = set(inspect.signature(getattr(Backend, name)).parameters) - {"self"}
        # A backend may take more for its own use.
        needed = {item.name for item in given.values() if item.default is inspect.Parameter.empty}
        assert needed <= expected <= set(given), name
