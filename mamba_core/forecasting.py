"""Forecasts of a series: in one call, or by going on from what was forecast."""

from typing import Any

import numpy as np

from mamba_core import architectures, registry, tasks
from mamba_core.wrappers import unwrap

_MEDIAN = 0.5


def forecast(
    model: Any,
    values: Any,
    steps: int | None = None,
    *,
    covariates: Any = None,
    future_covariates: Any = None,
    observed: Any = None,
    mask: Any = None,
    stride: int | None = None,
) -> np.ndarray:
    """The values that follow each row of a series.

    Up to the model's horizon they are the direct forecast. Beyond it they are rolled out: the model goes on from its
    state with its own forecast as values, or with its median where it forecasts quantiles.

    Args:
        model: of a task that forecasts.
        values: (b, l, c) numbers, the latest last; NaN for a missing one unless `observed` is given.
        steps: how many positions to forecast; the model's horizon by default.
        covariates: (b, l, k), for a model that takes k of them.
        future_covariates: (b, at least steps less the last forecast, k), those of the positions that are rolled out.
        observed: (b, l, c) bool, False where a value is missing.
        mask: (b, l) bool, False at padding, on either side.
        stride: how many positions of a forecast are fed back before the next one; all of them by default.

    Returns:
        (b, steps, c) float32, or (b, steps, c, q) of q quantiles.

    Raises:
        TypeError: this is no model of this library, or an array is of another kind of dtype.
        ValueError: the model does not forecast, an array has another shape, a row has no position that counts, steps or
            stride are out of range, or a rollout has no median, no covariates, or an architecture without a state.
    """
    model = unwrap(model, "a forecast")
    tasks.check_forecasts(model.config, "a forecast")
    task: Any = tasks.of(model.config)
    steps = task.horizon if steps is None else _expect("steps", steps, None)
    stride = task.horizon if stride is None else _expect("stride", stride, task.horizon)
    values = _series("values", values, task.channels)
    observed = ~np.isnan(values) if observed is None else np.asarray(observed)
    series = _joined(values, covariates, task.covariates)
    mask = _checked_mask(mask, values.shape[:2])
    task.check(model.config, series, mask, None, extras={"observed": observed})
    task.check_values(model.config, series, mask, {"observed": observed})
    rounds = max(0, -(-(steps - task.horizon) // stride))
    if rounds:
        _check_rolls(model.config, task)
        future = _future(future_covariates, task.covariates, len(values), rounds * stride)
    backend, pieces = registry.get(model.backend), []
    out = backend.infer(model, series, observed=observed, mask=mask)
    for done in range(0, rounds * stride, stride):
        piece = backend.to_numpy(out.forecast)[:, :stride]
        pieces.append(piece)
        fed = piece if task.quantiles is None else piece[..., task.quantiles.index(_MEDIAN)]
        fed = np.concatenate([fed, future[:, done : done + stride]], -1)
        out = backend.infer(model, fed, out.state, location=out.location, scale=out.scale)
    pieces.append(backend.to_numpy(out.forecast))
    return np.concatenate(pieces, 1)[:, :steps]


def _expect(name: str, value: Any, most: int | None) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        raise ValueError(f"{name} is {value!r}; expected an integer from 1{'' if most is None else f' to {most}'}")
    return value


def _series(name: str, values: Any, channels: int) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "fiu" or values.ndim != 3 or values.shape[2] != channels:
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}; expected numbers (b, l, {channels})")
    return values.astype(np.float32)


def _joined(values: np.ndarray, covariates: Any, count: int) -> np.ndarray:
    """values with their covariates."""
    name = "covariates"
    if count == 0 and covariates is None:
        return values
    if covariates is None:
        raise ValueError(f"{name} are missing; expected (b, l, {count}), as the model takes them")
    found = _series(name, covariates, count)
    if found.shape[:2] != values.shape[:2]:
        raise ValueError(f"{name} has shape {found.shape}; expected {(*values.shape[:2], count)}")
    return np.concatenate([values, found], -1)


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    mask = None if mask is None else np.asarray(mask)
    counts = np.ones(shape, bool) if mask is None or mask.shape != shape else mask
    if not counts.any(1).all():
        raise ValueError(f"row {int(np.argmin(counts.any(1)))} has no position that counts; expected one at least")
    return mask


def _check_rolls(config: Any, task: Any) -> None:
    if not architectures.traits(config).steps:
        raise ValueError(
            f"{config.architecture} carries no state to go on from; expected steps up to the horizon, {task.horizon}"
        )
    if task.quantiles is not None and _MEDIAN not in task.quantiles:
        raise ValueError(f"quantiles are {task.quantiles}; expected {_MEDIAN} among them, which a rollout feeds back")


def _future(covariates: Any, count: int, batch: int, length: int) -> np.ndarray:
    if count == 0 and covariates is None:
        return np.zeros((batch, length, 0), np.float32)
    if covariates is None:
        raise ValueError(f"future_covariates are missing; expected (b, {length}, {count}) for this rollout")
    found = _series("future_covariates", covariates, count)
    if len(found) != batch or found.shape[1] < length:
        raise ValueError(f"future_covariates has shape {found.shape}; expected ({batch}, at least {length}, {count})")
    return found
