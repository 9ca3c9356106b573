"""Tables from files: csv and tsv by their first row, jsonl by the keys of its objects."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_core.datasets.base import Source
from mamba_core.weights.formats import CheckpointError, explained, list_names, read_input

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OBJECTS = (".jsonl", ".ndjson")
_LONGEST = 200  # letters of a column's name
_MOST_BYTES = 2**40  # of a file, which is in memory whole


@dataclass(frozen=True)
class Table:
    """columns: name -> a value a row: text in csv and tsv, what JSON has in jsonl. lines: of each row in the file."""

    path: Path
    columns: dict[str, list[Any]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        """Where a row is, for errors."""
        return f"{self.path}, line {self.lines[row]}"

    def check_column(self, name: str, flag: str) -> str:
        """The name itself.

        Raises:
            ValueError: there is no such column.
        """
        if name not in self.columns:
            raise ValueError(f"{self.path} has no column {name!r} ({flag}); it has: {list_names(self.columns, 20)}")
        return name

    def column_of(self, source: Source, option: str, usual: Sequence[str], what: str) -> str:
        """The column that an option names, by default the first that has a usual name.

        Raises:
            ValueError: there is none.
        """
        flag = "--" + option.replace("_", "-")
        if (given := source.option(option)) is not None:
            return self.check_column(given, flag)
        by_name = {name.lower(): name for name in reversed(self.columns)}
        found = next((by_name[name] for name in usual if name in by_name), None)
        if found is None:
            raise ValueError(
                f"{self.path}: which column has {what} is not said, and none is named {', '.join(usual)}; "
                f"give {flag}, one of: {list_names(self.columns, 20)}"
            )
        return found


def read_table(path: Path) -> Table:
    """A table that has a row at least.

    Raises:
        CheckpointError: it has none, or the file cannot be read as such a table.
    """
    kind = path.suffix.lower()
    if kind not in _DELIMITERS and kind not in _OBJECTS:
        known = ", ".join((*_DELIMITERS, *_OBJECTS))
        raise CheckpointError(f"{path}: the name ends in {kind or 'nothing'}; expected a table, one of {known}")
    try:
        text = read_input(path, _MOST_BYTES).decode("utf-8-sig")
    except OSError as fault:
        raise CheckpointError(explained(path, fault)) from None
    except UnicodeDecodeError as fault:
        raise CheckpointError(f"{path}: is not UTF-8 at byte {fault.start}; expected text in UTF-8") from None
    if not text.strip():
        raise CheckpointError(f"{path}: the file is empty; expected a table with a row at least")
    table = _from_objects(path, text) if kind in _OBJECTS else _from_rows(path, text, _DELIMITERS[kind])
    if long := [name for name in table.columns if len(name) > _LONGEST]:
        raise CheckpointError(f"{path}: the name of a column has {len(long[0])} letters; expected {_LONGEST} at most")
    if not len(table):
        raise CheckpointError(f"{path}: has the names of columns and no row; expected one at least")
    return table


def _from_rows(path: Path, text: str, delimiter: str) -> Table:
    before = csv.field_size_limit(max(len(text), 1))  # of the whole process
    try:
        rows = _rows(path, text, delimiter)
        _, names = next(rows)
        found = list(rows)
    finally:
        csv.field_size_limit(before)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(f"{path}: columns that appear twice: {list_names(twice)}")
    for line, row in found:
        if len(row) != len(names):
            raise CheckpointError(
                f"{path}, line {line}: has {len(row)} values; expected {len(names)}, one for each of "
                f"{list_names(names, 20)}. Values with {delimiter!r} in them stand in double quotes"
            )
    columns = {name: [row[index] for _, row in found] for index, name in enumerate(names)}
    return Table(path, columns, [line for line, _ in found])


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, values) of each row that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as fault:
        raise CheckpointError(f"{path}, line {line}: {fault}") from None


def _from_objects(path: Path, text: str) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise CheckpointError(f"{path}, line {number}: not valid JSON: {fault}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}, line {number}: is {type(value).__name__}; expected an object a line")
        rows.append(value)
        lines.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, lines)
