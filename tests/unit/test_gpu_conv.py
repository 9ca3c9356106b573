"""The convolution's CUDA kernels against the reference, their source run on a CPU as C++, and how they are laid out."""

import shutil

import numpy as np
import pytest

from mamba_core.backends.gpu.causal_conv import STEPS, WIDEST, Conv, options
from mamba_core.spec.ops import base as base_spec
from mamba_core.spec.ops import causal_conv as conv_spec
from tests.conformance.assertions import assert_close
from tests.unit import gpu_on_cpu

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

EVERYTHING = {"bias", "silu", "segment_ids"}
# (b, l, e, k), dtype, what is given, multiprocessors: for none of them threads go the whole way of STEPS, for many half
# of it.
CASES = {
    "all options": ((2, 100, 20, 4), "float32", EVERYTHING, 0),
    "no option": ((2, 100, 20, 4), "float32", set(), 0),
    "half steps": ((2, 100, 12, 4), "float32", EVERYTHING, 100),
    "bfloat16": ((2, 150, 16, 4), "bfloat16", EVERYTHING, 0),
    "float16": ((2, 150, 12, 4), "float16", {"bias", "silu"}, 0),
    "two channels": ((2, 70, 6, 4), "bfloat16", {"silu"}, 0),
    "an odd number of channels": ((3, 70, 7, 4), "bfloat16", EVERYTHING, 0),
    "three taps": ((2, 70, 7, 3), "float32", EVERYTHING, 0),
    "two taps": ((2, 70, 8, 2), "float16", EVERYTHING, 0),
}
AROUND = range(-4, 2)
EDGES = {1, 2, 3, 4, 5, *(way // part + near for way in STEPS.values() for part in (1, 2) for near in AROUND)}


def draw(shape, dtype, given):
    """(arrays of the op, positions, activation)."""
    (b, l, e, k), rng, kind = shape, np.random.default_rng(0), gpu_on_cpu.DTYPES[dtype]
    arrays = {"x": rng.normal(size=(b, l, e)).astype(kind), "weight": rng.normal(size=(e, k)).astype(np.float32)}
    arrays |= {"bias": rng.normal(size=e).astype(np.float32)} if "bias" in given else {}
    arrays["initial_state"] = rng.normal(size=(b, k - 1, e)).astype(kind)
    segments = np.cumsum(rng.random((b, l)) < 0.2, 1)
    return arrays, {"segment_ids": segments} if "segment_ids" in given else {}, "silu" if "silu" in given else None


def run(arrays, positions, activation, dy, dfinal_state, multiprocessors, folder):
    """(y, final state, gradients by the op's names)."""
    x = arrays["x"]
    known = {"x": x, "taps": np.ascontiguousarray(arrays["weight"].T), "state": arrays["initial_state"]}
    known |= {"bias": arrays["bias"]} if "bias" in arrays else {}
    if positions:
        counting = np.ones(x.shape[:2], bool)
        known["restart"] = base_spec.restarts(counting, positions["segment_ids"]).astype(np.uint8)
    plan = (*x.shape, arrays["weight"].shape[1], x.dtype.name, options(known, activation == "silu"), multiprocessors)
    forward = gpu_on_cpu.run_conv(Conv(*plan), known, folder)
    given = known | {"dy": dy, "dfinal_state": dfinal_state}
    found = gpu_on_cpu.run_conv(Conv(*plan, backward=True), given, folder)
    sums = found["sums"].sum((0, 1))
    gradients = {"x": found["dx"], "weight": sums[:-1].T, "bias": sums[-1], "initial_state": found["dstate"]}
    return forward["y"], forward["final_state"], gradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def check(shape, dtype, given, multiprocessors, folder):
    arrays, positions, activation = draw(shape, dtype, given)
    rng, kind = np.random.default_rng(1), gpu_on_cpu.DTYPES[dtype]
    dy, dfinal = (rng.normal(size=arrays[name].shape).astype(kind) for name in ("x", "initial_state"))
    y, state, gradients = run(arrays, positions, activation, dy, dfinal, multiprocessors, folder)
    options = {**arrays, **positions, "activation": activation}
    wanted, wanted_state = conv_spec.causal_conv(**options, return_final_state=True)
    assert_close(y, wanted, dtype, "value", "y")
    np.testing.assert_array_equal(state.astype(np.float64), wanted_state)
    for name, value in conv_spec.causal_conv_vjp(dy, dfinal, **options).items():
        assert gradients[name].dtype == arrays[name].dtype
        limits = "float32" if name in ("weight", "bias") else dtype
        assert_close(gradients[name], value, limits, "gradient", f"gradient of {name}")


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_reference(case, folder):
    check(*CASES[case], folder)


@needs_compiler
@pytest.mark.parametrize("length", sorted(EDGES))
@pytest.mark.parametrize("multiprocessors", [0, 100])
def test_every_length_around_a_chunk(length, multiprocessors, folder):
    check((1, length, 8, 4), "float32", {"segment_ids"}, multiprocessors, folder)


@needs_compiler
def test_a_restart_forgets_what_is_not_finite(folder):
    arrays, _, _ = draw((1, 40, 8, 4), "float32", {"bias"})
    arrays["initial_state"][:] = np.inf
    arrays["x"][:, 17:20] = np.nan
    segments = {"segment_ids": np.repeat([[0, 1]], 20, 1)}
    dy = np.where(segments["segment_ids"][..., None], np.ones_like(arrays["x"]), 0)
    y, state, gradients = run(arrays, segments, "silu", dy, np.ones_like(arrays["initial_state"]), 0, folder)
    assert np.isfinite(y[:, 20:]).all()
    assert np.isfinite(state).all()
    assert np.isfinite(gradients["x"][:, 20:]).all()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("length", [1, 2048, 1_000_000])
@pytest.mark.parametrize("backward", [False, True])
def test_threads_cover_the_sequence_and_no_more(rows, length, backward):
    for width in range(2, WIDEST + 1):
        conv = Conv(rows, length, 1536, width, "bfloat16", frozenset(), 132, backward)
        assert (conv.chunks - 1) * conv.chunk < length <= conv.chunks * conv.chunk
        needed = rows * conv.chunks * 1536 // conv.vector
        assert needed <= conv.launch.blocks * conv.launch.threads < needed + conv.launch.threads


@pytest.mark.parametrize("backward", [False, True])
def test_few_threads_go_half_the_way(backward):
    many, few = (Conv(rows, 2048, 1536, 4, "bfloat16", frozenset(), 132, backward) for rows in (8, 1))
    overlap = 3 * backward
    assert many.chunk + overlap == 2 * (few.chunk + overlap) == STEPS[many.kernel]
