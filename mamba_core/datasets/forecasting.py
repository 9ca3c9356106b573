"""A series that is forecast: a table with a row a time, with columns of values and of covariates.

The end of the series is held out. Means and deviations are of what stands before it, and no window of training reaches
into it. The contexts of its forecasts do, as far as they are then past.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core import figures, tasks
from mamba_core.architectures.base import is_number
from mamba_core.datasets import _labels
from mamba_core.datasets._series import Series, series_of, time_column
from mamba_core.datasets._tables import Table, read_table
from mamba_core.datasets.base import FRACTION, Data, Option, Source, predicted, record_of, recorded
from mamba_core.forecasting import forecast
from mamba_core.weights.formats import list_names
from mamba_core.wrappers import unwrap

DATA = "a .csv, .tsv or .jsonl table with a row a time: columns of values, and of covariates"
TIME = Option("time_column", "the column of times; by default time, date, timestamp or ds, else rows at even steps")
TARGETS = Option("target_columns", "the columns that are forecast; by default all others", several=True)
COVARIATES = Option("covariate_columns", "columns that are known beside them; by default none", several=True)
HORIZON = Option("horizon", "positions of a forecast; by default the config's, else 12", int)
SEASON = Option("season", "positions of a season; by default as the times tell, else 1", int)
OPTIONS = (TIME, TARGETS, COVARIATES, HORIZON, SEASON)
HELD_OUT = FRACTION
TEXTS = False
_HORIZON = 12  # where neither the option nor the config says one
_MEDIAN = 0.5
_STATISTICS = ("location", "scale", "covariate_location", "covariate_scale")


@dataclass
class Forecasting(Data):
    """series: what was read. end: its first position that is held out. season: in positions."""

    series: Any = None
    end: int = 0
    season: int = 1

    def metrics(self, outputs: np.ndarray) -> dict[str, float]:
        """mae and mase of the forecasts (windows, h, c) or (windows, h, c, q), over what a naive forecast has too."""
        return self._errors(in_units(self.config, point(self._task, np.asarray(outputs, np.float64))))

    def naive(self) -> np.ndarray:
        """(windows, h, c) the seasonal naive forecast: the last value known of the same phase of the season."""
        starts = self._starts()
        found = np.full((len(starts), self._task.horizon, self.series.values.shape[1]), np.nan)
        for window, start in enumerate(starts):
            found[window] = seasonal_naive(self.series.values[:start], self._task.horizon, self.season)
        return found

    def of_naive(self) -> dict[str, float]:
        return {f"naive_{name}": value for name, value in self._errors(self.naive()).items()}

    def draw(self, model: Any, folder: Path) -> list[Path]:
        """forecast.png: the held-out end, what was forecast of it, and the seasonal naive forecast."""
        outputs = np.asarray(predicted(model, self.held_out), np.float64)
        levels, naive = self._task.quantiles, self.naive()
        found = in_units(self.config, outputs, quantiles=levels is not None)
        middle = point(self._task, found)
        band = None if levels is None or len(levels) == 1 else (found[..., 0], found[..., -1])
        path, names = folder / "forecast.png", self.facts["targets"]
        shown = self.series.values[max(0, self.end - 2 * self.facts["length"]) :]
        figures.forecast(path, names, shown, len(self.series), self._starts(), middle, naive, band)
        return [path]

    @property
    def _task(self) -> Any:
        return tasks.of(self.config)

    def _starts(self) -> np.ndarray:
        return held_out_starts(len(self.series), self.end, self._task.horizon)

    def _errors(self, forecast: np.ndarray) -> dict[str, float]:
        """Of forecasts in units, (windows, h, c): each a mean over channels, mase over those that it is defined for."""
        truth = in_units(self.config, np.asarray(self.held_out["targets"], np.float64))
        counts = ~np.isnan(truth) & ~np.isnan(self.naive())
        errors = np.where(counts, np.abs(forecast - np.where(counts, truth, 0)), 0)
        channels = counts.any((0, 1))
        if not channels.any():
            return {}
        by_channel = errors.sum((0, 1))[channels] / counts.sum((0, 1))[channels]
        scale = self.naive_errors()[channels]
        found = {"mae": float(by_channel.mean())}
        if (defined := scale > 0).any():
            found["mase"] = float((by_channel[defined] / scale[defined]).mean())
        return found

    def naive_errors(self) -> np.ndarray:
        """(c,) what MASE divides by; 0 or NaN where it is not defined."""
        return naive_error(self.series.values[: self.end], self.season)


def seasonal_naive(past: np.ndarray, horizon: int, season: int) -> np.ndarray:
    """(horizon, c) the last value known of each phase of the season; NaN where there is none. past: (n, c)."""
    found = np.full((horizon, past.shape[1]), np.nan)
    for phase in range(min(season, horizon)):
        same = past[len(past) - season + phase :: -season] if len(past) - season + phase >= 0 else past[:0]
        for channel in range(past.shape[1]):
            known = same[:, channel][~np.isnan(same[:, channel])]
            if len(known):
                found[phase::season, channel] = known[0]
    return found


def naive_error(trained: np.ndarray, season: int) -> np.ndarray:
    """(c,) the mean absolute error in training of the value a season before: what MASE divides by.

    Hyndman and Koehler 2006. NaN where no two values are a season apart.
    """
    differences = np.abs(trained[season:] - trained[:-season])
    known = ~np.isnan(differences)
    with np.errstate(invalid="ignore"):
        return np.where(known, differences, 0).sum(0) / known.sum(0)


def held_out_starts(count: int, end: int, horizon: int) -> np.ndarray:
    """Where the forecasts of the held-out end begin: side by side, the last one ends with the series."""
    starts = np.arange(end, count, horizon)
    return np.minimum(starts, count - horizon)


def read(source: Source) -> Data:
    table = read_table(source.path)
    columns = _columns(table, source)
    config = _config(source, columns)
    horizon = tasks.of(config).horizon  # type: ignore[attr-defined]
    series, end = _divided(source, table, columns, horizon)
    season = _season(source, series, end)
    location, scale = _statistics(series.values[:end])
    beside, spread = _statistics(series.covariates[:end])
    values, covariates = (series.values - location) / scale, (series.covariates - beside) / spread
    sizes = {"length": source.length, "horizon": horizon}
    examples = _trained(source, values[:end], covariates[:end], **sizes)
    held = None
    if end < len(series):
        held = _windows(values, covariates, held_out_starts(len(series), end, horizon), counted=end, **sizes)
        if np.isnan(held["targets"]).all():
            raise ValueError(f"{source.path}: no value of the held-out end is known; hold out more")
    record = {
        "options": dict(zip((option.name for option in OPTIONS), (*columns.values(), horizon, season), strict=True)),
        **dict(zip(_STATISTICS, (each.tolist() for each in (location, scale, beside, spread)), strict=True)),
    }
    facts = {
        "positions": len(series), "held_out_positions": len(series) - end, "windows": len(examples["targets"]),
        "missing": int(np.isnan(series.values).sum()), "inserted": series.inserted, "step": series.clock.told,
        "season": season, **sizes, "targets": list(columns[TARGETS.name]),
    }  # fmt: skip
    data = Forecasting(recorded(source, config, held, record), examples, held, facts, {}, series, end, season)
    if held is not None:
        data.baseline = data.of_naive()
        names = np.array(columns[TARGETS.name])[~(data.naive_errors() > 0)].tolist()  # a NaN is not
        facts |= {"left out of mase": names} if names else {}
    return data


def _trained(source: Source, values: np.ndarray, covariates: np.ndarray, length: int, horizon: int) -> dict[str, Any]:
    """All windows of which a value of the context and a target are known."""
    starts = np.arange(length, len(values) - horizon + 1)
    examples = _windows(values, covariates, starts, length, horizon)
    kept = ~np.isnan(examples["targets"]).all((1, 2)) & examples["observed"].any((1, 2))
    if not kept.any():
        raise ValueError(
            f"{source.path}: {len(values)} positions are trained on, in which no window of {length} values (--length) "
            f"and {horizon} after them (--horizon) has what it needs; expected {length + horizon} at least. Give a "
            "smaller --length or --horizon, hold out less, or give more data"
        )
    return {name: array[kept] for name, array in examples.items()}


def _season(source: Source, series: Series, end: int) -> int:
    season = source.option(SEASON.name)
    if season is None:
        return series.clock.season if series.clock.season < end else 1
    if season < 1 or season >= end:
        raise ValueError(f"season is {season}; expected 1 to {end - 1}, fewer than the positions that are trained on")
    return season


def _columns(table: Table, source: Source) -> dict[str, Any]:
    """time_column, target_columns and covariate_columns."""
    time = time_column(table, source.option(TIME.name))
    covariates = [table.check_column(name, COVARIATES.flag) for name in source.option(COVARIATES.name) or ()]
    others = [name for name in table.columns if name != time and name not in covariates]
    targets = [table.check_column(name, TARGETS.flag) for name in source.option(TARGETS.name) or others]
    named = [*targets, *covariates, *([] if time is None else [time])]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(f"{list_names(twice)} named for two uses; expected each column for one")
    if not targets:
        raise ValueError(f"{table.path} has no column to forecast beside {list_names(named)}")
    return {TIME.name: time, TARGETS.name: targets, COVARIATES.name: covariates}


def _config(source: Source, columns: dict[str, Any]) -> Any:
    """The config with the sizes that the columns and the options say. Each window is normalised, if it says nothing."""
    own = source.config.task_options
    sizes = {"channels": len(columns[TARGETS.name]), "covariates": len(columns[COVARIATES.name])}
    if (horizon := source.option(HORIZON.name)) is not None or "horizon" not in own:
        sizes["horizon"] = _HORIZON if horizon is None else horizon
    for name, value in sizes.items():
        if name in own and own[name] != value:
            raise ValueError(f"the config has {name} {own[name]}, and the data and options {value}; expected the same")
    config = _labels.with_options(source.config, **({"instance_norm": True} | dict(own) | sizes))
    levels = tasks.of(config).quantiles  # type: ignore[attr-defined]
    if levels is not None and _MEDIAN not in levels:
        raise ValueError(f"the config has quantiles {levels}; expected {_MEDIAN} among them, which is measured")
    return config


def _divided(source: Source, table: Table, columns, horizon: int) -> tuple[Series, int]:
    """The series, with the file of its end behind it, and the first position that is held out."""
    series = series_of(table, *columns.values())
    if isinstance(source.held_out, Path):
        held = read_table(source.held_out)
        for name in (*columns[TARGETS.name], *columns[COVARIATES.name], *filter(None, [columns[TIME.name]])):
            held.check_column(name, "as --data has")
        names = [name for name in table.columns if name in held.columns]
        both = Table(source.held_out, {n: table.columns[n] + held.columns[n] for n in names}, table.lines + held.lines)
        end, series = len(series), series_of(both, *columns.values())
    else:
        end = len(series) - round((source.held_out or 0) * len(series))
    apart = len(series) - end
    if source.held_out and apart < horizon:
        raise ValueError(
            f"{source.held_out} holds out {apart} of {len(series)} positions, fewer than a forecast of {horizon} "
            "(--horizon); hold out more, or forecast fewer"
        )
    return series, end


def _statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the deviation of each column, (c,), of what is known; 1 for a deviation of zero."""
    known = ~np.isnan(values)
    count = np.maximum(known.sum(0), 1)
    location = np.where(known, values, 0).sum(0) / count
    scale = np.sqrt((np.where(known, values - location, 0) ** 2).sum(0) / count)
    return location, np.where(scale > 0, scale, 1.0)


