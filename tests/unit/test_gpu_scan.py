"""The scan's CUDA kernels against the reference, their source run on a CPU as C++, and how they are laid out."""

import dataclasses
import shutil

import numpy as np
import pytest

from mamba_core.backends.gpu import driver
from mamba_core.backends.gpu import launch as gpu
from mamba_core.spec.ops import base as base_spec
from mamba_core.spec.ops import selective_scan as scan_spec
from tests.conformance.assertions import assert_close
from tests.unit import gpu_on_cpu

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

EVERYTHING = {"D", "z", "delta_bias", "softplus", "initial_state", "dfinal_state", "mask", "segment_ids"}
USUAL = {"D", "z", "delta_bias", "softplus"}
# (b, l, e, n), dtype, what is given, multiprocessors (many of them cut the sequence into chunks).
CASES = {
    "all options": ((2, 70, 40, 16), "float32", EVERYTHING, 1),
    "no options": ((1, 33, 8, 3), "float32", set(), 1),
    "chunks": ((1, 500, 16, 16), "float32", EVERYTHING, 100),
    "chunks alone": ((1, 500, 16, 8), "float32", USUAL, 100),
    "read by vectors": ((2, 64, 64, 16), "bfloat16", USUAL, 1),
    "64 states": ((1, 40, 24, 64), "float16", USUAL | {"initial_state", "dfinal_state"}, 1),
    "100 states": ((1, 40, 8, 100), "float32", USUAL, 1),
    "200 states": ((1, 40, 8, 200), "float32", USUAL, 1),
    "one position": ((3, 1, 5, 16), "float32", EVERYTHING, 1),
}


def draw(shape, dtype, given):
    """(arrays of the op, positions, delta_softplus), sequences as halves of wider arrays as they are in a model."""
    (b, l, e, n), rng, kind = shape, np.random.default_rng(0), gpu_on_cpu.DTYPES[dtype]

    def normal(*size):
        return rng.normal(size=size).astype(kind)

    xz, BC = normal(b, l, 2 * e), normal(b, l, 2 * n)
    delta = rng.normal(size=(b, l, e)) - 2
    arrays = {"x": xz[..., :e], "delta": (delta if "softplus" in given else np.exp(delta)).astype(kind)}
    arrays |= {"A": -np.exp(rng.normal(size=(e, n))).astype(np.float32), "B": BC[..., :n], "C": BC[..., n:]}
    others = {"D": rng.normal(size=e), "delta_bias": rng.normal(size=e), "initial_state": rng.normal(size=(b, e, n))}
    arrays |= {name: value.astype(np.float32) for name, value in others.items() if name in given}
    arrays |= {"z": xz[..., e:]} if "z" in given else {}
    positions = {"mask": rng.random((b, l)) < 0.7, "segment_ids": np.cumsum(rng.random((b, l)) < 0.1, 1)}
    return arrays, {name: value for name, value in positions.items() if name in given}, "softplus" in given


def run(shape, dtype, multiprocessors, arrays, positions, delta_softplus, dy, dfinal_state, folder):
    """(y, final state, gradients by the op's names)."""
    b, l, e, n = shape
    has = {"HAS_D": "D", "HAS_Z": "z", "HAS_BIAS": "delta_bias", "HAS_STATE": "initial_state"}
    options = {option for option, name in has.items() if name in arrays}
    options |= {"SOFTPLUS"} if delta_softplus else set()
    options |= {"HAS_MASK"} if "mask" in positions else set()
    options |= {"HAS_RESTART"} if "segment_ids" in positions else set()
    aligned = e % 8 == 0 and n % 8 == 0
    scan = gpu.Scan(b, l, e, n, dtype, frozenset(options), aligned, aligned, multiprocessors, keep=True)
    counting = positions.get("mask", np.ones((b, l), bool))
    known = arrays | {"mask": counting.astype(np.uint8)}
    if "segment_ids" in positions:
        known["restart"] = base_spec.restarts(counting, positions["segment_ids"]).astype(np.uint8)

    def padded(state):
        return None if state is None else np.pad(state, ((0, 0), (0, 0), (0, scan.geometry.padded - n)))

    forward = gpu_on_cpu.run(scan, known | {"begin": padded(arrays.get("initial_state"))}, folder)
    options = options - {"HAS_STATE"} | ({"HAS_STATE"} if dfinal_state is not None else set())
    scan = dataclasses.replace(scan, options=frozenset(options), keep=False, backward=True)
    given = known | {"begin": padded(dfinal_state), "dy": dy, "kept": forward["kept"]}
    found = gpu_on_cpu.run(scan, given, folder)
    names = {"x": "dx", "delta": "ddelta", "z": "dz", "initial_state": "dstate"}
    names |= {name: f"d{name}_sum" for name in ("A", "B", "C", "D")} | {"delta_bias": "ddelta_bias_sum"}
    gradients = {name: found[its] for name, its in names.items() if name in arrays}
    if "initial_state" in gradients:
        gradients["initial_state"] = gradients["initial_state"][..., :n]
    return forward["y"], forward["final_state"][..., :n], gradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_recurrence(case, folder):
    shape, dtype, given, multiprocessors = CASES[case]
    arrays, positions, delta_softplus = draw(shape, dtype, given)
    rng = np.random.default_rng(1)
    dy = rng.normal(size=shape[:3]).astype(gpu_on_cpu.DTYPES[dtype])
    dfinal = rng.normal(size=(shape[0], *shape[2:])).astype(np.float32) if "dfinal_state" in given else None
    y, h, gradients = run(shape, dtype, multiprocessors, arrays, positions, delta_softplus, dy, dfinal, folder)
    options = {"delta_softplus": delta_softplus}
    wanted, wanted_h = scan_spec.selective_scan(**arrays, **positions, **options, return_final_state=True)
    assert_close(y, wanted, dtype, "value", "y")
    assert_close(h, wanted_h, "float32", "value", "final state")
    for name, value in scan_spec.selective_scan_vjp(dy, dfinal, **arrays, **positions, **options).items():
        limits = dtype if gradients[name].dtype == gpu_on_cpu.DTYPES[dtype] else "float32"
        assert_close(gradients[name], value, limits, "gradient", f"gradient of {name}")


