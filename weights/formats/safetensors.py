"""Safetensors files, read and written one tensor at a time.

A file is the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), the data.
https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mamba_core.weights.formats.base import (
    DTYPES,
    FileContents,
    Progress,
    StoredTensor,
    TensorSource,
    checked_sources,
    count_bytes,
    write_tensor,
)
from mamba_core.weights.formats.errors import CheckpointError, explained, list_names
from mamba_core.weights.formats.files import MAX_JSON_BYTES, InputFile, parse_json

SHARD_BYTES = 5_000_000_000
_METADATA = "__metadata__"
_DTYPE_OF_CODE = {dtype.safetensors: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> FileContents:
    """The tensors of one file, nothing loaded. Raises CheckpointError for any fault of the header or the size."""
    file = InputFile(path)
    try:
        return _parse(file)
    except ValueError as fault:
        raise CheckpointError(explained(path, fault)) from None


def write_safetensors(
    folder,
    tensors: Iterable[TensorSource],
    *,
    metadata: dict[str, str] | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write model.safetensors, or numbered shards of at most `shard_bytes` of data and their index.

    One tensor is in memory at a time; a tensor larger than `shard_bytes`, 5 GB by default, has a shard of its own. The
    metadata is {"format": "pt"} unless given, which is what transformers asks for. Returns the files written.
    """
    folder = Path(folder)
    sources, metadata = _check(folder, tensors, metadata)
    shards = _plan_shards(sources, SHARD_BYTES if shard_bytes is None else shard_bytes)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, metadata, progress)
    if len(shards) > 1:
        _write_index(folder / "model.safetensors.index.json", names, shards)
        names.append("model.safetensors.index.json")
    return [folder / name for name in names]


def write_safetensors_file(
    path,
    tensors: Iterable[TensorSource],
    *,
    metadata: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one file of any size, otherwise as `write_safetensors`."""
    _write_file(Path(path), *_check(path, tensors, metadata), progress)


# --- reading ---------------------------------------------------------------------------------------


def _parse(file: InputFile) -> FileContents:
    start = _header_end(file)
    header = parse_json(file[8:start])
    metadata = header.pop(_METADATA, {})
    # MLX alone writes null, where it is given no metadata.
    metadata = {"format": "mlx"} if metadata is None else metadata
    _check_metadata(metadata)
    spans, tensors = [], {}
    for name, fields in header.items():
        try:
            begin, end, tensor = _parse_tensor(fields, file, start)
        except ValueError as fault:
            raise ValueError(f"tensor {list_names([name])}: {fault}") from None
        spans.append((begin, end, name))
        tensors[name] = tensor
    _check_spans(spans, len(file) - start)
    return FileContents(tensors, metadata)


def _header_end(file: InputFile) -> int:
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8:
        raise ValueError(f"the file has {len(file)} bytes, too few for a safetensors header; it is cut short")
    if length > MAX_JSON_BYTES:
        raise ValueError(f"the header's length, {length}, is over {MAX_JSON_BYTES}; this is not a safetensors file")
    if 8 + length > len(file):
        raise ValueError(f"the header is {length} bytes long but the file has {len(file)}; it is cut short")
    if file[8:9] != b"{":
        raise ValueError("the header is not a JSON object; this is not a safetensors file")
    return 8 + length


def _check_metadata(metadata) -> None:
    if not isinstance(metadata, dict):
        raise ValueError(f"{_METADATA} is not an object")
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"{_METADATA} has an entry that is not text")


def _parse_tensor(fields, file: InputFile, start: int) -> tuple[int, int, StoredTensor]:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry is not an object of dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPE_OF_CODE:
        raise ValueError(f"dtype {list_names([code])} is unknown; expected one of {', '.join(_DTYPE_OF_CODE)}")
    if not isinstance(shape, list):
        raise ValueError(f"shape {list_names([shape])} is not a list")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"data_offsets {list_names([offsets])} are not two integers")
    begin, end = offsets
    dtype = _DTYPE_OF_CODE[code]
    nbytes = count_bytes(shape, dtype)
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets {list_names(offsets)} are not in order")
    if end - begin != nbytes:
        raise ValueError(f"data_offsets {list_names(offsets)} do not span the {nbytes} bytes of {dtype} {shape}")
    if start + end > len(file):
        raise ValueError(f"its data runs past the end of the file, {len(file)} bytes; the file is cut short")
    return begin, end, StoredTensor(file, start + begin, tuple(shape), dtype)


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            fault = "overlaps the tensor before it" if begin < reached else f"leaves a gap of {begin - reached} bytes"
            raise ValueError(f"tensor {list_names([name])} at byte {begin} of the data {fault}")
        reached = end
    if reached != data_bytes:
        raise ValueError(f"{data_bytes - reached} bytes follow the last tensor")


# --- writing ---------------------------------------------------------------------------------------


def _check(
    target, tensors: Iterable[TensorSource], metadata: dict[str, str] | None
) -> tuple[list[TensorSource], dict[str, str]]:
    """Everything that can be at fault before a file is opened."""
    sources = checked_sources(target, tensors)
    metadata = {"format": "pt"} if metadata is None else metadata
    try:
        _check_metadata(metadata)
        if any(source.name == _METADATA for source in sources):
            raise ValueError(f"no tensor can be named {_METADATA!r}")
    except ValueError as fault:
        raise CheckpointError(f"{target}: cannot be written: {fault}") from None
    return sources, metadata


def _plan_shards(sources: list[TensorSource], shard_bytes: int) -> list[list[TensorSource]]:
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for source in sources:
        nbytes = count_bytes(source.shape, source.dtype)
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += nbytes
    return shards


def _write_file(
    path: Path, sources: list[TensorSource], metadata: dict[str, str], progress: Progress | None = None
) -> None:
    # Wide elements first keeps every tensor aligned to its element, which torch's loader needs.
    laid_out = sorted(sources, key=lambda source: -DTYPES[source.dtype].numpy.itemsize)
    offsets, reached = {}, 0
    for source in laid_out:
        offsets[source.name] = [reached, reached := reached + count_bytes(source.shape, source.dtype)]
    header: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    for source in sources:
        code = DTYPES[source.dtype].safetensors
        header[source.name] = {"dtype": code, "shape": source.shape, "data_offsets": offsets[source.name]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in laid_out:
            write_tensor(file, source, progress)
            if progress is not None and source.stream is None:
                progress.settle()


def _write_index(path: Path, names: list[str], shards: list[list[TensorSource]]) -> None:
    sources = [source for shard in shards for source in shard]
    index = {
        "metadata": {"total_size": sum(count_bytes(source.shape, source.dtype) for source in sources)},
        "weight_map": {source.name: name for name, shard in zip(names, shards, strict=True) for source in shard},
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
