"""The native library alone: every vector width, any number of threads, the ends of its functions' domains.

Against the reference, through each backend, the conformance suite tests it.
"""

import os
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.backends.native import library
from mamba_core.spec.ops import base as base_spec
from mamba_core.spec.ops import causal_conv as conv_spec
from mamba_core.spec.ops import selective_scan as scan_spec
from tests.conformance.assertions import assert_close
from tests.conformance.strategies import op_cases
from tests.conformance.subjects import SUBJECTS
from tests.unit.native_arrays import SEQUENCES, add_norm, conv, conv_backward, scan, scan_backward, widths

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")
SOURCES = Path(library.__file__).parent
every_width = pytest.mark.parametrize("width", widths())


def native_positions(case):
    """(mask, restart) as the library takes them."""
    mask, segments = case.positions.get("mask"), case.positions.get("segment_ids")
    if segments is None:
        return {"mask": mask, "restart": None}
    counting = np.ones(case.shape, bool) if mask is None else mask
    return {"mask": mask, "restart": base_spec.restarts(counting, segments)}


def close_in(op, case, name, found, wanted):
    """y, or the gradient of an array, against the reference; as precise as the law of the op asks."""
    kind, what = ("value", name) if name == "y" else ("gradient", f"gradient of {name}")
    assert_close(found, wanted, "float32", kind, what, SUBJECTS[op].least_norm(case, case.arrays, name, wanted))


@every_width
@given(case=op_cases("selective_scan"), threads=st.sampled_from((1, 2, 3)))
def test_the_scan_is_the_recurrence(width, case, threads):
    given_arrays, options = case.arrays | native_positions(case), {"delta_softplus": case.options["delta_softplus"]}
    y, h, boundaries = scan(threads, width, **options, **given_arrays)
    wanted, wanted_h = scan_spec.selective_scan(
        **case.arrays, **case.positions, **case.options, return_final_state=True
    )
    close_in("selective_scan", case, "y", y, wanted)
    assert_close(h, wanted_h, "float32", "value", "final state")
    np.testing.assert_array_equal(scan(threads, width, keep=False, **options, **given_arrays)[0], y)
    dy = np.random.default_rng(0).normal(size=y.shape).astype(y.dtype)
    gradients = scan_backward(dy, h, boundaries, threads, width, **options, **given_arrays)
    for name, value in scan_spec.selective_scan_vjp(dy, h, **case.arrays, **case.positions, **case.options).items():
        close_in("selective_scan", case, name, gradients[name], value)


@every_width
@given(case=op_cases("causal_conv"), threads=st.sampled_from((1, 2, 3)))
def test_the_convolution_is_the_reference(width, case, threads):
    given_arrays = case.arrays | native_positions(case) | {"weight": np.ascontiguousarray(case.arrays["weight"].T)}
    silu = case.options["activation"] == "silu"
    y, h = conv(threads, width, silu, **given_arrays)
    wanted, wanted_h = conv_spec.causal_conv(**case.arrays, **case.positions, **case.options, return_final_state=True)
    assert_close(y, wanted, "float32", "value", "y")
    assert_close(h, wanted_h, "float32", "value", "final state")
    dy = np.random.default_rng(0).normal(size=y.shape).astype(y.dtype)
    gradients = conv_backward(dy, h, threads, width, silu, **given_arrays)
    gradients["weight"] = gradients["weight"].T
    for name, value in conv_spec.causal_conv_vjp(dy, h, **case.arrays, **case.positions, **case.options).items():
        if name in gradients:
            close_in("causal_conv", case, name, gradients[name], value)


@every_width
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stream", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [1, 15, 16, 768, 1001])
def test_the_sum_and_its_norm(width, dtype, stream, d):
    rng, eps = np.random.default_rng(d), 0.01
    residual, hidden = rng.normal(size=(2, 37, d)).astype("float32")
    residual, hidden, weight = residual.astype(stream), hidden.astype(dtype), rng.normal(size=d).astype(dtype)
    normed, total = add_norm(residual, hidden, weight, eps, 3, width)
    # Rounded to the dtype of the stream before it is normed.
    wanted = (residual.astype("float32") + hidden.astype("float32")).astype(stream)
    np.testing.assert_array_equal(total, wanted)

    def norm(x):
        x = x.astype(float)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight.astype(float)

    assert_close(normed, norm(wanted), dtype, "value", "normed")
    alone, nothing = add_norm(residual, None, weight, eps, 1, width)
    assert_close(alone, norm(residual), dtype, "value", "normed alone")
    assert nothing is None
    np.testing.assert_array_equal(add_norm(residual, hidden, weight, eps, 1, width)[0], normed)


