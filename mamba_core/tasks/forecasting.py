"""Forecasting: from a series of numbers, without an embedding, to the values that follow it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from mamba_core.architectures.base import is_bool, is_int, is_number, is_size
from mamba_core.backend import Forecast, State
from mamba_core.spec import losses
from mamba_core.spec.graph import NOTHING, Node
from mamba_core.spec.init import uniform, zeros
from mamba_core.spec.ops.base import counting, expect_floats, expect_shape, shape_of
from mamba_core.spec.params import Parameter
from mamba_core.tasks import base

VALUES, OBSERVED, LOCATION, SCALE = "values", "observed", "location", "scale"
INPUT, OUTPUT = "input_proj", "output_proj"
EPS = 1e-5  # added to the variance


@dataclass(frozen=True)
class Task(base.Task):
    """A model is called with values (b, l, i) of any float dtype and gives a `Forecast`.

    model(values, state=None, *, observed=None, location=None, scale=None, mask=None). The first `channels` of the
    values are forecast, the others are covariates. observed (b, l, c) bool is False where a value is missing, which may
    be not a number. A forecast is of what follows the last position that counts. With `instance_norm` a call that goes
    on from a state is given location and scale (b, c) of the output before it.

    Targets are (b, h, c); one that is not a number is not known, and does not count.

    Attributes:
        channels: how many are forecast.
        covariates: how many more are given with each position.
        horizon: how many positions are forecast.
        quantiles: the forecast is (b, h, c, q), a quantile each, and the loss is the pinball loss; by default it is
            (b, h, c), and the loss is the mean squared error.
        instance_norm: each row and channel is normalised by its own mean and deviation, and the forecast is brought
            back to its scale. The statistics are over what is observed at positions that count.
        indicator: channels that say which values are there are given to the model too.
    """

    inputs: ClassVar[str] = VALUES
    extras: ClassVar[tuple[str, ...]] = (OBSERVED, LOCATION, SCALE)
    trains: ClassVar[bool] = True
    labelled: ClassVar[bool] = True
    forecasts: ClassVar[bool] = True
    float32: ClassVar[bool] = True
    output: ClassVar[type] = Forecast
    marks: ClassVar[tuple[str, ...]] = (f"{INPUT}.weight",)

    channels: int = 1
    covariates: int = 0
    horizon: int = 1
    quantiles: tuple[float, ...] | None = None
    instance_norm: bool = False
    indicator: bool = False

    def __post_init__(self) -> None:
        for name in ("channels", "horizon"):
            self._expect(name, is_size(getattr(self, name)), "an integer from 1")
        self._expect("covariates", is_int(self.covariates) and self.covariates >= 0, "an integer from 0")
        for name in ("instance_norm", "indicator"):
            self._expect(name, is_bool(getattr(self, name)), "true or false")
        levels = self.quantiles if isinstance(self.quantiles, tuple) else ()
        between = all(is_number(level) and 0 < level < 1 for level in levels)
        rising = bool(levels) and between and all(a < b for a, b in pairwise(levels))
        self._expect("quantiles", self.quantiles is None or rising, "rising numbers between 0 and 1")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {base.shown(getattr(self, name))}; expected {expected}")

    @property
    def width(self) -> int:
        """How many channels are projected."""
        return self.channels * (2 if self.indicator else 1) + self.covariates

    @property
    def size(self) -> int:
        """How many numbers are forecast for a row."""
        return self.horizon * self.channels * len(self.quantiles or (1,))

    @property
    def of_rows(self) -> tuple[str, ...]:
        return LOCATION, SCALE, "pooled", OUTPUT, "forecast"

    @property
    def resumes(self) -> bool:
        return not self.instance_norm

    def before(self, config: Any) -> Iterator[Parameter]:
        d, bound = config.d_model, self.width**-0.5
        yield Parameter(f"{INPUT}.weight", "di", (d, self.width), uniform(bound), mup_role="input")
        yield Parameter(f"{INPUT}.bias", "d", (d,), zeros, decay=False)

    def after(self, config: Any) -> Iterator[Parameter]:
        yield from super().after(config)
        d = config.d_model
        yield Parameter(f"{OUTPUT}.weight", "od", (self.size, d), uniform(d**-0.5), mup_role="output")
        yield Parameter(f"{OUTPUT}.bias", "o", (self.size,), zeros, decay=False)

    def opening(self, config: Any) -> Iterator[Node]:
        series = (VALUES, OBSERVED)
        if self.instance_norm:
            yield Node(LOCATION, "series_location", series)
            yield Node(SCALE, "series_scale", (*series, LOCATION), settings={"eps": EPS})
        yield Node("series", "series", series + self._statistics, settings={"indicator": self.indicator})
        yield Node(INPUT, "linear", ("series",), _linear(INPUT))

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        norm, _ = super().closing(config, residual)
        yield norm
        yield Node("pooled", "pooled", ("norm_f",), settings={"pooling": "last"})
        yield Node(OUTPUT, "linear", ("pooled",), _linear(OUTPUT))
        sizes = {"horizon": self.horizon, "channels": self.channels, "quantiles": len(self.quantiles or ())}
        yield Node("forecast", "forecast", (OUTPUT, *self._statistics), settings=sizes)

    @property
    def _statistics(self) -> tuple[str, ...]:
        return (LOCATION, SCALE) if self.instance_norm else ()

    def given(self, inputs: Any, inputs_embeds: Any) -> tuple[Any, str]:
        if inputs is None or inputs_embeds is not None:
            raise TypeError(f"expected {VALUES}; {'none' if inputs is None else 'inputs_embeds'} given")
        return inputs, VALUES

    def check(
        self,
        config: Any,
        inputs: Any,
        mask: Any,
        segment_ids: Any,
        kind: str | None = None,
        extras: Mapping[str, Any] = NOTHING,
    ) -> None:
        """Check the arguments of a model's call, the extras too."""
        batch, length, _ = shape_of(VALUES, inputs, ("b", "l", "i"))
        expect_shape(VALUES, inputs, (batch, length, self.channels + self.covariates), "(b, l, channels + covariates)")
        expect_floats({VALUES: inputs})
        self._check_positions(config, batch, length, mask, segment_ids)
        observed = extras.get(OBSERVED)
        expect_shape(OBSERVED, observed, (batch, length, self.channels), "(b, l, channels)")
        if observed is not None and "bool" not in str(observed.dtype):
            raise TypeError(f"{OBSERVED} is {observed.dtype}; expected bool, True where a value is there")
        for name in (LOCATION, SCALE):
            expect_shape(name, extras.get(name), (batch, self.channels), "(b, channels)")
        expect_floats({name: extras.get(name) for name in (LOCATION, SCALE)})
        found = [name for name in (LOCATION, SCALE) if extras.get(name) is not None]
        if len(found) == 1 or (found and not self.instance_norm):
            expected = "both or neither" if self.instance_norm else "none, for instance_norm is False"
            raise ValueError(f"{' and '.join(found)} given; expected {expected}")

    def check_resumed(self, state: Any, location: Any) -> None:
        """Check that a call which goes on from a state knows the scale of what came before it.

        Raises:
            ValueError: it does not.
        """
        if self.instance_norm and state is not None and location is None:
            raise ValueError(
                "a state is given, but neither location nor scale; with instance_norm a call goes on with those of the "
                "output before it"
            )

    def beginnings(
        self, config: Any, inputs: Any, kind: str, mask: Any, extras: Mapping[str, Any] = NOTHING
    ) -> dict[str, np.ndarray]:
        values = np.asarray(inputs).astype(np.float64)
        observed = extras.get(OBSERVED)
        observed = np.ones((*values.shape[:2], self.channels), bool) if observed is None else np.asarray(observed)
        known = np.concatenate([observed, np.ones((*values.shape[:2], self.covariates), bool)], -1)
        if not np.isfinite(values[known & counting(values.shape, mask)[..., None]]).all():
            raise ValueError(
                f"{VALUES} holds numbers that are not finite where they count; mark missing ones in observed"
            )
        found = {VALUES: values, OBSERVED: observed}
        return found | {name: np.asarray(extras[name], np.float64) for name in (LOCATION, SCALE) if name in extras}

    def draw(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        drawn = rng.standard_normal((batch, length, self.channels + self.covariates))
        return (1.0 + 2.0 * drawn).astype(np.float32)

    def draw_extras(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> dict[str, np.ndarray]:
        return {OBSERVED: rng.random((batch, length, self.channels)) < 0.8}

    def result(self, nodes: dict[str, np.ndarray], state: State) -> Forecast:
        return Forecast(nodes["forecast"], state, nodes.get(LOCATION), nodes.get(SCALE))

    def loss(self, config: Any, output: np.ndarray, targets: Any, mask: Any = None) -> tuple[float, np.ndarray]:
        """Mean error of a forecast over the targets that are known, of rows of which a position counts."""
        counts = self._counting(np.asarray(targets), mask)
        if self.quantiles is None:
            return losses.squared_error(output, targets, counts)
        return losses.pinball(output, targets, counts, self.quantiles)

    def draw_targets(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        drawn = rng.standard_normal((batch, self.horizon, self.channels))
        return np.where(rng.random(drawn.shape) < 0.2, np.nan, drawn).astype(np.float32)

    def checked_targets(self, config: Any, shape: tuple[int, int], targets: np.ndarray) -> np.ndarray:
        expect_shape("targets", targets, (shape[0], self.horizon, self.channels), "(b, horizon, channels)")
        targets = targets.astype(np.float32)
        if np.isinf(targets).any():
            raise ValueError("targets holds infinite numbers; expected finite ones, or NaN where one is not known")
        return targets

    def weight(self, config: Any, targets: np.ndarray, mask: np.ndarray | None) -> float:
        return float(self._counting(targets, mask).sum())

    @staticmethod
    def _counting(targets: np.ndarray, mask: Any) -> np.ndarray:
        known = ~np.isnan(targets)
        return known if mask is None else known & np.asarray(np.asarray(mask).any(1))[:, None, None]


def _linear(name: str) -> dict[str, str]:
    return {"weight": f"{name}.weight", "bias": f"{name}.bias"}
