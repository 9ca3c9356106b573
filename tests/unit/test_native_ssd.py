"""The ssd of the native library alone: every vector width, any sizes and threads, restarts inside a chunk."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.backends.native import library
from mamba_core.spec.ops import base
from mamba_core.spec.ops import ssd as spec
from tests.conformance.assertions import assert_close
from tests.conformance.strategies import op_cases
from tests.conformance.subjects import SUBJECTS
from tests.unit.native_arrays import ssd, ssd_backward, widths

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")
every_width = pytest.mark.parametrize("width", widths())


def drawn(b, l, h, p, g, n, names=spec.OPTIONAL) -> dict[str, np.ndarray]:
    """In float32, steps before the softplus."""
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(b, l, h, p)),
        "dt": rng.normal(size=(b, l, h)) - 3,
        "A": -np.exp(rng.normal(size=h)),
    }
    arrays |= {"B": rng.normal(size=(b, l, g, n)), "C": rng.normal(size=(b, l, g, n)), "D": rng.normal(size=(h, p))}
    arrays |= {"z": rng.normal(size=(b, l, h, p)), "dt_bias": rng.normal(size=h)}
    arrays |= {"initial_state": rng.normal(size=(b, h, p, n))}
    return {k: v.astype(np.float32) for k, v in arrays.items() if k in ("x", "dt", "A", "B", "C", *names)}


def native_positions(shape, positions) -> dict:
    """(mask, restart) as the library takes them."""
    mask, segments = positions.get("mask"), positions.get("segment_ids")
    counting = np.ones(shape, bool) if mask is None else mask
    return {"mask": mask, "restart": None if segments is None else base.restarts(counting, segments)}


def check(arrays, options, positions=None, width=0, threads=2, least_norm=lambda name, wanted: 0.0):
    """Values and gradients are the reference's, and nothing depends on what is kept for a gradient."""
    positions = positions or {}
    given_arrays = arrays | native_positions(arrays["x"].shape[:2], positions)
    y, h, boundaries = ssd(threads, width, **options, **given_arrays)
    wanted, wanted_h = spec.ssd(**arrays, **positions, **options, return_final_state=True)
    assert_close(y, wanted, "float32", "value", "y", least_norm("y", wanted))
    assert_close(h, wanted_h, "float32", "value", "final state")
    np.testing.assert_array_equal(ssd(threads, width, keep=False, **options, **given_arrays)[0], y)
    rng = np.random.default_rng(0)
    dy, dh = (rng.normal(size=value.shape).astype(np.float32) for value in (y, h))
    gradients = ssd_backward(dy, dh, boundaries, threads, width, **options, **given_arrays)
    for name, value in spec.ssd_vjp(dy, dh, **arrays, **positions, **options).items():
        assert_close(gradients[name], value, "float32", "gradient", name, least_norm(name, value))


@every_width
@given(case=op_cases("ssd"), threads=st.sampled_from((1, 2, 3)))
def test_the_ssd_is_the_recurrence(width, case, threads):
    def least_norm(name, wanted):
        return SUBJECTS["ssd"].least_norm(case, case.arrays, name, wanted)

    check(case.arrays, case.options, case.positions, width, threads, least_norm)


@every_width
@pytest.mark.parametrize(
    "sizes", [(1, 64, 1, 1, 1, 1), (2, 65, 6, 16, 2, 17), (1, 130, 3, 70, 3, 16), (1, 1, 2, 64, 1, 128)]
)
def test_sizes_around_those_of_tiles_and_chunks(width, sizes):
    check(drawn(*sizes), {"dt_softplus": True}, width=width)


@every_width
@pytest.mark.parametrize("every", [1, 3, 20, 64])
def test_runs_that_begin_anywhere_in_a_tile(width, every):
    segment_ids = np.arange(150)[None] // every
    mask = np.random.default_rng(1).random((1, 150)) < 0.9
    positions = {"segment_ids": segment_ids.astype(np.int32), "mask": mask}
    check(drawn(1, 150, 2, 5, 1, 18), {"dt_softplus": True}, positions, width)


@every_width
@pytest.mark.parametrize("long", [10.0, 1e5])
def test_short_steps_after_long_ones_keep_their_digits(width, long):
    arrays = drawn(1, 150, 2, 3, 1, 4, names=())
    arrays["A"][:] = -8.0
    arrays["dt"][:] = 1e-4
    arrays["dt"][:, ::7] = long
    check(arrays, {}, width=width)


