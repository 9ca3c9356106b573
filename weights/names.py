"""Tensor names as anchored tables, read in both directions: canonical names and those of a layout.

Canonical names are those of the parameter table. A scheme translates every name of it, so that it says of each tensor
in a file whether it belongs there.
"""

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mamba_core import architectures
from mamba_core.spec.params import Parameter, parameter_table
from mamba_core.tasks.base import EMBEDDING, FINAL_NORM, SCORE, SCORE_BIAS
from mamba_core.tasks.lm import HEAD
from mamba_core.weights.transforms import SAME, Shape, Transform

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "HEAD",
    "SCORE",
    "SCORE_BIAS",
    "Piece",
    "Row",
    "Scheme",
    "Stored",
    "stored_tensors",
    "templates",
]

_WILDCARD = re.compile(r"\{(\w+)\}")
_INDEX = "#"


class Row(NamedTuple):
    """One canonical tensor, or one of every layer, and where it is stored.

    canonical: its name, in which {layer} stands for an index.
    stored: the name in the file, or several. A wildcard that the canonical name lacks, such as {expert}, counts along
        the canonical tensor's first axis: the stored tensors are stacked. Several names lie side by side along `axis`
        of each entry of the stack, or of the tensor where nothing is stacked. Their sizes are the parameter's `parts`,
        or equal.
    transform: the change of each stored tensor's axes.
    mark: whether a file of the scheme is told by this name.
    mixer: of the blocks for whose tensors the row is; None for all. Tensors of one canonical name may have other names
        in the file, or be several there, in blocks of another mixer.
    """

    canonical: str
    stored: str | tuple[str, ...]
    transform: Transform = SAME
    axis: int = 0
    mark: bool = False
    mixer: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.stored,) if isinstance(self.stored, str) else self.stored

    @property
    def stacks(self) -> str | None:
        """The wildcard that counts along the first axis."""
        wildcards = dict.fromkeys(name for stored in self.names for name in _WILDCARD.findall(stored))
        return next((name for name in wildcards if name not in _WILDCARD.findall(self.canonical)), None)


class Piece(NamedTuple):
    """A tensor in the file that is a canonical tensor, or a part of one.

    name: in the file. shape: in the file. transform: the change of its axes.
    where: the index of the part in the canonical tensor, () for all of it.
    """

    name: str
    shape: Shape
    transform: Transform
    where: tuple[int | slice, ...] = ()