def drawn(b, l, e, n, names=("D", "z", "delta_bias", "initial_state")):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(b, l, e)), "delta": rng.normal(size=(b, l, e)) - 3, "z": rng.normal(size=(b, l, e))}
    arrays |= {"B": rng.normal(size=(b, l, n)), "C": rng.normal(size=(b, l, n)), "A": -np.exp(rng.normal(size=(e, n)))}
    arrays |= {"D": rng.normal(size=e), "delta_bias": rng.normal(size=e), "initial_state": rng.normal(size=(b, e, n))}
    kept = ("x", "delta", "A", "B", "C", *names)
    return {name: value.astype(np.float32) for name, value in arrays.items() if name in kept}


@every_width
@pytest.mark.parametrize("shape", [(1, 70, 1), (2, 65, 63), (2, 33, 64), (1, 40, 65), (3, 96, 200)])
@pytest.mark.parametrize("n", [1, 16, 17])
def test_channels_around_a_block_of_them(width, shape, n):
    arrays, options = drawn(*shape, n), {"delta_softplus": True}
    y, h, boundaries = scan(3, width, **options, **arrays)
    wanted, wanted_h = scan_spec.selective_scan(**arrays, **options, return_final_state=True)
    assert_close(y, wanted, "float32", "value", "y")
    assert_close(h, wanted_h, "float32", "value", "h")
    dy = np.random.default_rng(3).normal(size=y.shape).astype(np.float32)
    got = scan_backward(dy, h, boundaries, 3, width, **options, **arrays)
    for name, value in scan_spec.selective_scan_vjp(dy, h, **arrays, **options).items():
        assert_close(got[name], value, "float32", "gradient", name)


def test_threads_change_no_bit():
    arrays = drawn(2, 600, 300, 16)
    weight = np.random.default_rng(1).normal(size=(4, 300)).astype(np.float32)
    runs = []
    for threads in (1, 2, 7):
        y, h, boundaries = scan(threads, delta_softplus=True, **arrays)
        found = {"y": y, "h": h} | scan_backward(arrays["x"], h, boundaries, threads, delta_softplus=True, **arrays)
        gradients = conv_backward(arrays["x"], None, threads, silu=True, x=y, weight=weight)
        runs.append(found | {f"conv {name}": value for name, value in gradients.items()})
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert np.isfinite(value).all(), name
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@given(sizes=st.tuples(*[st.integers(0, 300)] * 4))
def test_the_count_of_boundaries_is_the_library_s(sizes):
    assert library.count_boundaries(*sizes) == library.loaded().mamba_scan_boundaries(*sizes)


