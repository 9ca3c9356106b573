"""Texts of a table as rows of token ids of one length."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mamba_core.datasets._tables import Table
from mamba_core.datasets.base import Option, Source
from mamba_core.tokenizer import ByteTokenizer, as_tokenizer

TEXT = Option("text_column", "the column of texts; by default text, sentence, review, content or comment")
IDS = Option("ids_column", "instead, the column of token ids: a list, or numbers with spaces between them")
_USUAL_TEXTS = ("text", "sentence", "review", "content", "comment")
_USUAL_IDS = ("input_ids", "ids")


@dataclass(frozen=True)
class Rows:
    """inputs: (rows, l) int32, l of the longest. mask: (rows, l) bool, False at padding, which is at the end. cut: how
    many rows were longer than they may be."""

    inputs: np.ndarray
    mask: np.ndarray
    cut: int


def columns_of(table: Table, source: Source) -> dict[str, str]:
    """The option that names the inputs, and the column.

    Raises:
        ValueError: both are named, or no column is found.
    """
    if source.option(TEXT.name) is not None and source.option(IDS.name) is not None:
        raise ValueError(f"{TEXT.flag} and {IDS.flag} are both given; expected one of them")
    found = {name.lower() for name in table.columns}
    of_ids = source.option(IDS.name) is not None or (
        source.option(TEXT.name) is None and not found & set(_USUAL_TEXTS) and bool(found & set(_USUAL_IDS))
    )
    option, usual, what = (IDS, _USUAL_IDS, "the token ids") if of_ids else (TEXT, _USUAL_TEXTS, "the texts")
    return {option.name: table.column_of(source, option.name, usual, what)}


def rows_of(table: Table, columns: dict[str, str], source: Source) -> Rows:
    """The inputs of each row, cut and padded.

    Raises:
        ValueError: a row has no input, or one of another kind.
    """
    ((option, column),) = columns.items()
    encode = encoder_of(source.tokenizer)
    rows = []
    for index, value in enumerate(table.columns[column]):
        ids = _ids(table, index, column, value) if option == IDS.name else _encoded(table, index, column, value, encode)
        if not ids:
            raise ValueError(f"{table.at(index)}: {column} is empty; expected a text; leave the row out")
        rows.append(ids)
    check_vocabulary(rows, source)
    return padded(rows, source.length)


def padded(rows: Sequence[Sequence[int]], most: int) -> Rows:
    """Rows of that many tokens at most."""
    length = min(most, max(map(len, rows)))
    inputs, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for index, ids in enumerate(rows):
        count = min(len(ids), length)
        inputs[index, :count] = ids[:count]
        mask[index, :count] = True
    return Rows(inputs, mask, sum(len(ids) > most for ids in rows))


def encoder_of(tokenizer: Any):
    return (ByteTokenizer() if tokenizer is None else as_tokenizer(tokenizer)).encode


def check_vocabulary(rows: Sequence[Sequence[int]], source: Source) -> None:
    largest, least = max(map(max, rows)), min(map(min, rows))
    if least < 0 or largest >= source.config.vocab_size:
        whose = "bytes" if source.tokenizer is None else "the tokenizer"
        raise ValueError(
            f"{source.path} gives tokens {least} to {largest} by {whose}, and the config's vocab_size is "
            f"{source.config.vocab_size}; give a config of a larger one, or the tokenizer that belongs to it"
        )


def _encoded(table: Table, index: int, column: str, value: Any, encode) -> list[int]:
    if not isinstance(value, str):
        raise ValueError(f"{table.at(index)}: {column} is {value!r:.80}; expected a text")
    try:
        return list(encode(value))
    except UnicodeEncodeError:
        raise ValueError(f"{table.at(index)}: {column} has half a surrogate pair, which is no text") from None


def _ids(table: Table, index: int, column: str, value: Any) -> list[int]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else [int(part) for part in value.split()]
        except ValueError:
            value = None
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError(f"{table.at(index)}: {column} is no list of token ids; expected integers")
    return value
