"""Task "forecasting": values that follow a series, see `mamba_core.tasks` and `mamba_core.spec.ops.series`."""

import jax
import jax.numpy as jnp

from mamba_core.backend import Forecast, State
from mamba_core.backends.jax import losses, model
from mamba_core.backends.jax.layers import in_dtype, projection
from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.pooling import pooled
from mamba_core.observe import reporting
from mamba_core.tasks.forecasting import EPS, VALUES


class Forecaster(model.Model):
    def __init__(self, config, options: Options):
        super().__init__(config, options)
        self.input_proj = projection(self.task.width, config.d_model, True, options)
        self.output_proj = projection(config.d_model, self.task.size, True, options)

    def __call__(
        self,
        values: jax.Array | None = None,
        state: State | None = None,
        *,
        observed=None,
        location=None,
        scale=None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Forecast:
        task, observe = self.task, reporting(observe)
        values, _ = task.given(values, None)
        extras = {"observed": observed, "location": location, "scale": scale}
        values, mask, segment_ids, extras = self._checked(values, mask, segment_ids, VALUES, **extras)
        observed, location, scale = extras.values()
        task.check_resumed(state, location)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        counts = _counting(values[..., : task.channels], observed, mask)
        if task.instance_norm and location is None:
            location, scale = _statistics(values[..., : task.channels], counts)
        if task.instance_norm:
            location, scale = observe("location", location), observe("scale", scale)
        series = observe("series", _series(task, values, counts, location, scale, mask))
        hidden = observe("input_proj", in_dtype(self.dtype, self.input_proj(series.astype(self.dtype))))
        hidden, state, _ = self._run_from(hidden, state, mask, segment_ids, observe)
        hidden = observe("pooled", pooled(hidden, "last", mask))
        y = observe("output_proj", self.output_proj(hidden))
        return Forecast(
            observe("forecast", _restored(task, in_dtype(jnp.float32, y), location, scale)), state, location, scale
        )


def loss(task, output: Forecast, targets: jax.Array, mask=None) -> jax.Array:
    """The task's loss over the targets (b, h, c) that are known, of the rows of which a position counts."""
    counts = ~jnp.isnan(targets)
    counts = counts if mask is None else counts & mask.any(1)[:, None, None]
    if task.quantiles is None:
        return losses.squared_error(output.forecast, targets, counts)
    return losses.pinball(output.forecast, targets, counts, task.quantiles)


def _counting(x, observed, mask):
    """(b, l, c) bool: the values that are there, at positions that count."""
    counts = jnp.ones_like(x, bool) if observed is None else observed
    return counts if mask is None else counts & mask[..., None]


def _statistics(x, counts):
    """The mean and the deviation of each row and channel, (b, c)."""
    number = counts.sum(1)
    divisor = jnp.maximum(number, 1)
    location = jnp.where(counts, x, 0.0).sum(1) / divisor
    deviations = jnp.where(counts, jnp.where(counts, x, 0.0) - location[:, None], 0.0)
    scale = jnp.sqrt(jnp.square(deviations).sum(1) / divisor + EPS)
    return location, jnp.where(number > 0, scale, 1.0)


def _series(task, values, counts, location, scale, mask):
    """What is projected: values, covariates, and by choice which values are there."""
    x = jnp.where(counts, values[..., : task.channels], 0.0)
    if task.instance_norm:
        x = jnp.where(counts, (x - location[:, None]) / scale[:, None], 0.0)
    covariates = values[..., task.channels :]
    covariates = covariates if mask is None else jnp.where(mask[..., None], covariates, 0.0)
    return jnp.concatenate([x, covariates, *([counts.astype(x.dtype)] if task.indicator else [])], -1)


def _restored(task, y, location, scale):
    """(b, h, c), or (b, h, c, q), on the scale of the series."""
    levels = (len(task.quantiles),) if task.quantiles else ()
    y = y.reshape(-1, task.horizon, task.channels, *levels)
    if not task.instance_norm:
        return y
    shape = (-1, 1, task.channels, *(1 for _ in levels))
    return y * scale.reshape(shape) + location.reshape(shape)


Model = Forecaster