def _windows(values, covariates, starts: np.ndarray, length: int, horizon: int, counted: int = 0) -> dict[str, Any]:
    """Examples whose forecasts begin at these positions. What is before the series is missing.

    counted: targets before that position are of no window; nor is a target of two.
    """
    channels = values.shape[1]
    before = starts[:, None] + np.arange(-length, 0)
    after = starts[:, None] + np.arange(horizon)
    targets = values[after] if len(starts) else np.empty((0, horizon, channels))
    if counted:
        done = np.maximum(counted, np.concatenate([[counted], starts[:-1] + horizon]))
        targets = np.where((after < done[:, None])[..., None], np.nan, targets)
    there = (before >= 0)[..., None]
    context, beside = np.where(there, values[before], np.nan), np.where(there, covariates[before], 0)
    inputs = np.concatenate([np.nan_to_num(context, nan=0.0), beside], -1)
    arrays = {"inputs": inputs.astype(np.float32), "targets": targets.astype(np.float32)}
    arrays["observed"] = ~np.isnan(context)
    # Where all counts no mask is given: some kernels take none.
    return arrays if there.all() else {**arrays, "mask": before >= 0}


def point(task: Any, forecast: np.ndarray) -> np.ndarray:
    """(..., h, c): the forecast itself, or its median."""
    return forecast if task.quantiles is None else forecast[..., task.quantiles.index(_MEDIAN)]


