"""Conversion between layouts, a tensor at a time; and what a checkpoint holds, from its headers."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mamba_core.config import COMPUTE_DTYPES
from mamba_core.spec.params import Parameter, parameter_count
from mamba_core.weights import layouts
from mamba_core.weights.formats import (
    DTYPES,
    Progress,
    TensorSource,
    atomic_folder,
    blocks,
    boundary,
    count_bytes,
    count_nonfinite,
    early_sync,
    list_names,
    resolved,
)
from mamba_core.weights.names import EMBEDDING, Piece, Stored
from mamba_core.weights.opening import OpenedModel, open_model
from mamba_core.weights.verify import Verification, verify_bytes, verify_forward
from mamba_core.weights.writing import copy_companions, stored_sources, write_layout


@dataclass(frozen=True)
class ConvertedTensor:
    """One row of a conversion's report.

    source, target: its names in the two checkpoints; of several source tensors that it is joined of, the first.
    shape, dtype: as written; source_dtype: as read.
    transform: what was done to its axes, None if nothing. checksum: CRC-32 of the bytes written, row-major.
    nonfinite: how many of the values written are NaN or infinite.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    transform: str | None
    checksum: str
    nonfinite: int


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    left_out: what the source holds beside the model, such as a classifier's tensors or an optimizer's state.
    verification: None unless it was asked for.
    """

    source_layout: str
    target_layout: str
    nbytes: int
    tensors: tuple[ConvertedTensor, ...]
    left_out: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def nonfinite(self) -> dict[str, int]:
        """Name in the target -> how many values are NaN or infinite, of the tensors that hold any."""
        return {row.target: row.nonfinite for row in self.tensors if row.nonfinite}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    evidence: how the layout was told. left_out: what lies beside the model, such as an optimizer's state.
    dtypes: how many tensors have each. tensors: name in the file -> shape and dtype.
    nonfinite: name in the file -> how many values are NaN or infinite; None unless the values were read.
    """

    layout: str
    evidence: str
    config: dict
    files: tuple[str, ...]
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    left_out: tuple[str, ...] = ()
    nonfinite: dict[str, int] | None = None

    def to_json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=1)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    layout: str | None = None,
    file_format: str | None = None,
    dtype: str | None = None,
    lossy: bool = False,
    shard_bytes: int | None = None,
    verify: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    compat: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a checkpoint in another layout, holding one tensor at a time. Bytes are kept unless `dtype` is given.

    Args:
        source: a folder, file or hub id. target: a folder, which appears only when complete and checked.
        to: the layout to write, a file of `weights/layouts`.
        layout: that of the source; detected by default.
        file_format: such as "safetensors" or "bin"; by default what the layout's own library reads.
        dtype: "float32", "bfloat16" or "float16", to which values are rounded to nearest. Parameters that every model
            keeps in float32, such as A_log, become float32 then, whatever it is.
        lossy: allow a dtype that cannot hold every value of the source's.
        shard_bytes: the most data in one file of safetensors; 5 GB by default.
        verify: read the target again, compare checksums, and compare the results of one forward bit for bit.
        overwrite: replace an existing folder.
        revision: of a hub repository.
        compat: the architecture to read the source as; see `open_model`.
        progress: called with the bytes written so far and those of all tensors.

    Raises:
        CheckpointError: the source is broken, the target exists or cannot be written, a value is too large for
            `dtype`, or the verification fails. No target is left then.
        ValueError: an unknown layout, format or dtype, a config that the target layout cannot express, or a cast that
            loses precision without `lossy`.
    """
    to = layouts.key(to)
    if dtype not in (None, *COMPUTE_DTYPES):
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}, or nothing to keep bytes")
    if shard_bytes is not None and (type(shard_bytes) is not int or shard_bytes < 1):
        raise ValueError(f"shard_bytes is {shard_bytes!r}; expected a positive number of bytes")
    if shard_bytes is not None and (file_format or layouts.find(to).file_format) != "safetensors":
        raise ValueError("shard_bytes is for safetensors alone; leave it out, or choose file_format='safetensors'")
    opened = open_model(source, layout=layout, revision=revision, compat=compat)
    if resolved(opened.folder).is_relative_to(resolved(target)):
        raise ValueError(f"{target}: is or holds the source; choose another folder to write")
    sources = [_cast(item, parameter, dtype) for parameter, _, item in opened.sources()]
    if not lossy:
        _refuse_rounding(source, sources)
    stored = stored_sources(opened.config, sources, to)
    total = sum(count_bytes(item.shape, item.dtype) for item in stored)
    with atomic_folder(target, overwrite=overwrite) as folder:
        with _Recorder(total, progress) as written, early_sync(folder):
            write_layout(folder, opened.config, sources, to, file_format, shard_bytes=shard_bytes, progress=written)
        with boundary(opened.folder):
            copy_companions(opened.folder, folder, opened.config, to)
        result = open_model(folder, layout=to, compat=opened.config.architecture)
        rows = tuple(_rows(opened, result, written))
        verification = None
        if verify:
            verify_bytes(target, result.checkpoint, {row.target: row.checksum for row in rows})
            verification = verify_forward(target, opened, result)
    return Conversion(opened.layout, to, written.nbytes, rows, opened.left_out, verification)


def inspect(
    source: str | Path,
    *,
    layout: str | None = None,
    revision: str | None = None,
    compat: str | None = None,
    values: bool = False,
) -> Inspection:
    """Layout, config, files, parameters and dtypes of a checkpoint, from its headers alone unless `values`.

    values: read every tensor and count the values that are NaN or infinite.
    """
    opened = open_model(source, layout=layout, revision=revision, compat=compat)
    headers = {name: opened.checkpoint.header(name) for name in opened.checkpoint}
    return Inspection(
        layout=opened.layout,
        evidence=opened.evidence,
        config=opened.config.to_dict(),
        files=tuple(path.name for path in opened.checkpoint.files),
        parameters=parameter_count(opened.config),
        nbytes=sum(header.nbytes for header in headers.values()),
        dtypes=dict(Counter(header.dtype for header in headers.values())),
        tensors={name: (header.shape, header.dtype) for name, header in headers.items()},
        left_out=opened.left_out,
        nonfinite=_nonfinite(opened) if values else None,
    )


def _finite(value):
    """The value with None for what JSON has no number for: NaN and infinities, which a config.json may hold."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nonfinite(opened: OpenedModel) -> dict[str, int]:
    floats = [name for name in opened.checkpoint if "float" in opened.checkpoint.header(name).dtype]
    counts = {name: sum(map(count_nonfinite, blocks(opened.checkpoint[name]))) for name in floats}
    return {name: count for name, count in counts.items() if count}


