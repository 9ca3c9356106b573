"""Series from tables: their times, at even steps, and their values, with what is missing as NaN."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np

from mamba_core.datasets._tables import Table
from mamba_core.weights.formats import list_names

MISSING = ("", "nan", "na", "null", "none")
_USUAL_TIMES = ("time", "date", "datetime", "timestamp", "ds", "month", "year")
# Seconds of a step -> how many are a season.
_SEASONS = {60: 60, 900: 96, 1800: 48, 3600: 24, 86400: 7, 604800: 52}
_MONTHS = 12
_MOST_INSERTED = 10  # for each row that is there


@dataclass(frozen=True)
class Clock:
    """Times at even steps: those of months, of a duration, or of numbers.

    first: the time of position 0. step: a timedelta, a number, or a number of months where `monthly`.
    """

    first: datetime | float
    step: Any
    monthly: bool = False

    def time(self, position: int) -> str:
        """As text."""
        if not isinstance(self.first, datetime):
            return _shown(self.first + position * self.step)
        at = _month_after(self.first, position * self.step) if self.monthly else self.first + position * self.step
        days = self.monthly or self.step % timedelta(days=1) == timedelta(0)
        return _shown(at) if days else at.isoformat()

    @property
    def season(self) -> int:
        """How many positions a season has: a day of hours, a week of days, a year of months; 1 where nothing tells."""
        if self.monthly:
            return max(1, _MONTHS // self.step)
        return _SEASONS.get(int(self.step.total_seconds()), 1) if isinstance(self.step, timedelta) else 1

    @property
    def told(self) -> str:
        if self.monthly:
            return f"{self.step} month{'s' if self.step > 1 else ''}"
        return str(self.step)


@dataclass(frozen=True)
class Series:
    """values: (n, c) float64, NaN where missing. covariates: (n, k) float64. inserted: positions without a row."""

    values: np.ndarray
    covariates: np.ndarray
    clock: Clock
    inserted: int

    def __len__(self) -> int:
        return len(self.values)


def time_column(table: Table, given: str | None) -> str | None:
    """The column of times; None where the table has none: its rows are at even steps then."""
    if given is not None:
        return table.check_column(given, "--time-column")
    by_name = {name.lower(): name for name in reversed(table.columns)}
    return next((by_name[name] for name in _USUAL_TIMES if name in by_name), None)


def series_of(table: Table, time: str | None, targets: Sequence[str], covariates: Sequence[str]) -> Series:
    """The series of a table's columns.

    Raises:
        ValueError: a value is no number, a covariate is missing, a column has no value, or times do not rise by even
            steps.
    """
    values = _numbers(table, targets, missing=True)
    if empty := [name for name, column in zip(targets, values.T, strict=True) if np.isnan(column).all()]:
        raise ValueError(f"{table.path}: {list_names(empty)} has no value at all; expected numbers")
    beside = _numbers(table, covariates, missing=False)
    if time is None:
        return Series(values, beside, Clock(0, 1), 0)
    clock, positions = _clock(table, time)
    inserted = int(positions[-1]) + 1 - len(table)
    if inserted and covariates:
        raise _uneven(table, time, positions, clock, f"the covariates {list_names(covariates)} are not known there")
    if inserted > _MOST_INSERTED * len(table):
        raise _uneven(table, time, positions, clock, "most of the series would be missing")
    filled = np.full((int(positions[-1]) + 1, len(targets)), np.nan)
    filled[positions] = values
    return Series(filled, beside, clock, inserted)


def _numbers(table: Table, names: Sequence[str], missing: bool) -> np.ndarray:
    """(rows, names) float64."""
    found = np.empty((len(table), len(names)))
    for column, name in enumerate(names):
        for row, value in enumerate(table.columns[name]):
            found[row, column] = _number(table, row, name, value)
            if not missing and math.isnan(found[row, column]):
                raise ValueError(
                    f"{table.at(row)}: the covariate {name} is missing; fill it in, or leave the covariate out"
                )
    return found


def _number(table: Table, row: int, name: str, value: Any) -> float:
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return math.nan
    try:
        if isinstance(value, (bool, list, dict)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{table.at(row)}: {name} is {value!r:.80}; expected a number, or nothing") from None
    if math.isinf(number) or abs(number) > np.finfo(np.float32).max:
        raise ValueError(f"{table.at(row)}: {name} is {value!r:.80}; expected a number that float32 holds")
    return number


def _clock(table: Table, column: str) -> tuple[Clock, np.ndarray]:
    """The clock of a table's times, and the position of each row."""
    times = _times(table, column)
    for row in range(1, len(times)):
        if not times[row] > times[row - 1]:
            raise ValueError(
                f"{table.at(row)}: {column} is {_shown(times[row])}, which is not after {_shown(times[row - 1])} of "
                "the row before it; expected rows in the order of time, one a time"
            )
    if len(times) < 2:
        raise ValueError(f"{table.path}: has one row; expected a series of several")
    if (months := _months(times)) is not None:
        step = int(np.diff(months).min())
        clock, distances = Clock(times[0], step, monthly=True), (months - months[0]) / step
    else:
        step = min(after - before for before, after in pairwise(times))
        clock, distances = Clock(times[0], step), np.array([(each - times[0]) / step for each in times])
    positions = np.rint(distances).astype(np.int64)
    off = np.abs(distances - positions) > 1e-6 * np.maximum(1, positions)
    if off.any():
        raise _uneven(table, column, positions, clock, "it is no whole number of steps", int(np.argmax(off)))
    return clock, positions