@every_width
def test_an_infinite_rate_forgets_where_a_position_counts(width):
    arrays = drawn(1, 90, 3, 3, 1, 4)
    arrays["A"][:2] = -np.inf
    check(arrays, {"dt_softplus": True}, {"mask": np.random.default_rng(2).random((1, 90)) < 0.8}, width)


def several_spans():
    """The arrays of a span for eleven of these chunks are more than `SPAN_BYTES`."""
    return drawn(1, 800, 8, 16, 8, 128, names=("D", "dt_bias"))


def test_a_sequence_of_several_spans():
    arrays, options = several_spans(), {"dt_softplus": True}
    check(arrays, options)
    check(arrays, options, {"segment_ids": np.cumsum(np.arange(800) % 300 == 0, dtype=np.int32)[None]})


def test_threads_change_no_bit():
    arrays, runs = several_spans() | drawn(1, 800, 8, 16, 8, 128, names=("z", "initial_state")), []
    for threads in (1, 2, 7, 100):
        y, h, boundaries = ssd(threads, dt_softplus=True, **arrays)
        runs.append({"y": y, "h": h} | ssd_backward(y, h, boundaries, threads, dt_softplus=True, **arrays))
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert np.isfinite(value).all(), name
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@given(sizes=st.tuples(*[st.integers(0, 300)] * 5))
def test_the_count_of_boundaries_is_the_library_s(sizes):
    assert library.count_ssd_boundaries(*sizes) == library.loaded().mamba_ssd_boundaries(*sizes)


@every_width
def test_what_is_masked_does_not_leak(width):
    arrays = drawn(1, 150, 2, 3, 1, 4, names=("z", "D"))
    mask, results = np.random.default_rng(0).random((1, 150)) < 0.7, []
    of_positions = ("x", "dt", "B", "C", "z")
    for spoil in (0.0, np.nan):
        spoilt = {name: value.copy() for name, value in arrays.items()}
        for name in of_positions:
            spoilt[name][~mask] += np.float32(spoil)
        y, h, boundaries = ssd(1, width, True, **spoilt, mask=mask)
        dy = np.where(mask[..., None, None], np.ones_like(y), np.float32(spoil))
        gradients = ssd_backward(dy, h, boundaries, 1, width, True, **spoilt, mask=mask)
        results.append({"y": y, "h": h} | gradients)
    for name in ("y", *of_positions):
        assert not results[0][name][~mask].any(), name
    for name, value in results[0].items():
        assert np.isfinite(value).all(), name
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)


@every_width
@pytest.mark.parametrize("name", ["x", "B", "initial_state", "dy"])
def test_no_run_reads_what_is_not_finite_in_another(width, name):
    """Runs begin and end in the middle of a tile. What is not finite stands before the one of 21 to 91, or after it."""
    arrays = drawn(1, 100, 2, 5, 1, 18)
    restart, results = np.isin(np.arange(100), (21, 91))[None], []
    for spoil in (0.0, np.inf):
        spoilt = {name: value.copy() for name, value in arrays.items()}
        dy = np.ones_like(arrays["x"])
        (dy if name == "dy" else spoilt[name])[0, 91 if name == "dy" else 0] += np.float32(spoil)
        y, h, boundaries = ssd(1, width, True, **spoilt, restart=restart)
        gradients = ssd_backward(dy, None, boundaries, 1, width, True, **spoilt, restart=restart)
        after = {key: gradients[key][:, 21:91] for key in ("x", "dt", "B", "C", "z")}
        results.append({"y": y[:, 21:], "h": h} | after)
    for key, value in results[0].items():
        assert np.isfinite(value).all(), key
        np.testing.assert_array_equal(results[1][key], value, err_msg=key)


@every_width
def test_bfloat16_is_float32_rounded_once(width):
    arrays = {name: value.astype(ml_dtypes.bfloat16) for name, value in drawn(2, 70, 4, 5, 2, 9).items()}
    exact = {name: value.astype(np.float32) for name, value in arrays.items()}
    half = exact | {name: arrays[name] for name in ("x", "dt", "B", "C", "z")}
    found, wanted = (ssd(1, width, True, **each) for each in (half, exact))
    np.testing.assert_array_equal(found[0], wanted[0].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found[1], wanted[1])
    dy = found[0]
    found = ssd_backward(dy, None, found[2], 1, width, True, **half)
    wanted = ssd_backward(dy.astype(np.float32), None, wanted[2], 1, width, True, **exact)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype), err_msg=name)
