"""Against the CPU reference functions of causal_conv1d, which compute in the dtype that they are given."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.spec.ops import causal_conv as conv_spec
from mamba_core.spec.tolerances import relative_l2, tolerance

torch = pytest.importorskip("torch")

# From their tests/test_causal_conv1d.py: channels, and (length, width).
CHANNELS = 64
SIZES = ((1, 4), (2, 3), (8, 2), (129, 4), (372, 3))


@pytest.fixture(scope="module")
def theirs():
    if find_spec("causal_conv1d") is None:
        pytest.skip("causal_conv1d not installed")
    # It imports its CUDA extension wherever it is entered; its reference functions do not need it.
    with mock.patch.dict(sys.modules, {"causal_conv1d_cuda": ModuleType("causal_conv1d_cuda")}):
        return importlib.import_module("causal_conv1d.causal_conv1d_interface")


def draw(seed, batch, length, channels, width):
    rng = np.random.default_rng(seed)
    sizes = {"x": (batch, length, channels), "weight": (channels, width), "bias": (channels,)}
    sizes |= {"initial_state": (batch, width - 1, channels)}
    return {name: rng.normal(size=shape) for name, shape in sizes.items()}


def turned(arrays):
    """As they name and lay them out: channels before positions."""
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    tensors["x"] = tensors["x"].mT
    if "initial_state" in tensors:
        tensors["initial_states"] = tensors.pop("initial_state").mT
    return tensors


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(2, 4)),
    activation=st.sampled_from((None, "silu")),
    absent=st.sets(st.sampled_from(("bias", "initial_state"))),
)
def test_reference_equals_causal_conv1d_ref(theirs, seed, shape, activation, absent):
    arrays = {name: value for name, value in draw(seed, *shape).items() if name not in absent}
    y, state = conv_spec.causal_conv(**arrays, activation=activation, return_final_state=True)
    expected = theirs.causal_conv1d_ref(**turned(arrays), activation=activation, return_final_states=True)
    np.testing.assert_allclose(y, expected[0].mT.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(state, expected[1].mT.numpy())


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(2, 4)),
    carried=st.booleans(),
)
def test_segments_equal_their_seq_idx(theirs, seed, shape, carried):
    arrays = draw(seed, *shape)
    if not carried:
        del arrays["initial_state"]
    segments = np.cumsum(np.random.default_rng(seed).random(shape[:2]) < 0.2, axis=1)
    y = conv_spec.causal_conv(**arrays, activation="silu", segment_ids=segments)
    expected = theirs.causal_conv1d_ref(**turned(arrays), activation="silu", seq_idx=torch.from_numpy(segments))
    np.testing.assert_allclose(y, expected.mT.numpy(), rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(2, 4)),
)
def test_padding_equals_their_negative_seq_idx(theirs, seed, shape):
    """Padding at the ends: in a gap they leave zeros in the window, where we go on from the last input that counts."""
    arrays = draw(seed, *shape)
    del arrays["initial_state"]
    ends = np.sort(np.random.default_rng(seed).integers(0, shape[1] + 1, (shape[0], 2)), axis=1)
    mask = (np.arange(shape[1]) >= ends[:, :1]) & (np.arange(shape[1]) < ends[:, 1:])
    y = conv_spec.causal_conv(**arrays, activation="silu", mask=mask)
    segments = torch.from_numpy(np.where(mask, 0, -1))
    expected = theirs.causal_conv1d_ref(**turned(arrays), activation="silu", seq_idx=segments)
    np.testing.assert_allclose(y, expected.mT.numpy(), rtol=1e-12, atol=1e-12)


def test_gradients_equal_autograd_of_causal_conv1d_ref(theirs):
    arrays = draw(0, 2, 23, 5, 4)
    dy, dstate = np.random.default_rng(1).normal(size=(2, 23, 5)), np.random.default_rng(2).normal(size=(2, 3, 5))
    ours = conv_spec.causal_conv_vjp(dy, dstate, **arrays, activation="silu")
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in arrays.items()}
    y, state = theirs.causal_conv1d_ref(
        tensors["x"].mT,
        tensors["weight"],
        tensors["bias"],
        initial_states=tensors["initial_state"].mT,
        return_final_states=True,
        activation="silu",
    )
    ((y.mT * torch.from_numpy(dy)).sum() + (state.mT * torch.from_numpy(dstate)).sum()).backward()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor.grad.numpy(), rtol=1e-10, atol=1e-11, err_msg=name)


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(2, 4), activation=st.sampled_from((None, "silu")))
def test_step_equals_causal_conv1d_update_ref(theirs, seed, width, activation):
    arrays = draw(seed, 2, 1, 7, width)
    x, weight, bias, state = arrays["x"][:, 0], arrays["weight"], arrays["bias"], arrays["initial_state"]
    y, after = conv_spec.causal_conv_step(x, weight, bias, activation=activation, state=state)
    # Theirs updates the state in place.
    carried = torch.from_numpy(state).mT.clone()
    tensors = [torch.from_numpy(value) for value in (weight, bias)]
    expected = theirs.causal_conv1d_update_ref(torch.from_numpy(x), carried, *tensors, activation=activation)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(after, carried.mT.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_backend_equals_causal_conv1d_ref(theirs, backend, dtype):
    """Their sizes and dtypes. They allow (rtol, atol) (3e-4, 1e-3) in float32; this is relative, and 1e-6."""
    for length, width in SIZES:
        arrays = {
            name: backend.from_numpy(value, dtype="float32" if name in ("weight", "bias") else dtype)
            for name, value in draw(length, 2, length, CHANNELS, width).items()
        }
        y, state = backend.op("causal_conv").causal_conv(**arrays, activation="silu", return_final_state=True)
        rounded = {name: backend.to_numpy(value).astype(np.float64) for name, value in arrays.items()}
        expected = theirs.causal_conv1d_ref(**turned(rounded), activation="silu", return_final_states=True)
        assert relative_l2(backend.to_numpy(y), expected[0].mT.numpy()) <= tolerance(dtype), length
        assert relative_l2(backend.to_numpy(state), expected[1].mT.numpy()) == 0.0, length