def in_units(config: Any, values: np.ndarray, quantiles: bool = False) -> np.ndarray:
    """Values (..., h, c), or (..., h, c, q) with quantiles, as the model has them, in the units of the series."""
    location, scale = (np.array(statistics(config)[name]) for name in ("location", "scale"))
    return values * scale[:, None] + location[:, None] if quantiles else values * scale + location


def statistics(config: Any) -> dict[str, list[float]]:
    """location, scale, covariate_location and covariate_scale, which the config records.

    Raises:
        ValueError: it does not.
    """
    record, task = record_of(config) or {}, tasks.of(config)
    found = {}
    for name in _STATISTICS:
        count = task.covariates if name.startswith("covariate") else task.channels  # type: ignore[attr-defined]
        value = record.get(name)
        if not isinstance(value, list) or len(value) != count or not all(map(is_number, value)):
            raise ValueError(
                f"the config does not record {name} of {count} columns: the model was not trained on a table; "
                "mamba_core.forecast takes its arrays"
            )
        found[name] = value
    return found


class Following(NamedTuple):
    """What follows a series. time: the name of the column of times. columns: of values (steps, columns)."""

    time: str
    times: list[str]
    columns: list[str]
    values: np.ndarray


def follow(model: Any, path: Path | str, steps: int | None = None) -> Following:
    """What a model that was trained on a table forecasts after the end of another one, or of the same.

    path: of a table with the same columns. steps: the model's horizon by default.

    Raises:
        ValueError: the model was not trained on a table, the table does not fit it, or there are covariates, which
            nobody knows beyond the first forecast.
        OSError: the table cannot be read.
    """
    config = unwrap(model, "a forecast").config
    tasks.check_forecasts(config, "a forecast")
    task: Any = tasks.of(config)
    known, record = statistics(config), record_of(config) or {}
    options = record.get("options") if isinstance(record.get("options"), Mapping) else {}
    table, length = read_table(Path(path)), record.get("length")
    source = Source(Path(path), config, None, length if type(length) is int else 1, 0, None, options or {})
    columns = _columns(table, source)
    series = series_of(table, *columns.values())
    if (series.values.shape[1], series.covariates.shape[1]) != (task.channels, task.covariates):
        raise ValueError(f"{path} has {series.values.shape[1]} columns of values; the model has {task.channels}")
    if steps is not None and task.covariates and steps > task.horizon:
        raise ValueError(
            f"steps is {steps}, and the covariates {list_names(columns[COVARIATES.name])} are not known after the "
            f"series; expected {task.horizon} at most, the model's horizon"
        )
    values = (series.values - known["location"]) / known["scale"]
    beside = (series.covariates - known["covariate_location"]) / known["covariate_scale"]
    if np.isnan(values[-source.length :]).all():
        raise ValueError(f"{path}: no value of the last {source.length} positions is known; expected one at least")
    covariates = beside[None, -source.length :] if task.covariates else None
    found = forecast(model, values[None, -source.length :], steps, covariates=covariates)[0].astype(np.float64)
    found = in_units(config, found, quantiles=task.quantiles is not None)
    times = [series.clock.time(len(series) + step) for step in range(len(found))]
    names = [
        name if level is None else f"{name} {level:g}"
        for name in columns[TARGETS.name]
        for level in task.quantiles or (None,)
    ]
    return Following(columns[TIME.name] or "position", times, names, found.reshape(len(found), -1))