class Stored(NamedTuple):
    """The tensors in the file that a canonical tensor is made of; most often one."""

    pieces: tuple[Piece, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(piece.name for piece in self.pieces)

    @property
    def whole(self) -> Piece | None:
        """The one tensor in the file that is the canonical one as it is; None where it is joined or changed."""
        piece = self.pieces[0]
        return piece if len(self.pieces) == 1 and not piece.where and piece.transform is SAME else None

    @property
    def label(self) -> str:
        """For reports: the name, or the first of many."""
        more = f" and {len(self.pieces) - 1} more" if len(self.pieces) > 1 else ""
        return self.pieces[0].name + more


@dataclass(frozen=True)
class Scheme:
    """The names of one kind of model in one layout.

    task: that of the config. rows: a row a tensor.
    classes: the names of the library's classes that save such files.
    as_is: whether parameters without a row are stored under their canonical names.
    """

    task: str
    rows: tuple[Row, ...]
    classes: tuple[str, ...] = ()
    as_is: bool = False

    def name(self, canonical: str) -> str | None:
        """The stored name of a tensor that is stored whole; None for one that the scheme does not have."""
        if (found := self._row(canonical)) is None:
            return canonical if self.as_is else None
        row, wildcards = found
        return row.names[0].format(**wildcards)

    def stored(self, parameter: Parameter, mixers: Sequence[str] = ()) -> Stored:
        """Where a parameter is stored.

        mixers: of the layers; () where no row asks for them.

        Raises:
            ValueError: no row names it, or its shape does not fit the row.
        """
        if (found := self._row(parameter.name, mixers)) is None:
            if not self.as_is:
                raise ValueError(f"the table of names has no row for the parameter {parameter.name!r}")
            return Stored((Piece(parameter.name, parameter.shape, SAME),))
        row, wildcards = found
        if row.stacks is None and len(row.names) == 1:
            shape = row.transform.stored_shape(parameter.shape)
            return Stored((Piece(row.names[0].format(**wildcards), shape, row.transform),))
        return Stored(tuple(_pieces(row, wildcards, parameter)))

    def canonical(self, name: str) -> tuple[str, Transform] | None:
        """The canonical name of a tensor that is stored whole, and its transform."""
        for row in self._by_stored.get(template(name), ()):
            if match := _pattern(row.names[0]).fullmatch(name):
                return row.canonical.format(**match.groupdict()), row.transform
        return None

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The names that tell a file of this scheme, those of the first layer for all."""
        marked = [row for row in self.rows if row.mark] or self.rows[:1]
        return tuple(_WILDCARD.sub("0", row.names[0]) for row in marked)

    def fits(self, found: Collection[str]) -> bool:
        """Whether a file with names of these templates has this scheme.

        A head may stand for the embedding that it is tied to, in a file that holds nothing else than the scheme's
        tensors. A scheme of layers alone fits only such a file.
        """
        missing = {mark for mark in self.marks if template(mark) not in found}
        if not self.rows or (missing and not self._head_stands_for(missing, found)):
            return False
        return any(_WILDCARD.search(row.canonical) is None for row in self.rows) or self.templates.issuperset(found)

    def _head_stands_for(self, missing: Collection[str], found: Collection[str]) -> bool:
        return missing == {self.name(EMBEDDING)} and self.has_head(found) and self.templates.issuperset(found)

    @cached_property
    def templates(self) -> frozenset[str]:
        """The templates of all stored names."""
        return templates([name for row in self.rows for name in row.names])

    def has_head(self, found: Collection[str]) -> bool:
        """Whether names of these templates include that of the head."""
        name = self.name(HEAD)
        return name is not None and template(name) in found

    @cached_property
    def _by_canonical(self) -> Mapping[str, list[Row]]:
        return _grouped((template(row.canonical), row) for row in self.rows)

    @cached_property
    def _by_stored(self) -> Mapping[str, list[Row]]:
        whole = (row for row in self.rows if len(row.names) == 1 and row.stacks is None)
        return _grouped((template(row.names[0]), row) for row in whole)

    def _row(self, canonical: str, mixers: Sequence[str] = ()) -> tuple[Row, dict[str, str]] | None:
        for row in self._by_canonical.get(template(canonical), ()):
            if match := _pattern(row.canonical).fullmatch(canonical):
                wildcards = match.groupdict()
                if row.mixer is None or row.mixer == mixers[int(wildcards["layer"])]:
                    return row, wildcards
        return None


def template(name: str) -> str:
    """The name with a sign in the place of every index and wildcard."""
    parts = name.split(".")
    return ".".join(_INDEX if (part.isascii() and part.isdigit()) or part[:1] == "{" else part for part in parts)


def templates(names: Collection[str]) -> frozenset[str]:
    return frozenset(map(template, names))


def stored_tensors(config, scheme: Scheme, most: int | None = None) -> dict[str, Stored]:
    """Canonical name -> where it is stored, for every parameter of the config, in the order of its table.

    most: tensors in the file.

    Raises:
        ValueError: a parameter is joined of more tensors than that, or no row names it.
    """
    stored = {}
    mixers = tuple(block.mixer for block in architectures.of(config).blocks(config))
    for name, parameter in parameter_table(config).items():
        row = scheme._row(name, mixers)
        if most is not None and row is not None and row[0].stacks and parameter.shape[0] > most:
            raise ValueError(f"{name} is joined of {parameter.shape[0]} tensors, but the file has {most} tensors")
        stored[name] = scheme.stored(parameter, mixers)
    return stored


def _pieces(row: Row, wildcards: Mapping[str, str], parameter: Parameter) -> Iterator[Piece]:
    entry = parameter.shape if row.stacks is None else parameter.shape[1:]
    if len(entry) <= row.axis:
        raise ValueError(f"{parameter.name} has shape {parameter.shape}; its row joins along axis {row.axis}")
    sizes = _sizes(row, entry[row.axis], parameter)
    for index in (None,) if row.stacks is None else range(parameter.shape[0]):
        known = wildcards if row.stacks is None else {**wildcards, row.stacks: str(index)}
        start = 0
        for name, size in zip(row.names, sizes, strict=True):
            where = (slice(None),) * row.axis + (slice(start, start + size),) if len(row.names) > 1 else ()
            shape = (*entry[: row.axis], size, *entry[row.axis + 1 :])
            start += size
            at = where if index is None else (index, *where)
            yield Piece(name.format(**known), row.transform.stored_shape(shape), row.transform, at)


def _sizes(row: Row, whole: int, parameter: Parameter) -> tuple[int, ...]:
    """The sizes of the row's tensors along the axis on which they lie side by side."""
    count = len(row.names)
    if count > 1 and row.axis == 0 and row.stacks is None and len(parameter.parts) == count:
        return tuple(size for _, size in parameter.parts)
    if whole % count:
        raise ValueError(f"{parameter.name} has shape {parameter.shape}, which is not {count} equal parts")
    return (whole // count,) * count


def _grouped(pairs: Iterator[tuple[str, Row]]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for key, row in pairs:
        grouped.setdefault(key, []).append(row)
    return grouped


@functools.cache
def _pattern(name: str) -> re.Pattern:
    parts = _WILDCARD.split(name)  # text and wildcards by turns
    text = "".join(f"(?P<{part}>[0-9]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile(text)
