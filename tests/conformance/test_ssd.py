"""What holds of the recurrence of Mamba-2 alone, on every kernel: long steps, infinite rates, limits and refusals."""

import math

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.ops import ssd

from .assertions import assert_close
from .test_ops import runnable

SIZES = (2, 150, 4, 3, 2, 5)  # b, l, h, p, g, n


def drawn(seed=0, sizes=SIZES) -> dict[str, np.ndarray]:
    rng, (b, l, h, p, g, n) = np.random.default_rng(seed), sizes
    arrays = {"x": rng.normal(size=(b, l, h, p)), "dt": rng.uniform(0.01, 1.0, (b, l, h))}
    arrays |= {"A": -rng.uniform(0.5, 2.0, h), "B": rng.normal(size=(b, l, g, n)), "C": rng.normal(size=(b, l, g, n))}
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def check(backend, arrays, options=None, positions=None, kind="value"):
    """Values and gradients of every kernel that runs here equal the reference's."""
    options, positions = options or {}, positions or {}
    given = arrays | options | positions
    expected = ssd.ssd(**given, return_final_state=True)
    cotangents = [np.random.default_rng(1).normal(size=value.shape).astype(np.float32) for value in expected]
    wanted = ssd.ssd_vjp(*cotangents, **given)
    native = {name: backend.from_numpy(value) for name, value in positions.items()}
    for kernel in runnable(backend, "ssd"):

        def run(*values, kernel=kernel):
            named = dict(zip(arrays, values, strict=True)) | options | native
            return backend.op("ssd").ssd(**named, kernel=kernel, return_final_state=True)

        inputs = [backend.from_numpy(value) for value in arrays.values()]
        found, gradients = backend.vjp(run, inputs, [backend.from_numpy(value) for value in cotangents])
        for what, value, right in zip(("y", "final state"), found, expected, strict=True):
            assert np.isfinite(right).all()
            assert_close(value, right, "float32", kind, f"{kernel}: {what}")
        for name, gradient in zip(arrays, gradients, strict=True):
            assert_close(gradient, wanted[name], "float32", "gradient", f"{kernel}: gradient of {name}")


def test_short_steps_after_a_long_one_keep_their_digits(backend):
    """A difference of two sums that hold the long step has lost the short ones."""
    arrays = drawn()
    arrays["A"][:] = -8.0
    arrays["dt"][:] = 1e-4
    arrays["dt"][:, ::7] = 10.0
    check(backend, arrays)


def test_a_rate_of_minus_infinity_forgets_at_every_position_that_counts(backend):
    arrays = drawn()
    arrays["A"][[0, 2]] = -np.inf
    mask = np.random.default_rng(2).random(SIZES[:2]) < 0.8
    check(backend, arrays)
    check(backend, arrays, positions={"mask": mask})


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.1, 0.4), (0.3, 0.3), (0.0, 0.0)])
def test_steps_beyond_the_limit_are_the_limit_and_have_no_gradient(backend, limit):
    check(backend, drawn(), {"dt_limit": limit})


def test_a_negative_step_without_softplus_is_zero(backend):
    arrays = drawn()
    arrays["dt"][:, ::3] *= -1
    check(backend, arrays)


def test_a_segment_that_comes_again_is_another(backend):
    rng = np.random.default_rng(3)
    segment_ids = np.repeat(rng.integers(0, 2, (SIZES[0], 15)), 10, axis=1).astype(np.int32)
    check(backend, drawn(), positions={"segment_ids": segment_ids})


def test_masked_positions_do_not_leak_what_is_not_finite(backend):
    arrays = drawn()
    mask = np.random.default_rng(4).random(SIZES[:2]) < 0.7
    spoilt = {
        name: value
        if name == "A"
        else np.where(mask.reshape(*mask.shape, *(1,) * (value.ndim - 2)), value, np.float32("nan"))
        for name, value in arrays.items()
    }
    for kernel in runnable(backend, "ssd"):
        runs = []
        for given in (arrays, spoilt):
            native = {name: backend.from_numpy(value) for name, value in (given | {"mask": mask}).items()}
            found = backend.op("ssd").ssd(**native, kernel=kernel, return_final_state=True)
            runs.append([backend.to_numpy(value) for value in found])
        for clean, value in zip(*runs, strict=True):
            np.testing.assert_array_equal(value, clean)


def test_a_later_chunk_forgets_a_segment_that_was_not_finite(backend):
    arrays = drawn(sizes=(1, 400, 2, 3, 1, 4))
    arrays["x"][0, 5] = np.inf
    segment_ids = (np.arange(400) >= 10).astype(np.int32)[None]
    for kernel in runnable(backend, "ssd"):
        native = {name: backend.from_numpy(value) for name, value in (arrays | {"segment_ids": segment_ids}).items()}
        y, h = backend.op("ssd").ssd(**native, kernel=kernel, return_final_state=True)
        assert np.isfinite(backend.to_numpy(y)[:, 64:]).all()
        assert np.isfinite(backend.to_numpy(h)).all()


BAD = {
    "x": ((0, 5, 4, 3), "batch 0"),
    "dt": ((2, 5, 3), r"dt has shape \(2, 5, 3\); expected \(b, l, h\) = \(2, 5, 4\)"),
    "A": ((4, 2), r"A has shape \(4, 2\); expected \(h\)"),
    "B": ((2, 5, 3, 6), "4 heads and B 3 groups"),
    "C": ((2, 5, 2, 5), r"C has shape"),
    "D": ((4, 2), r"D has shape \(4, 2\); expected \(h, p\)"),
    "z": ((2, 5, 4), "z has shape"),
    "dt_bias": ((3,), "dt_bias has shape"),
    "initial_state": ((2, 4, 6, 3), r"initial_state has shape .*\(b, h, p, n\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_faults_of_the_arguments_are_named(backend, name):
    good = {"x": (2, 5, 4, 3), "dt": (2, 5, 4), "A": (4,), "B": (2, 5, 2, 6), "C": (2, 5, 2, 6)}
    shape, words = BAD[name]
    arrays = {key: backend.from_numpy(np.ones(size, np.float32)) for key, size in (good | {name: shape}).items()}
    with pytest.raises(ValueError, match=words):
        mc.ssd(**arrays)
    with pytest.raises(ValueError, match=words):
        mc.ssd(**{key: np.ones(size, np.float32) for key, size in (good | {name: shape}).items()})


@pytest.mark.parametrize("limit", [(-1.0, 1.0), (1.0, 0.5), (0.0,), 3.0, (0.0, math.nan), ("0", "1")])
def test_a_limit_that_is_none_is_refused(backend, limit):
    arrays = {name: backend.from_numpy(value) for name, value in drawn().items()}
    with pytest.raises(ValueError, match=r"dt_limit is .*expected two numbers, 0 <= least <= most"):
        mc.ssd(**arrays, dt_limit=limit)


def test_a_step_needs_a_state(backend):
    arrays = {name: backend.from_numpy(value if name == "A" else value[:, 0]) for name, value in drawn().items()}
    with pytest.raises(ValueError, match=r"ssd_step needs state=\(b, h, p, n\); start from zeros"):
        mc.ssd_step(**arrays, state=None)
