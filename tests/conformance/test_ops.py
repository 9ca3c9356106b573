"""The ops of a backend against the float64 recurrence, and the laws that they obey."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.spec import recurrence

from .assertions import assert_close, assert_zero
from .strategies import Case, conv_cases, scan_cases

KEPT_IN_FLOAT32 = ("A", "D", "delta_bias", "initial_state")


def run(backend, op, case: Case, dtype="float32", **options):
    """(outputs, gradients by name, cotangents, the inputs as the op saw them), with the final state as last output."""
    names = list(case.arrays)
    stored = {name: "float32" if op == "selective_scan" and name in KEPT_IN_FLOAT32 else dtype for name in names}
    given_ = [backend.from_numpy(case.arrays[name], dtype=stored[name]) for name in names]
    seen = {name: np.asarray(backend.to_numpy(array)) for name, array in zip(names, given_, strict=True)}
    positions = {name: backend.from_numpy(value) for name, value in case.positions.items()}
    options = case.options | positions | options

    def function(*arrays):
        return getattr(backend, op)(**dict(zip(names, arrays, strict=True)), **options, return_final_state=True)

    reference = functools.partial(getattr(recurrence, op), **case.options, **case.positions, return_final_state=True)
    expected = reference(**seen)
    rng = np.random.default_rng(0)
    cotangents = [rng.normal(size=value.shape).astype(np.float32) for value in expected]
    cast = [backend.from_numpy(value, dtype=d) for value, d in zip(cotangents, _out(op, dtype), strict=True)]
    outputs, gradients = backend.vjp(function, given_, cast)
    cotangents = [backend.to_numpy(value) for value in cast]
    return (outputs, dict(zip(names, gradients, strict=True))), expected, cotangents, seen


def _out(op, dtype):
    return (dtype, "float32") if op == "selective_scan" else (dtype, dtype)


def check(backend, op, case, dtype, **options):
    (outputs, gradients), expected, cotangents, seen = run(backend, op, case, dtype, **options)
    vjp = getattr(recurrence, f"{op}_vjp")
    wanted = vjp(*cotangents, **seen, **case.options, **case.positions)
    for value, reference, what in zip(outputs, expected, ("y", "final state"), strict=True):
        assert_close(value, reference, dtype, "value", f"{op} {what}", **options)
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], dtype, "gradient", f"{op} gradient of {name}", **options)


@given(case=scan_cases(), data=st.data())
def test_every_scan_kernel_equals_the_recurrence(backend, case, data):
    runnable = [name for name, reason in backend.kernels().items() if reason is None]
    check(backend, "selective_scan", case, "float32", kernel=data.draw(st.sampled_from(runnable)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(case=scan_cases(lengths=(1, 17, 65)))
def test_scan_in_half_precision(backend, case, dtype):
    check(backend, "selective_scan", case, dtype)


@given(case=conv_cases())
def test_conv_equals_the_recurrence(backend, case):
    check(backend, "causal_conv", case, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(case=conv_cases(lengths=(1, 17)))
def test_conv_in_half_precision(backend, case, dtype):
    check(backend, "causal_conv", case, dtype)


OPS = {"selective_scan": scan_cases(lengths=(17, 33)), "causal_conv": conv_cases(lengths=(17, 33))}
PER_POSITION = ("x", "delta", "B", "C", "z", "mask", "segment_ids")


def call(backend, op, arrays, options):
    """(y, final state) as NumPy, from NumPy."""
    native = {name: backend.from_numpy(value) for name, value in arrays.items()}
    y, h = getattr(backend, op)(**native, **options, return_final_state=True)
    return backend.to_numpy(y), backend.to_numpy(h)


def part(arrays, where):
    return {name: value[:, where] if name in PER_POSITION else value for name, value in arrays.items()}


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_split_with_the_carried_state_is_the_whole(backend, op, data):
    case = data.draw(OPS[op])
    # The ops take the segments of one call: the first position of a call goes on from the state it is given.
    arrays = case.arrays | {name: value for name, value in case.positions.items() if name == "mask"}
    at = data.draw(st.sampled_from((0, 1, 2, 16, case.length)))
    y, h = call(backend, op, arrays, case.options)
    head, carried = call(backend, op, part(arrays, slice(None, at)), case.options)
    tail, last = call(backend, op, part(arrays, slice(at, None)) | {"initial_state": carried}, case.options)
    assert_close(np.concatenate([head, tail], 1), y, "float32", "value", f"{op} split at {at}")
    assert_close(last, h, "float32", "value", f"{op} final state, split at {at}")


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_steps_are_the_whole(backend, op, data):
    case = data.draw(OPS[op])
    y, h = call(backend, op, case.arrays, case.options)
    arrays = {name: backend.from_numpy(value) for name, value in case.arrays.items()}
    shape = (*h.shape,)
    state = arrays.pop("initial_state", backend.from_numpy(np.zeros(shape, np.float32)))
    step = getattr(backend, {"selective_scan": "selective_step", "causal_conv": "causal_conv_step"}[op])
    steps = []
    for t in range(case.length):
        now = {name: value[:, t] if name in PER_POSITION else value for name, value in arrays.items()}
        y_t, state = step(**now, **case.options, state=state)
        steps.append(backend.to_numpy(y_t))
    # All together: a single position of a single channel may be a small difference of large states.
    assert_close(np.stack(steps, 1), y, "float32", "value", f"{op} steps")
    assert_close(backend.to_numpy(state), h, "float32", "value", f"{op} state after steps")


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_permuting_the_batch_permutes_the_result(backend, op, data):
    case = data.draw(OPS[op])
    arrays = case.arrays | case.positions
    order = np.roll(np.arange(len(arrays["x"])), 1)
    batched = (*PER_POSITION, "initial_state")
    turned = {name: value[order] if name in batched else value for name, value in arrays.items()}
    for value, reference in zip(
        call(backend, op, turned, case.options), call(backend, op, arrays, case.options), strict=True
    ):
        assert_close(value, reference[order], "float32", "value", f"{op} of a permuted batch")


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_causal_in_values_and_gradients(backend, op, data):
    case = data.draw(OPS[op])
    t = data.draw(st.integers(0, case.length - 1))
    later = np.arange(case.length) > t
    disturbed = dict(case.arrays)
    for name in set(PER_POSITION) & set(disturbed):
        disturbed[name] = np.where(later[None, :, None], 3.0 * disturbed[name] + 1.0, disturbed[name])
    y, _ = call(backend, op, case.arrays | case.positions, case.options)
    changed, _ = call(backend, op, disturbed | case.positions, case.options)
    np.testing.assert_array_equal(changed[:, : t + 1], y[:, : t + 1])

    names = [name for name in case.arrays if name in PER_POSITION]
    fixed = {name: value for name, value in (case.arrays | case.positions).items() if name not in names}
    fixed = {name: backend.from_numpy(value) for name, value in fixed.items()}
    cotangent = np.where(later[None, :, None], 0.0, np.ones_like(y))

    def function(*arrays):
        return (getattr(backend, op)(**dict(zip(names, arrays, strict=True)), **fixed, **case.options),)

    arrays = [backend.from_numpy(case.arrays[name]) for name in names]
    _, gradients = backend.vjp(function, arrays, [backend.from_numpy(cotangent.astype(np.float32))])
    for name, gradient in zip(names, gradients, strict=True):
        assert_zero(gradient[:, later], f"{op}: gradient of y up to {t} in later {name}")


@given(case=scan_cases(lengths=(17, 33)))
def test_scan_is_linear_in_x(backend, case):
    arrays = case.arrays | case.positions
    arrays.pop("initial_state", None)
    other = np.random.default_rng(1).normal(size=arrays["x"].shape).astype(np.float32)
    y, h = call(backend, "selective_scan", arrays, case.options)
    y_other, h_other = call(backend, "selective_scan", arrays | {"x": other}, case.options)
    y_sum, h_sum = call(backend, "selective_scan", arrays | {"x": 2 * arrays["x"] - other}, case.options)
    # Each term carries the error of its own size.
    scale = max(1.0, np.abs(y).mean() + np.abs(y_other).mean())
    assert_close(y_sum / scale, (2.0 * y - y_other) / scale, "float32", "gradient", "scan of a sum")
    assert_close(h_sum, 2.0 * h - h_other, "float32", "gradient", "final state of a sum")


@pytest.mark.parametrize("op", OPS)
def test_empty_batch_is_refused(backend, op):
    weights = {"causal_conv": {"weight": np.ones((3, 4), np.float32)}, "selective_scan": {}}[op]
    arrays = {"x": np.ones((0, 5, 3), np.float32)} | weights
    if op == "selective_scan":
        arrays |= {"delta": arrays["x"], "A": -np.ones((3, 2), np.float32)}
        arrays |= {"B": np.ones((0, 5, 2), np.float32), "C": np.ones((0, 5, 2), np.float32)}
    with pytest.raises(ValueError, match="batch 0"):
        call(backend, op, arrays, {})


def test_faults_of_the_arguments_are_named(backend):
    good = {"x": (2, 5, 3), "delta": (2, 5, 3), "A": (3, 4), "B": (2, 5, 4), "C": (2, 5, 4)}
    bad = {"delta": (2, 5, 4), "A": (4, 4), "B": (2, 4, 4), "C": (2, 5, 3), "D": (4,), "z": (2, 5), "x": (5, 3)}
    for name, shape in bad.items():
        arrays = {key: backend.from_numpy(np.ones(size, np.float32)) for key, size in (good | {name: shape}).items()}
        with pytest.raises(ValueError, match=r"has shape .*expected"):
            backend.selective_scan(**arrays)
    arrays = {key: backend.from_numpy(np.ones(size, np.float32)) for key, size in good.items()}
    with pytest.raises(TypeError, match="expected bool"):
        backend.selective_scan(**arrays, mask=backend.from_numpy(np.ones((2, 5), np.int32)))
    with pytest.raises(ValueError, match=r"no kernel 'nonsense'|kernel"):
        backend.selective_scan(**arrays, kernel="nonsense")


def test_masked_positions_do_not_leak_what_is_not_finite(backend):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(1, 6, 3)), "delta": rng.uniform(0.1, 1, (1, 6, 3)), "A": -np.ones((3, 2))}
    arrays |= {"B": rng.normal(size=(1, 6, 2)), "C": rng.normal(size=(1, 6, 2)), "z": rng.normal(size=(1, 6, 3))}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    mask = np.array([[True, True, False, True, False, True]])
    spoilt = dict(arrays)
    for name in ("x", "delta", "B", "C", "z"):
        spoilt[name] = np.where(mask[..., None], arrays[name], np.float32("nan"))
    y, h = call(backend, "selective_scan", arrays | {"mask": mask}, {})
    y_spoilt, h_spoilt = call(backend, "selective_scan", spoilt | {"mask": mask}, {})
    np.testing.assert_array_equal(y_spoilt, y)
    np.testing.assert_array_equal(h_spoilt, h)


def test_a_restart_forgets_a_state_that_is_not_finite(backend):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(1, 40, 3)), "delta": rng.uniform(0.1, 1, (1, 40, 3)), "A": -np.ones((3, 2))}
    arrays |= {"B": rng.normal(size=(1, 40, 2)), "C": rng.normal(size=(1, 40, 2))}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    arrays["x"][0, 5] = np.inf
    segment_ids = np.repeat([0, 1], [20, 20])[None].astype(np.int32)
    y, h = call(backend, "selective_scan", arrays | {"segment_ids": segment_ids}, {})
    wanted, wanted_h = call(backend, "selective_scan", part(arrays, slice(20, None)), {})
    assert_close(y[:, 20:], wanted, "float32", "value", "after the restart")
    assert_close(h, wanted_h, "float32", "value", "state after the restart")


@pytest.mark.parametrize(
    ("value", "expected"), [(-80.0, np.exp(-80.0)), (-30.0, np.exp(-30.0)), (30.0, 30.0), (200.0, 200.0)]
)
def test_softplus_is_exact_at_both_ends(backend, value, expected):
    """With A near 0 and x = B = C = 1, one position gives y = softplus(delta)."""
    ones = {
        name: np.ones(shape, np.float32) for name, shape in {"x": (1, 1, 1), "B": (1, 1, 1), "C": (1, 1, 1)}.items()
    }
    arrays = ones | {"A": np.full((1, 1), -1e-6, np.float32), "delta": np.full((1, 1, 1), value, np.float32)}
    y, _ = call(backend, "selective_scan", arrays, {"delta_softplus": True})
    assert y.item() == pytest.approx(expected, rel=1e-5)