def _cast(source: TensorSource, parameter: Parameter, dtype: str | None) -> TensorSource:
    wanted = source.dtype if dtype is None else parameter.dtype(dtype)
    return source if wanted == source.dtype else source._replace(dtype=wanted, cast_from=source.dtype)


def _refuse_rounding(source, sources: list[TensorSource]) -> None:
    rounded = [item for item in sources if item.cast_from and not _holds(item.dtype, item.cast_from)]
    if rounded:
        casts = Counter(f"{item.cast_from} to {item.dtype}" for item in rounded)
        raise ValueError(
            f"{source}: {' and '.join(casts)} rounds the values of {len(rounded)} tensors "
            f"({list_names((item.name for item in rounded), 3)}); allow it by lossy (--lossy), or choose another dtype"
        )


def _holds(dtype: str, other: str) -> bool:
    """Whether every value of the other dtype is one of this dtype."""
    return np.can_cast(DTYPES[other].numpy, DTYPES[dtype].numpy, "safe")


class _Recorder(Progress):
    """Counts what is not finite too, and reports how far the writing is."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        super().__init__()
        self.nbytes = 0
        self.nonfinite: Counter[str] = Counter()
        self._total = total
        self._progress = progress

    def __call__(self, name: str, block: np.ndarray) -> None:
        super().__call__(name, block)
        self.nbytes += block.nbytes
        if self._progress is not None:
            self._progress(self.nbytes, self._total)

    def _record(self, name: str, block: np.ndarray) -> None:
        super()._record(name, block)
        self.nonfinite[name] += count_nonfinite(block)


def _rows(opened: OpenedModel, result: OpenedModel, written: _Recorder) -> Iterator[ConvertedTensor]:
    """The report's rows, in the order of the target."""
    pieces = {piece.name: (name, piece) for name, stored in result.stored.items() for piece in stored.pieces}
    for target in result.checkpoint:
        # The one tensor that is in the file without being a parameter is a tied head.
        name, piece = pieces.get(target) or (EMBEDDING, result.stored[EMBEDDING].pieces[0])
        source = opened.stored[name]
        shape, dtype, _ = result.checkpoint.header(target)
        yield ConvertedTensor(
            source=_counterpart(source, piece).name,
            target=target,
            shape=shape,
            source_dtype=opened.checkpoint.header(source.pieces[0].name).dtype,
            dtype=dtype,
            transform=_change(source, result.stored[name]),
            checksum=f"{written.checksum(target):08x}",
            nonfinite=written.nonfinite[target],
        )


def _counterpart(source: Stored, piece: Piece) -> Piece:
    """The source's tensor of the same part, or its first."""
    return next((own for own in source.pieces if own.where == piece.where), source.pieces[0])


def _change(source: Stored, target: Stored) -> str | None:
    """What is done to the axes; None for nothing."""
    ways = [_way(stored) for stored in (source, target)]
    return None if ways[0] == ways[1] else " -> ".join(way or "as is" for way in ways)


def _way(stored: Stored) -> str | None:
    joined = f"{len(stored.pieces)} tensors" if len(stored.pieces) > 1 else None
    return ", ".join(filter(None, (joined, stored.pieces[0].transform.name))) or None
