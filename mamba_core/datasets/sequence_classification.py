"""Classes of texts: a table with a column of texts, or of token ids, and a column of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba_core import tasks
from mamba_core.datasets import _labels, _texts
from mamba_core.datasets._labels import LABEL
from mamba_core.datasets._tables import Table, read_table
from mamba_core.datasets.base import FRACTION, Data, Source
from mamba_core.tasks.sequence_classification import SINGLE
from mamba_core.texts import classify_text, read_text
from mamba_core.vision import Guess

DATA = "a .csv, .tsv or .jsonl table with a column of texts, or of token ids, and a column of labels"
OPTIONS = (_texts.TEXT, _texts.IDS, LABEL)
HELD_OUT = FRACTION
TEXTS = True

CLASSIFIED = "text"


def read(source: Source) -> Data:
    known, count = _labels.labels_known(source.config)
    problem = tasks.of(source.config).problem_type  # type: ignore[attr-defined]
    if problem != SINGLE:
        raise ValueError(f"the config has problem_type {problem!r}, and a table has one label a row; train from Python")
    table = read_table(source.path)
    columns = _texts.columns_of(table, source)
    label = table.column_of(source, LABEL.name, _labels.USUAL, "the labels")
    labels = _labels_of(table, label)
    names = _labels.names_of(source, set(labels), known, count)
    config = _labels.with_labels(source.config, names)
    examples, cut = _examples(table, columns, source, labels, names)
    apart = None
    if isinstance(source.held_out, Path):
        held = read_table(source.held_out)
        for flag, column in ((LABEL.flag, label), *((_texts.TEXT.flag, column) for column in columns.values())):
            held.check_column(column, flag)
        apart, more = _examples(held, columns, source, _labels_of(held, label), names)
        cut += more
    record = {"options": {**columns, LABEL.name: label}, "bytes": source.tokenizer is None}
    facts = {"labels": list(names), "cut": cut, "length": source.length}
    return _labels.divided(source, config, examples, apart, record, facts)


def _labels_of(table: Table, column: str) -> list[str]:
    return [_labels.text_of(table, index, column, value) for index, value in enumerate(table.columns[column])]


def _examples(table: Table, columns, source: Source, labels, names) -> tuple[dict[str, Any], int]:
    rows = _texts.rows_of(table, columns, source)
    targets = _labels.numbers_of(table.path, labels, names)
    return {"inputs": rows.inputs, "mask": rows.mask, "targets": targets}, rows.cut


def classify(model: Any, paths: Sequence[str], texts: Sequence[str], top: int | None) -> list[tuple[str, list[Guess]]]:
    """Each file is a text."""
    found = classify_text([*map(read_text, paths), *texts], model, top=top)
    return list(zip([*paths, *texts], found, strict=True))
