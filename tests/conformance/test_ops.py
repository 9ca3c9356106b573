"""What holds of the ops alone: every kernel, the ends of their domains, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_core.spec import ops
from mamba_core.spec.ops import selective_scan

from .assertions import assert_close
from .strategies import EDGES, Case, law, lengths, op_cases
from .subjects import Piece
from .test_laws import check


@pytest.mark.parametrize("length", EDGES)
@settings(max_examples=2)
@given(data=st.data())
def test_every_kernel_at_every_edge(backend, length, data):
    """The lengths around a chunk's are always among those that are tried."""
    check_kernel(backend, data, st.just(length))


@law
def test_every_kernel_equals_the_recurrence(backend, data):
    check_kernel(backend, data, lengths())


@pytest.mark.parametrize("op", ops.public())
def test_every_kernel_equals_the_recurrence_where_it_restarts(backend, op):
    """Masked and packed at once, over several chunks: what is drawn above need not hold that for each kernel."""
    for kernel in runnable(backend, op):
        rng = np.random.default_rng(0)
        arrays, options = ops.public()[op].draw(rng, lambda values: values[1], 2, 40)
        arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
        positions = {"mask": rng.random((2, 40)) < 0.8, "segment_ids": np.cumsum(rng.random((2, 40)) < 0.2, axis=1)}
        positions["segment_ids"] = positions["segment_ids"].astype(np.int32)
        case = Case(arrays, positions, options | {"kernel": kernel}, dict.fromkeys(arrays, "plain"))
        check(backend, op, case, [Piece()], kernel)


def runnable(backend, op) -> list[str]:
    return [name for name, reason in backend.available_kernels()[op].items() if reason is None]


def check_kernel(backend, data, drawn_lengths):
    for op in ops.public():
        kernel = data.draw(st.sampled_from([*runnable(backend, op), "plain"]))
        case = data.draw(op_cases(op, drawn_lengths))
        check(backend, op, case._replace(options=case.options | {"kernel": kernel}), [Piece()], kernel)


def call(backend, op, arrays, options):
    """(y, final state) as NumPy, from NumPy."""
    native = {name: backend.from_numpy(value) for name, value in arrays.items()}
    y, h = getattr(backend.op(op), op)(**native, **options, return_final_state=True)
    return backend.to_numpy(y), backend.to_numpy(h)


@given(case=op_cases("selective_scan", st.sampled_from((17, 33))))
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


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv"])
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
            backend.op("selective_scan").selective_scan(**arrays)
    arrays = {key: backend.from_numpy(np.ones(size, np.float32)) for key, size in good.items()}
    with pytest.raises(TypeError, match="expected bool"):
        backend.op("selective_scan").selective_scan(**arrays, mask=backend.from_numpy(np.ones((2, 5), np.int32)))
    with pytest.raises(ValueError, match=r"no kernel 'nonsense'|kernel"):
        backend.op("selective_scan").selective_scan(**arrays, kernel="nonsense")


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


def test_a_rate_of_minus_infinity_forgets_at_every_position_that_counts(backend):
    """In every kernel, over lengths that fill no chunk, and beside positions that do not count."""
    rng, (b, l, e, n) = np.random.default_rng(0), (2, 300, 5, 3)
    arrays = {"x": rng.normal(size=(b, l, e)), "delta": rng.uniform(0.1, 2.0, (b, l, e))}
    arrays |= {"A": -rng.uniform(0.5, 2.0, (e, n)), "B": rng.normal(size=(b, l, n)), "C": rng.normal(size=(b, l, n))}
    arrays["A"][[0, 2], [0, 1]] = -np.inf
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    mask = rng.random((b, l)) < 0.8
    mask[:, -3:] = False
    for positions in ({}, {"mask": mask}):
        wanted = selective_scan.selective_scan(**arrays, **positions, return_final_state=True)
        for kernel, reason in backend.available_kernels()["selective_scan"].items():
            if reason is not None:
                continue
            found = call(backend, "selective_scan", arrays | positions, {"kernel": kernel})
            for what, value, expected in zip(("y", "final state"), found, wanted, strict=True):
                assert np.isfinite(expected).all()
                assert_close(value, expected, "float32", "value", f"{kernel}: {what}")

            def scan(*values, kernel=kernel, positions=positions):
                given = dict(zip(arrays, values, strict=True))
                given |= {name: backend.from_numpy(value) for name, value in positions.items()}
                return (backend.op("selective_scan").selective_scan(**given, kernel=kernel),)

            given = [backend.from_numpy(value) for value in arrays.values()]
            _, gradients = backend.vjp(scan, given, [backend.from_numpy(np.ones((b, l, e), np.float32))])
            expected = selective_scan.selective_scan_vjp(np.ones((b, l, e)), None, **arrays, **positions)
            for name, gradient in zip(arrays, gradients, strict=True):
                assert_close(gradient, expected[name], "float32", "gradient", f"{kernel}: gradient of {name}")


def test_a_restart_forgets_a_state_that_is_not_finite(backend):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(1, 40, 3)), "delta": rng.uniform(0.1, 1, (1, 40, 3)), "A": -np.ones((3, 2))}
    arrays |= {"B": rng.normal(size=(1, 40, 2)), "C": rng.normal(size=(1, 40, 2))}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    arrays["x"][0, 5] = np.inf
    segment_ids = np.repeat([0, 1], [20, 20])[None].astype(np.int32)
    y, h = call(backend, "selective_scan", arrays | {"segment_ids": segment_ids}, {})
    alone = {name: value if name == "A" else value[:, 20:] for name, value in arrays.items()}
    wanted, wanted_h = call(backend, "selective_scan", alone, {})
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


@pytest.mark.slow
def test_a_million_positions(backend):
    """Also in the sums over all of them, forwards and backwards."""
    length, channels, states = 1_000_000, 4, 4
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    arrays = {"x": normal(1, length, channels), "delta": normal(1, length, channels) - 3}
    arrays |= {"A": -np.exp(normal(channels, states)), "B": normal(1, length, states), "C": normal(1, length, states)}
    arrays |= {"D": normal(channels), "z": normal(1, length, channels), "delta_bias": normal(channels)}
    dy, dh = normal(1, length, channels), normal(1, channels, states)
    expected = selective_scan.selective_scan(**arrays, delta_softplus=True, return_final_state=True)
    wanted = selective_scan.selective_scan_vjp(dy, dh, **arrays, delta_softplus=True)

    def scan(*given):
        named = dict(zip(arrays, given, strict=True))
        return backend.op("selective_scan").selective_scan(**named, delta_softplus=True, return_final_state=True)

    native = [backend.from_numpy(value) for value in arrays.values()]
    values, gradients = backend.vjp(scan, native, [backend.from_numpy(value) for value in (dy, dh)])
    for name, value, right in zip(("y", "final state"), values, expected, strict=True):
        assert_close(value, right, "float32", "value", name)
    for name, value in zip(arrays, gradients, strict=True):
        assert_close(value, wanted[name], "float32", "gradient", f"d{name}")
