"""Against the CPU reference functions of mamba_ssm, run in float64."""

import importlib
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.spec import recurrence

torch = pytest.importorskip("torch")
pytest.importorskip("einops")

# mamba_ssm imports its CUDA extension and Triton wherever it is entered; its reference functions need neither.
STUBS = {
    "selective_scan_cuda": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": {"_layer_norm_fwd": None},
}


@pytest.fixture(scope="module")
def interface():
    spec = importlib.util.find_spec("mamba_ssm") if "mamba_ssm" not in sys.modules else None
    if spec is None:
        pytest.skip("mamba_ssm not installed")
    packages = {}
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.utils"):
        packages[name] = ModuleType(name)
        packages[name].__path__ = [f"{spec.submodule_search_locations[0]}/{'/'.join(name.split('.')[1:])}"]
    for name, contents in STUBS.items():
        packages[name] = ModuleType(name)
        vars(packages[name]).update(contents)
    with mock.patch.dict(sys.modules, packages):
        yield importlib.import_module("mamba_ssm.ops.selective_scan_interface")


def in_float64(function, *args, **kwargs):
    """They call .float() inside; their algorithm in float64 is what is wanted."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return function(*args, **kwargs)


def draw(seed, batch, length, channels, states):
    rng = np.random.default_rng(seed)
    sizes = {"x": (batch, length, channels), "delta": (batch, length, channels), "A": (channels, states)}
    sizes |= {"B": (batch, length, states), "C": (batch, length, states)}
    sizes |= {"D": (channels,), "z": (batch, length, channels), "delta_bias": (channels,)}
    arrays = {name: rng.normal(size=shape) for name, shape in sizes.items()}
    # A step is positive; a negative one, without the softplus, would let the state grow without bound.
    return arrays | {"A": -np.exp(arrays["A"]), "delta": np.abs(arrays["delta"])}


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 17)),
    softplus=st.booleans(),
    absent=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
)
def test_reference_equals_selective_scan_ref(interface, seed, shape, softplus, absent):
    arrays = {name: value for name, value in draw(seed, *shape).items() if name not in absent}
    y, h = recurrence.selective_scan(**arrays, delta_softplus=softplus, return_final_state=True)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    for name in {"x", "delta", "B", "C", "z"} & set(tensors):
        tensors[name] = tensors[name].mT
    tensors["u"] = tensors.pop("x")
    theirs = in_float64(interface.selective_scan_ref, **tensors, delta_softplus=softplus, return_last_state=True)
    np.testing.assert_allclose(y, theirs[0].mT.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(h, theirs[1].numpy(), rtol=1e-12, atol=1e-12)


def test_gradient_equals_autograd_of_selective_scan_ref(interface):
    arrays = draw(0, 2, 23, 5, 4)
    dy, dh = np.random.default_rng(1).normal(size=(2, 23, 5)), np.random.default_rng(2).normal(size=(2, 5, 4))
    ours = recurrence.selective_scan_vjp(dy, dh, **arrays, delta_softplus=True)
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in arrays.items()}
    turned = {name: tensors[name].mT if name in ("x", "delta", "B", "C", "z") else tensors[name] for name in tensors}
    turned["u"] = turned.pop("x")
    y, h = in_float64(interface.selective_scan_ref, **turned, delta_softplus=True, return_last_state=True)
    ((y.mT * torch.from_numpy(dy)).sum() + (h * torch.from_numpy(dh)).sum()).backward()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor.grad.numpy(), rtol=1e-10, atol=1e-11, err_msg=name)
