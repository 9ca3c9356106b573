"""How the conformance suite compares, with one form of message."""

import numpy as np

from mamba_core.spec.tolerances import tolerance


def assert_close(value, reference, limit_dtype: str, kind: str, what: str, least: float = 0.0, **context) -> None:
    """The L2 error is at most the tolerance table's fraction of the reference's norm.

    The norm counts as at least that of an array of ones: the suite's inputs are of unit scale, so that a smaller result
    is a difference of larger numbers, whose rounding it keeps. It counts as at least `least` too.
    """
    value, reference = np.asarray(value).astype(np.float64), np.asarray(reference).astype(np.float64)
    assert value.shape == reference.shape, f"{what}: shape {value.shape}, expected {reference.shape} {_told(context)}"
    if not value.size:
        return
    assert np.isfinite(value).all(), (
        f"{what}: {np.count_nonzero(~np.isfinite(value))} values not finite {_told(context)}"
    )
    scale = max(np.linalg.norm(reference), np.sqrt(reference.size), least)
    error, limit = np.linalg.norm(value - reference) / scale, tolerance(limit_dtype, kind)
    worst = np.unravel_index(np.abs(value - reference).argmax(), value.shape)
    told = f"{error:.2e} exceeds {limit:.0e} ({limit_dtype} {kind})"
    assert error <= limit, (
        f"{what}: relative error {told}; worst at {tuple(map(int, worst))}: "
        f"{value[worst]:.9g}, expected {reference[worst]:.9g} {_told(context)}"
    )


def assert_zero(value, what: str) -> None:
    value = np.asarray(value).astype(np.float64)
    assert not value.any(), f"{what}: expected exact zeros, largest {np.abs(value).max():.3g}"


def _told(context: dict) -> str:
    return "".join(f"[{key}={value}]" for key, value in context.items())