@needs_compiler
def test_a_restart_forgets_what_is_not_finite(folder):
    shape = (1, 40, 8, 16)
    arrays, _, _ = draw(shape, "float32", {"initial_state"})
    arrays["initial_state"][:] = np.inf
    segments = {"segment_ids": np.repeat([[0, 1]], 20, 1)}
    y, h, _ = run(shape, "float32", 1, arrays, segments, False, np.ones(shape[:3], np.float32), None, folder)
    assert np.isfinite(h).all()
    assert np.isfinite(y[:, 20:]).all()


@needs_compiler
def test_a_rate_of_minus_infinity_beside_positions_that_do_not_count(folder):
    shape = (1, 300, 8, 16)
    arrays, positions, _ = draw(shape, "float32", {"mask"})
    positions["mask"][:, -5:] = False
    arrays["A"][[0, 3], [0, 7]] = -np.inf
    dy = np.ones(shape[:3], np.float32)
    y, h, gradients = run(shape, "float32", 64, arrays, positions, False, dy, None, folder)
    wanted, wanted_h = scan_spec.selective_scan(**arrays, **positions, return_final_state=True)
    assert_close(y, wanted, "float32", "value", "y")
    assert_close(h, wanted_h, "float32", "value", "final state")
    for name, value in scan_spec.selective_scan_vjp(dy, None, **arrays, **positions).items():
        assert_close(gradients[name], value, "float32", "gradient", f"gradient of {name}")


SIZES = [(states, False) for states in (1, 4, 5, 16, 17, 64, 100, 128, 129, 256)]
SIZES += [(states, True) for states in (1, 4, 5, 16, 17, 64, 100, 128)]


@pytest.mark.parametrize(("states", "small"), SIZES)
@pytest.mark.parametrize("backward", [False, True])
def test_every_number_of_states_has_a_geometry_that_fits_a_multiprocessor(states, small, backward):
    geometry = gpu.geometry(states, backward, small)
    assert geometry.padded >= states
    assert geometry.TILE * geometry.K % geometry.S == 0
    # A thread's next vector is whole positions after the last.
    assert geometry.vector * geometry.S % geometry.K == 0
    assert geometry.threads * min(8, geometry.padded) % geometry.padded == 0
    largest = gpu.SMALL_SHARED if small else 227 * 1024
    assert (geometry.backward_shared if backward else geometry.forward_shared) <= largest


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_no_positions_launch_nothing_in_torch(state, keep):
    """What the operator does on a GPU, called without its dispatcher."""
    torch = pytest.importorskip("torch")
    from mamba_core.backends.torch.kernels import cuda_scan

    x, A, B = torch.empty(2, 0, 5), -torch.ones(5, 3), torch.empty(2, 0, 3)
    h0 = torch.randn(2, 5, 3) if state else None
    inputs = (x, x, A, B, B, torch.ones(5), None, None, h0, None, None, True, keep)
    y, h, kept = cuda_scan._scan._init_fn(*inputs)
    assert y.shape == x.shape
    assert torch.equal(h, h0 if state else torch.zeros(2, 5, 3))
    dh = torch.randn(2, 5, 3)
    gradients = cuda_scan._scan_backward._init_fn(x, dh, kept, *inputs)
    assert [g.shape for g in gradients] == [v.shape for v in inputs[:9] if v is not None]
    assert not any(g.any() for g in gradients[:6])
    assert not state or torch.equal(gradients[-1], dh)


def test_more_states_are_refused():
    with pytest.raises(ValueError, match="257"):
        gpu.geometry(257)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 100, 2048, 65536, 1_000_000])
def test_chunks_cover_the_sequence(rows, length):
    scan = gpu.Scan(rows, length, 1536, 16, "float32", frozenset(), True, True, 132)
    assert (scan.chunks - 1) * scan.chunk < length <= scan.chunks * scan.chunk
    assert scan.chunks == 1 or scan.chunk % gpu.KEEP_EVERY == 0


def test_parameters_lie_where_c_puts_them():
    assert driver._offsets("PPiiq") == [0, 8, 16, 20, 24]
    assert driver._offsets("Piq") == [0, 8, 16]