@every_width
@pytest.mark.parametrize("value", [0.0, 1e-3, 0.7, 5.0, 30.0, 80.0, 200.0, 1e5, 1e7, 1e9, 1e20, 1e30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_softplus_and_silu_are_exact(width, value, sign):
    one, value = np.ones((1, 1, 1), np.float32), np.float32(sign * value)
    arrays = {"x": one, "delta": one * value, "A": np.full((1, 1), -1e-38, np.float32), "B": one, "C": one}
    y, *_ = scan(1, width, True, **arrays)
    assert y.item() == pytest.approx(np.logaddexp(0.0, np.float64(value)), rel=3e-7, abs=1e-37)
    y, *_ = scan(1, width, **arrays | {"delta": one}, z=one * value)
    with np.errstate(over="ignore"):
        silu = np.float64(value) / (1 + np.exp(-np.float64(value)))
    assert y.item() == pytest.approx(silu, rel=1e-6, abs=1e-35)


def decayed(width, step, A=-1.0):
    """exp(step A): the final state of one position from a state of ones with x = 0."""
    e, one = len(step), np.ones((1, 1, 1), np.float32)
    arrays = {"x": np.zeros((1, 1, e), np.float32), "delta": step[None, None], "A": np.full((e, 1), A, np.float32)}
    _, h, _ = scan(2, width, **arrays, B=one, C=one, initial_state=np.ones((1, e, 1), np.float32))
    return h[0, :, 0]


@every_width
def test_the_decay_is_exact_to_two_ulp_and_its_argument(width):
    rng = np.random.default_rng(0)
    step = np.concatenate([rng.uniform(0, 1, 60000), np.exp(rng.uniform(-30, 4.4, 60000))]).astype(np.float32)
    exact = np.exp(-step.astype(np.float64))
    ulp = np.abs(decayed(width, step) - exact) / np.spacing(exact.astype(np.float32))
    # A log2(e) and its product with the step are rounded, as the product delta A is in any float32.
    assert (ulp <= 2.0 + 1.5 * step).all()


@every_width
def test_the_decay_at_the_ends(width):
    step = np.array([0.0, 1e-9, 80.0, 87.0, 100.0, 1e6, 1e30, np.nan, -80.0, -100.0], np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(decayed(width, step), np.exp(-step), rtol=1e-5, atol=2e-38)
    assert (decayed(width, step[:2]) == 1).all()


@every_width
def test_what_is_masked_does_not_leak(width):
    arrays = drawn(1, 70, 3, 2, names=("z", "D"))
    mask = np.random.default_rng(0).random((1, 70)) < 0.7
    spoilt = {k: np.where(mask[..., None], v, np.float32("nan")) if k in SEQUENCES else v for k, v in arrays.items()}
    results = []
    for given_arrays, spoil in ((arrays, 1.0), (spoilt, np.nan)):
        y, h, boundaries = scan(1, width, True, **given_arrays, mask=mask)
        dy = np.where(mask[..., None], np.ones_like(y), np.float32(spoil))
        gradients = scan_backward(dy, h, boundaries, 1, width, True, **given_arrays, mask=mask)
        results.append({"y": y, "h": h} | gradients)
    assert not results[0]["y"][~mask].any()
    for name, value in results[0].items():
        assert np.isfinite(value).all(), name
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)


@every_width
def test_bfloat16_rounds_to_nearest_even(width):
    """With A near 0 and delta = B = C = 1, y = x: every bfloat16 comes back, and a NaN as a NaN."""
    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)[None, None]
    e, ones = x.shape[-1], np.ones((1, 1, 1), ml_dtypes.bfloat16)
    arrays = {"x": x, "delta": np.ones_like(x), "A": np.full((e, 1), -1e-30, np.float32), "B": ones, "C": ones}
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(x.astype(np.float32))
        y, _, _ = scan(1, width, **arrays)
        np.testing.assert_array_equal(y[finite], x[finite])
        assert np.isnan(y[np.isnan(x)].astype(np.float32)).all()
        D = np.random.default_rng(0).normal(1, 0.1, e).astype(np.float32)
        y, _, _ = scan(1, width, **arrays | {"B": 0 * ones}, D=D)
        wanted = (x.astype(np.float32) * D).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(y[finite], wanted[finite])
        # The last bits of this NaN would carry through the exponent.
        D[:] = np.array(2**31 - 1, np.uint32).view(np.float32)
        y, _, _ = scan(1, width, **arrays, D=D)
    assert np.isnan(y.astype(np.float32)).all()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["harness.cpp", "harness_step.cpp"])
def test_sanitizers_find_nothing(tmp_path, name):
    """The kernels on drawn numbers under ASan and UBSan, at every width, with one thread and three."""
    program = tmp_path / "harness"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    sources = [Path(__file__).with_name(name), *SOURCES.glob("*.cpp")]
    command = ["c++", "-O1", "-g", *sanitize, "-pthread", f"-I{SOURCES}", *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("no sanitizers' libraries")
    assert built.returncode == 0, built.stderr
    for width in widths():
        outputs = []
        for threads in ("1", "3"):
            # GCC 13's AddressSanitizer misaligns wide vectors on the stack that it keeps for after a return.
            environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
            done = subprocess.run([program, str(width), threads], capture_output=True, timeout=120, env=environment)
            assert done.returncode == 0, done.stderr.decode()
            outputs.append(done.stdout)
        assert outputs[0] == outputs[1], "the number of threads changed a bit"
