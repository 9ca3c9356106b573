"""Labels of the words of a text: a jsonl file with a list of words, or of token ids, and a list of labels a row."""

from pathlib import Path
from typing import Any

import numpy as np

from mamba_core.datasets import _labels, _texts
from mamba_core.datasets._labels import LABEL
from mamba_core.datasets._tables import Table, read_table
from mamba_core.datasets.base import FRACTION, Data, Option, Source, taken
from mamba_core.spec.init import random_stream
from mamba_core.spec.losses import IGNORED
from mamba_core.tokenizer import ByteTokenizer, as_tokenizer

DATA = "a .jsonl table with a list of words, or of token ids, and a list of as many labels"
WORDS = Option("words_column", "the column of lists of words; by default words or tokens")
OPTIONS = (WORDS, _texts.IDS, LABEL)
HELD_OUT = FRACTION
TEXTS = True
_USUAL, _USUAL_LABELS = ("words", "tokens"), ("labels", "tags", "ner_tags", "label")


def read(source: Source) -> Data:
    """A word is its tokens, with a space before them but for the first word. A label that is null does not count.

    The last token of a word has its label: a causal model has read all of the word there.
    """
    known, count = _labels.labels_known(source.config)
    table = _read(source.path)
    columns = _columns(table, source)
    label = table.column_of(source, LABEL.name, _USUAL_LABELS, "the labels")
    found = {name for names in _labels_of(table, label) for name in names if name is not None}
    if not found:
        raise ValueError(f"{source.path}: {label} has no label; expected lists of texts or numbers")
    names = _labels.names_of(source, found, known, count)
    config = _labels.with_labels(source.config, names)
    examples, cut = _examples(table, columns, label, source, names)
    apart = None
    if isinstance(source.held_out, Path):
        held = _read(source.held_out)
        for flag, column in ((LABEL.flag, label), *((WORDS.flag, column) for column in columns.values())):
            held.check_column(column, flag)
        apart, more = _examples(held, columns, label, source, names)
        cut += more
    elif source.held_out:
        examples, apart = _divided(examples, source)
    record = {"options": {**columns, LABEL.name: label}, "bytes": source.tokenizer is None}
    facts = {"labels": list(names), "cut": cut, "length": source.length}
    return _labels.finished(source, config, examples, apart, record, facts)


def _read(path: Path) -> Table:
    if path.suffix.lower() in (".csv", ".tsv"):
        raise ValueError(f"{path}: a cell of a csv has no list of words; expected a .jsonl file with lists")
    return read_table(path)


def _columns(table: Table, source: Source) -> dict[str, str]:
    if source.option(WORDS.name) is not None and source.option(_texts.IDS.name) is not None:
        raise ValueError(f"{WORDS.flag} and {_texts.IDS.flag} are both given; expected one of them")
    if source.option(_texts.IDS.name) is not None:
        return {_texts.IDS.name: table.column_of(source, _texts.IDS.name, (), "the token ids")}
    return {WORDS.name: table.column_of(source, WORDS.name, _USUAL, "the words")}


def _labels_of(table: Table, column: str) -> list[list[str | None]]:
    found = []
    for index, values in enumerate(table.columns[column]):
        if not isinstance(values, list):
            raise ValueError(f"{table.at(index)}: {column} is {values!r:.80}; expected a list of labels")
        found.append([None if value is None else _labels.text_of(table, index, column, value) for value in values])
    return found


def _examples(table: Table, columns, label: str, source: Source, names) -> tuple[dict[str, Any], int]:
    ((option, column),) = columns.items()
    encode = (ByteTokenizer() if source.tokenizer is None else as_tokenizer(source.tokenizer)).encode_more
    of_rows = _labels_of(table, label)
    numbers = {name: number for number, name in enumerate(names)} | {None: IGNORED}
    _labels.numbers_of(table.path, [name for row in of_rows for name in row if name is not None], names)
    rows, targets = [], np.full((len(table), source.length), IGNORED, np.int32)
    for index, (values, labels) in enumerate(zip(table.columns[column], of_rows, strict=True)):
        pieces = _pieces(table, index, column, values, encode, words=option == WORDS.name)
        if len(pieces) != len(labels):
            raise ValueError(f"{table.at(index)}: {column} has {len(pieces)} entries and {label} {len(labels)}")
        ends = np.cumsum([len(piece) for piece in pieces]) - 1
        kept = ends < source.length
        targets[index, ends[kept]] = np.array([numbers[name] for name in labels], np.int32)[kept]
        rows.append([token for piece in pieces for token in piece])
    _texts.check_vocabulary(rows, source)
    padded = _texts.padded(rows, source.length)
    return {"inputs": padded.inputs, "mask": padded.mask, "targets": targets[:, : padded.inputs.shape[1]]}, padded.cut


def _pieces(table: Table, index: int, column: str, values: Any, encode, words: bool) -> list[list[int]]:
    """The tokens of each entry."""
    kind, what = (str, "words") if words else (int, "token ids")
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise ValueError(f"{table.at(index)}: {column} is {values!r:.80}; expected a list of {what}")
    if not words:
        return [[value] for value in values]
    pieces = [list(encode(f" {value}" if place else value)) for place, value in enumerate(values)]
    if empty := [value for value, piece in zip(values, pieces, strict=True) if not piece]:
        raise ValueError(f"{table.at(index)}: the word {empty[0]!r} has no tokens; leave it out")
    return pieces


def _divided(examples: dict[str, np.ndarray], source: Source) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    count = len(examples["targets"])
    held = np.zeros(count, bool)
    apart = round(float(source.held_out) * count)  # type: ignore[arg-type]
    if not 0 < apart < count:
        raise ValueError(
            f"held_out is {source.held_out} of {count} examples, which leaves {apart} or all; give another"
        )
    held[random_stream(source.seed, "held_out").permutation(count)[:apart]] = True
    # A row with a label that no row of training has is trained on.
    unseen = np.setdiff1d(examples["targets"][held], examples["targets"][~held])
    held &= ~np.isin(examples["targets"], unseen).any(1)
    if not held.any():
        raise ValueError(f"{source.path}: each example that is held out has a label of its own; give more examples")
    return taken(examples, ~held), taken(examples, held)
