"""Task "forecasting": values that follow a series, see `mamba_core.tasks` and `mamba_core.spec.ops.series`."""

import torch
from torch import Tensor, nn

from mamba_core.backend import Forecast, State
from mamba_core.backends.torch import losses, model
from mamba_core.backends.torch.arrays import at_least_float32, dtype_of
from mamba_core.backends.torch.pooling import pooled
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.tasks.forecasting import EPS, VALUES


class Forecaster(model.Model):
    def __init__(self, config, policy: Kernels):
        super().__init__(config, policy)
        self.input_proj = nn.Linear(self.task.width, config.d_model)
        self.output_proj = nn.Linear(config.d_model, self.task.size)

    def forward(
        self,
        values: Tensor | None = None,
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
        self._check(values, mask, segment_ids, VALUES, observed=observed, location=location, scale=scale)
        task.check_resumed(state, location)
        values = at_least_float32(values)
        counts = _counting(values[..., : task.channels], observed, mask)
        if task.instance_norm and location is None:
            location, scale = _statistics(values[..., : task.channels], counts)
        if task.instance_norm:
            location, scale = observe("location", location), observe("scale", scale)
        series = observe("series", _series(task, values, counts, location, scale, mask))
        hidden = observe("input_proj", self.input_proj(series.to(dtype_of(self.dtype))))
        hidden, state = self._run_from(hidden, state, mask, segment_ids, observe)
        hidden = observe("pooled", pooled(hidden, "last", mask))
        y = observe("output_proj", self.output_proj(hidden))
        return Forecast(
            observe("forecast", _restored(task, at_least_float32(y), location, scale)), state, location, scale
        )


def loss(task, output: Forecast, targets: Tensor, mask=None) -> Tensor:
    """The task's loss over the targets (b, h, c) that are known, of the rows of which a position counts."""
    counts = ~targets.isnan()
    counts = counts if mask is None else counts & mask.any(1)[:, None, None]
    if task.quantiles is None:
        return losses.squared_error(output.forecast, targets, counts)
    return losses.pinball(output.forecast, targets, counts, task.quantiles)


def _counting(x, observed, mask):
    """(b, l, c) bool: the values that are there, at positions that count."""
    counts = torch.ones_like(x, dtype=torch.bool) if observed is None else observed
    return counts if mask is None else counts & mask[..., None]


def _statistics(x, counts):
    """The mean and the deviation of each row and channel, (b, c)."""
    number = counts.sum(1)
    divisor = number.clamp(min=1)
    location = torch.where(counts, x, 0.0).sum(1) / divisor
    deviations = torch.where(counts, torch.where(counts, x, 0.0) - location[:, None], 0.0)
    scale = (deviations.square().sum(1) / divisor + EPS).sqrt()
    return location, torch.where(number > 0, scale, 1.0)


def _series(task, values, counts, location, scale, mask):
    """What is projected: values, covariates, and by choice which values are there."""
    x = torch.where(counts, values[..., : task.channels], 0.0)
    if task.instance_norm:
        x = torch.where(counts, (x - location[:, None]) / scale[:, None], 0.0)
    covariates = values[..., task.channels :]
    covariates = covariates if mask is None else torch.where(mask[..., None], covariates, 0.0)
    return torch.cat([x, covariates, *([counts.to(x.dtype)] if task.indicator else [])], -1)


def _restored(task, y, location, scale):
    """(b, h, c), or (b, h, c, q), on the scale of the series."""
    levels = (len(task.quantiles),) if task.quantiles else ()
    y = y.reshape(-1, task.horizon, task.channels, *levels)
    if not task.instance_norm:
        return y
    shape = (-1, 1, task.channels, *(1 for _ in levels))
    return y * scale.reshape(shape) + location.reshape(shape)


Model = Forecaster
