"""Mamba-2's recurrence in Triton against the reference: on a GPU, and on a CPU in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so that these tests run again in a process of their own.
The laws of the conformance suite hold for the kernel too, where there is a GPU.
"""

import importlib
import importlib.util

import numpy as np
import pytest

from mamba_core.backends.gpu import ssd as gpu
from mamba_core.spec.ops import ssd as spec
from mamba_core.spec.ops.base import draw_positions, samples_of
from mamba_core.spec.tolerances import relative_l2, tolerance

torch = pytest.importorskip("torch")

from mamba_core.backends.torch.kernels import triton, triton_ssd  # noqa: E402 (after the package that it needs)
from mamba_core.backends.torch.ops import ssd  # noqa: E402
from mamba_core.backends.torch.positions import call_of  # noqa: E402
from tests.unit.triton_compile import built_for, resources, run_in_the_interpreter  # noqa: E402

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
RUNS = triton.reason(torch.device(DEVICE)) is None and (triton.INTERPRETED or torch.cuda.is_available())
here = pytest.mark.skipif(not RUNS, reason="needs a GPU, or Triton's interpreter")
compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or triton.INTERPRETED, reason="needs Triton, uninterpreted"
)
NO_LIMIT, LIMIT = spec.NO_LIMIT, spec.LIMIT
# dtype, batch, length, heads, channels, groups, states, with the softplus, the limit, whether D has a value a channel,
# what is given, positions, and multiprocessors: one has one segment, many have several.
CASES = {
    "one segment": ("float32", 1, 100, 2, 16, 1, 16, False, NO_LIMIT, False, (), (), 1),
    "all": ("float32", 2, 150, 4, 8, 2, 24, True, LIMIT, True, spec.OPTIONAL, spec.BOTH, 132),
    "several heads a program": ("float32", 2, 130, 4, 8, 1, 17, True, NO_LIMIT, False, ("D", "z"), ("mask",), 1),
    "whole chunks": ("float32", 1, 128, 2, 32, 1, 16, True, LIMIT, False, ("D", "dt_bias"), ("segment_ids",), 132),
    "bfloat16": ("bfloat16", 1, 130, 2, 64, 1, 128, True, NO_LIMIT, False, spec.OPTIONAL, ("segment_ids",), 132),
    "float16": ("float16", 1, 70, 6, 8, 2, 16, True, NO_LIMIT, True, spec.OPTIONAL, ("mask",), 132),
}


@pytest.mark.skipif(not triton.INTERPRETED, reason="not in the interpreter")
def test_the_interpreter_is_there():
    assert RUNS


@pytest.mark.skipif(triton.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    run_in_the_interpreter(__file__)


def drawn(b, l, h, p, g, n, dtype="float32", given=(), where=(), softplus=True, limit=NO_LIMIT, per_channel=False):
    """(tensors by name, positions, options) with the values that the dtype can hold."""
    rng = np.random.default_rng(0)
    arrays, options = spec._draw(rng, b, l, h, p, g, n, softplus, limit, per_channel, given)
    tensors = {}
    for name, value in arrays.items():
        kind = torch.float32 if name in spec.OP.float32 else getattr(torch, dtype)
        tensors[name] = torch.tensor(value, dtype=kind, device=DEVICE).requires_grad_()
    return tensors, draw_positions(rng, b, l, where), options


def run(tensors, positions, options):
    given = {name: torch.as_tensor(value, device=DEVICE) for name, value in positions.items()}
    call = call_of(given.get("mask"), given.get("segment_ids"), length=tensors["x"].shape[1])
    step = (tensors.get("dt_bias"), options["dt_softplus"], options["dt_limit"])
    five = (tensors[name] for name in ("x", "dt", "A", "B", "C"))
    rest = (tensors.get("D"), tensors.get("z"), *step, tensors.get("initial_state"))
    return triton_ssd.cuda(*five, *rest, call.mask, call.restart)


def numpy(value):
    return value.detach().double().cpu().numpy()


@here
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, monkeypatch):
    dtype, *sizes, softplus, limit, per_channel, given, where, multiprocessors = CASES[case]
    monkeypatch.setattr(triton_ssd, "MULTIPROCESSORS", multiprocessors)
    tensors, positions, options = drawn(*sizes, dtype, given, where, softplus, limit, per_channel)
    rng, exact = np.random.default_rng(1), {name: numpy(value) for name, value in tensors.items()}
    wanted = spec.ssd(**exact, **positions, **options, return_final_state=True)
    arriving = [torch.tensor(rng.normal(size=value.shape), device=DEVICE) for value in wanted]
    arriving = [arriving[0].to(tensors["x"].dtype), arriving[1].float()]
    gradients = spec.ssd_vjp(*map(numpy, arriving), **exact, **positions, **options)

    def both():
        found = run(tensors, positions, options)
        return *found, *torch.autograd.grad(found, list(tensors.values()), arriving)

    y, h, *returned = both()
    assert h.dtype == torch.float32
    for value, right in zip((y, h), wanted, strict=True):
        assert relative_l2(numpy(value), right) <= tolerance(dtype)
    for name, value in zip(tensors, returned, strict=True):
        assert value.dtype == tensors[name].dtype
        assert relative_l2(numpy(value), gradients[name]) <= tolerance(dtype, "gradient"), name
    for one, other in zip((y, h, *returned), both(), strict=True):
        assert torch.equal(one, other)


