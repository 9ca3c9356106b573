"""What stands around the blocks of a forecaster: a series with missing values, normalised, and a forecast on its scale.

A series is values (b, l, i), of which the first channels are to be forecast and the others are covariates; observed
(b, l, c) says which of the first are there. The statistics of a row and channel are over what is observed at positions
that count (Kim et al. 2022, "Reversible Instance Normalization").
"""

import numpy as np

from mamba_core.spec.ops.base import NodeOp, counting


def _split(inputs, positions):
    """values and covariates, zero where they do not count, which of the values do, and their number in each row."""
    values, observed = inputs[:2]
    c, valid = observed.shape[-1], counting(values.shape, positions.mask)[..., None]
    counts = observed & valid
    return np.where(counts, values[..., :c], 0.0), np.where(valid, values[..., c:], 0.0), counts, counts.sum(1)


def _of_values(gradient: np.ndarray, like: np.ndarray, rest: np.ndarray | float = 0.0) -> np.ndarray:
    whole = np.zeros(like.shape)
    whole[..., : gradient.shape[-1]] = gradient
    whole[..., gradient.shape[-1] :] = rest
    return whole


def _location(inputs, parameters, settings, carried, positions):
    """The mean (b, c); 0 where nothing counts."""
    x, _, _, number = _split(inputs, positions)
    return x.sum(1) / np.maximum(number, 1), ()


def _location_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    _, _, counts, number = _split(inputs, positions)
    return [_of_values(counts * (dy / np.maximum(number, 1))[:, None], inputs[0]), None], {}, ()


def _deviations(inputs, positions):
    x, _, counts, number = _split(inputs, positions)
    return np.where(counts, x - inputs[2][:, None], 0.0), number


def _scale(inputs, parameters, settings, carried, positions):
    """The root of the variance plus eps, (b, c), of values, observed and location; 1 where nothing counts."""
    deviations, number = _deviations(inputs, positions)
    variance = (deviations**2).sum(1) / np.maximum(number, 1)
    return np.where(number, np.sqrt(variance + settings["eps"]), 1.0), ()


def _scale_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    deviations, number = _deviations(inputs, positions)
    scale, _ = _scale(inputs, parameters, settings, carried, positions)
    gradient = deviations * (dy / scale / np.maximum(number, 1))[:, None]
    return [_of_values(gradient, inputs[0]), None, -gradient.sum(1)], {}, ()


def _series(inputs, parameters, settings, carried, positions):
    """What is projected, (b, l, i'): values, zero where they are missing, covariates, and by choice which are there.

    inputs: values, observed, and where the values are normalised location and scale.
    """
    x, covariates, counts, _ = _split(inputs, positions)
    if len(inputs) > 2:
        x = np.where(counts, (x - inputs[2][:, None]) / inputs[3][:, None], 0.0)
    parts = [x, covariates, *([counts.astype(np.float64)] if settings["indicator"] else [])]
    return np.concatenate(parts, -1), ()


def _series_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    x, covariates, counts, _ = _split(inputs, positions)
    c, valid = x.shape[-1], counting(x.shape, positions.mask)[..., None]
    dx, rest = np.where(counts, dy[..., :c], 0.0), np.where(valid, dy[..., c : c + covariates.shape[-1]], 0.0)
    if len(inputs) == 2:
        return [_of_values(dx, inputs[0], rest), None], {}, ()
    location, scale = (value[:, None] for value in inputs[2:])
    dscale = (-dx * np.where(counts, x - location, 0.0) / scale**2).sum(1)
    return [_of_values(dx / scale, inputs[0], rest), None, -(dx / scale).sum(1), dscale], {}, ()


def _shaped(projected, settings):
    c, q = settings["channels"], settings["quantiles"]
    return projected.reshape(len(projected), settings["horizon"], c, *([q] if q else []))


def _of_rows(value, like):
    """(b, c) as a shape that is broadcast over (b, h, c) or (b, h, c, q)."""
    return value.reshape(len(value), 1, -1, *(1,) * (like.ndim - 3))


def _forecast(inputs, parameters, settings, carried, positions):
    """(b, h, c), or (b, h, c, q) of quantiles; inputs: (b, o), and where it is normalised location and scale."""
    y = _shaped(inputs[0], settings)
    return (y if len(inputs) == 1 else y * _of_rows(inputs[2], y) + _of_rows(inputs[1], y)), ()


def _forecast_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    if len(inputs) == 1:
        return [dy.reshape(inputs[0].shape)], {}, ()
    y, others = _shaped(inputs[0], settings), (1, *range(3, dy.ndim))
    return [(dy * _of_rows(inputs[2], y)).reshape(inputs[0].shape), dy.sum(others), (dy * y).sum(others)], {}, ()


NODES = {
    "series_location": NodeOp(_location, _location_vjp),
    "series_scale": NodeOp(_scale, _scale_vjp),
    "series": NodeOp(_series, _series_vjp),
    "forecast": NodeOp(_forecast, _forecast_vjp),
}
