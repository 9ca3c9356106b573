"""One signature for an op on every backend, that of the contract; the reference has it too, but for the kernel."""

import inspect

import pytest

from mamba_core.backend import Backend
from mamba_core.spec import recurrence

OPS = ("selective_scan", "selective_step", "causal_conv", "causal_conv_step")


def arguments(function) -> list[tuple]:
    """(name, kind, default) of each, without self and annotations."""
    found = inspect.signature(function).parameters.values()
    return [(item.name, item.kind, item.default) for item in found if item.name != "self"]


@pytest.mark.parametrize("op", OPS)
def test_ops_have_the_contract_s_signature(backend, op):
    assert arguments(getattr(backend, op)) == arguments(getattr(Backend, op))


@pytest.mark.parametrize("op", OPS)
def test_reference_has_it_but_for_the_kernel(op):
    assert arguments(getattr(recurrence, op)) == [
        item for item in arguments(getattr(Backend, op)) if item[0] != "kernel"
    ]


def test_every_function_of_the_contract_is_there(backend):
    wanted = {name for name, value in vars(Backend).items() if callable(value) and not name.startswith("_")}
    assert wanted <= set(dir(backend))
    for name in wanted - set(OPS):
        given = {item.name for item in inspect.signature(getattr(backend, name)).parameters.values()}
        expected = set(inspect.signature(getattr(Backend, name)).parameters) - {"self"}
        assert given == expected, name