def _uneven(table: Table, column: str, positions, clock: Clock, why: str, row: int | None = None) -> ValueError:
    row = int(np.argmax(np.diff(positions) != 1)) + 1 if row is None else row
    return ValueError(
        f"{table.at(row)}: {column} is not a step after the row before it ({why}); the step is {clock.told}. Expected "
        "times at even steps: resample the series"
    )


def _times(table: Table, column: str) -> list[Any]:
    """Dates, or numbers; 20240131 is a date."""
    values = table.columns[column]
    try:
        if all(len(str(value).strip()) == len("20240131") for value in values):
            return [datetime.fromisoformat(str(value).strip()) for value in values]
    except ValueError:
        pass
    try:
        found: list[Any] = [float(value) for value in values]
        if not all(map(math.isfinite, found)):
            raise ValueError
        return [int(each) for each in found] if all(each.is_integer() for each in found) else found
    except (TypeError, ValueError):
        pass
    dates = []
    for row, value in enumerate(values):
        try:
            dates.append(_date(str(value).strip()))
        except ValueError:
            raise ValueError(
                f"{table.at(row)}: {column} is {value!r:.80}; expected a number, or a date as in ISO 8601 such as "
                "2024-01-31 or 2024-01-31T12:00"
            ) from None
    if len({date.tzinfo is None for date in dates}) > 1:
        raise ValueError(
            f"{table.path}: some of {column} have a time zone and some have none; expected one or the other"
        )
    return dates


def _date(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}-01" if len(text) == len("2024-01") and text[4:5] == "-" else text)


def _months(times: Sequence[Any]) -> np.ndarray | None:
    """(n,) the number of each time's month, where all are at the same moment of a month or on its last day."""
    if not isinstance(times[0], datetime):
        return None
    same = len({(each.day, each.time()) for each in times}) == 1
    last = all((each + timedelta(days=1)).day == 1 for each in times) and len({each.time() for each in times}) == 1
    if not (same or last):
        return None
    months = np.array([each.year * _MONTHS + each.month for each in times])
    return months if (np.diff(months) > 0).all() else None


def _month_after(first: datetime, months: int) -> datetime:
    at = first.year * _MONTHS + first.month - 1 + months
    begin = first.replace(year=at // _MONTHS, month=at % _MONTHS + 1, day=1)
    following = (begin + timedelta(days=32)).replace(day=1)
    days = (following - begin).days
    last = (first + timedelta(days=1)).day == 1
    return begin.replace(day=days if last else min(first.day, days))


def _shown(time: Any) -> str:
    if not isinstance(time, datetime):
        return f"{time:.12g}" if isinstance(time, float) else str(time)
    return time.date().isoformat() if time.time() == datetime.min.time() and time.tzinfo is None else time.isoformat()