@here
@pytest.mark.gpu
def test_slices_of_a_wider_array_are_read_where_they_lie():
    tensors, positions, options = drawn(1, 70, 2, 16, 1, 16)
    expected = run(tensors, positions, options)
    wide = torch.full((1, 70, 3 + 32 + 2 + 32), torch.nan, device=DEVICE)
    sliced = dict(tensors)
    for name, start in {"x": 3, "dt": 35, "B": 37, "C": 53}.items():
        value = tensors[name].detach().flatten(2)
        wide[..., start : start + value.shape[2]] = value
        sliced[name] = wide[..., start : start + value.shape[2]].view(tensors[name].shape)
    # One whose axes lie in another order is copied.
    turned = sliced | {"x": tensors["x"].transpose(2, 3).contiguous().transpose(2, 3)}
    for given in (sliced, turned):
        for one, other in zip(run(given, positions, options), expected, strict=True):
            assert torch.equal(one, other)


@here
@pytest.mark.gpu
def test_what_stands_at_a_masked_position_has_no_effect():
    tensors, _, options = drawn(1, 70, 2, 16, 1, 16, given=("D", "z"))
    mask = np.random.default_rng(2).random((1, 70)) < 0.6
    found = run(tensors, {"mask": mask}, options)
    spoilt = {name: value.detach().clone() for name, value in tensors.items()}
    for name in ("x", "dt", "B", "C", "z"):
        spoilt[name][torch.as_tensor(~mask, device=DEVICE)] = torch.nan
        spoilt[name].requires_grad_()
    again = run(spoilt, {"mask": mask}, options)
    for one, other in zip(again, found, strict=True):
        assert torch.equal(one, other)
    for gradient in torch.autograd.grad(again[0].sum(), [spoilt[name] for name in ("x", "dt", "B", "C", "z")]):
        assert gradient.isfinite().all()


@here
@pytest.mark.gpu
def test_no_positions():
    tensors, positions, options = drawn(2, 0, 2, 16, 1, 16, given=("initial_state",))
    y, h = run(tensors, positions, options)
    assert y.shape == (2, 0, 2, 16)
    assert torch.equal(h, tensors["initial_state"])


def test_heads_that_are_too_large_are_left_to_other_kernels():
    h100, a100, small = 227 * 1024, 163 * 1024, 99 * 1024
    assert gpu.reason("bfloat16", 128, 128, h100) is None
    assert "128 channels and 128 states" in gpu.reason("float32", 128, 128, h100)
    assert "float64" in gpu.reason("float64", None, None, h100)
    assert gpu.reason("bfloat16", 64, 128, a100) is None
    for dtype, channels, states, shared in (
        ("bfloat16", 128, 128, a100),
        ("float32", 64, 128, a100),
        ("bfloat16", 64, 128, small),
        (None, None, None, small),
    ):
        assert f"has {shared // 1024} here" in gpu.reason(dtype, channels, states, shared)
    why = ssd.kernels(torch.device("cpu"), torch.float32)["cuda"]
    assert triton.INTERPRETED or "CUDA device" in why


def test_the_trials_of_the_kernel_have_each_dtype_and_both_positions():
    chosen = [sample for number, sample in enumerate(samples_of(spec.OP)) if number in ssd.TRIED["cuda"]]
    assert len(chosen) == len(ssd.TRIED["cuda"])
    assert {sample.dtype for sample in chosen} == set(gpu.DTYPES)
    assert {name for sample in chosen for name in sample.positions} == set(spec.BOTH)


def test_a_batch_is_on_the_long_axis_of_a_grid():
    call = gpu.Ssd(70000, 1, 2, 64, 1, 64, "bfloat16", frozenset(("z",)), 0, True, NO_LIMIT, 132)
    assert all(launch.grid[1] < 65536 for launch in (*call.forward(), *call.backward()))


@pytest.mark.parametrize("rows", [1, 24, 192, 640])
@pytest.mark.parametrize("length", [64, 2048, 65536, 65600])
def test_segments_and_parts_cover_a_call(rows, length):
    call = gpu.Ssd(1, length, rows, 64, 1, 128, "bfloat16", frozenset(), 0, True, NO_LIMIT, 132)
    assert (call.segments - 1) * call.of_segment < call.chunks <= call.segments * call.of_segment
    assert call.parts * call.together == rows


@compiles
@pytest.mark.parametrize(("dtype", "stack"), [("bfloat16", 256), ("float32", 4096)])
def test_compiled_for_an_h100(dtype, stack):
    """On the matrix units, and what is kept in memory for lack of registers is no more than was measured."""
    given = frozenset(("D", "bias", "z", "begin", "last"))
    call = gpu.Ssd(8, 2048, 24, 64, 1, 128, dtype, given, 1, True, NO_LIMIT, 132)
    assert importlib.import_module("mamba_core.backends.gpu.ssd_kernels").Q.value == gpu.CHUNK
    for launch in {each.kernel: each for each in (*call.forward(), *call.backward())}.values():
        image = built_for(call, launch)
        used = resources(image.cubin)
        assert used["STACK"] <= stack, (launch.kernel, used)
        assert image.shared <= 227 * 1024
        # What max makes of a NaN is the other number, unless it is told.
        assert (b"max.NaN.f32" in image.ptx) == (launch.kernel in ("steps", "of_steps"))
        products = launch.kernel in ("adds", "states", "forward", "of_queries", "of_keys")
        assert (b"wgmma" in image.ptx) == products, launch.kernel
