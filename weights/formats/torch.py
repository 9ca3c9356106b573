"""Torch checkpoints (.bin, .pt, .pth, .ckpt), read and written a tensor at a time, without torch.

A file is a zip of stored records: NAME/data.pkl, the dictionary; NAME/data/KEY, the bytes of a storage;
NAME/byteorder; NAME/version.
"""

import functools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO

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
from mamba_core.weights.formats.errors import list_names
from mamba_core.weights.formats.files import InputFile
from mamba_core.weights.formats.pickle import PickledTensor, dump_state_dict, load_pickle
from mamba_core.weights.formats.zip import Record, read_zip, record_start, write_zip

# 250 bytes a tensor are usual. An opcode of one byte can make a value of 80, so this bounds the memory near 1.3 GiB.
MAX_PICKLE_BYTES = 16 * 2**20
# What training scripts call the weights, beside tensors too.
_STATE_DICT_NAMES = ("model", "state_dict", "model_state_dict", "module", "ema", "ema_state_dict", "model_ema")
_DEEPEST = 2  # of an entry in an entry


def read_torch(path: Path) -> FileContents:
    """The tensors of one file, nothing loaded and nothing executed. Raises CheckpointError.

    The file holds a dictionary of tensors, or a training checkpoint with one such dictionary in it
    ({"model": {...}, "epoch": 3}): the only one, or the only one under a usual name. Beside tensors it has a usual
    name. What lies beside it is skipped. Tensors that share a storage share their bytes.
    """
    return read_zip(path, _read_records, _explain)


def write_torch(
    path, tensors: Iterable[TensorSource], progress: Progress | None = None, under: str | None = None
) -> None:
    """Write a state dict that `torch.load(path, weights_only=True)` reads; one tensor is in memory at a time.

    under: the entry of a dictionary that it is to be, as in a training checkpoint.
    """
    sources = checked_sources(path, tensors)
    with nullcontext(progress) if progress else Progress() as written:
        write_zip(path, _records(sources, written, under))


# --- reading ---------------------------------------------------------------------------------------


def _explain(file: InputFile, fault: Exception) -> str:
    if file[:2] == b"PK":
        return f"the zip is broken or cut short: {fault}"
    if file[:1] == b"\x80":
        return (
            "this is torch's format from before version 1.6, which is not read; re-save it with "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    return "this is not a torch checkpoint: it is no zip"


def _read_records(directory: list[zipfile.ZipInfo], file: InputFile, check: Callable) -> FileContents:
    records = {record.filename: record for record in directory}
    if len(records) < len(directory):
        raise ValueError("the zip has two records of one name")
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"this is not a torch checkpoint: the zip has {len(pickles)} records NAME/data.pkl, not one")
    prefix = pickles[0].removesuffix("data.pkl")
    _check_byteorder(file, records.get(prefix + "byteorder"), check)
    tensors, skipped = _find_tensors(load_pickle(_read_small(file, records[pickles[0]], MAX_PICKLE_BYTES, check)))
    # Several tensors may share a record, which is compared once.
    check = functools.cache(check)
    placed = {name: _place(name, tensor, file, records, prefix, check) for name, tensor in tensors.items()}
    return FileContents(placed, {}, skipped)


def _check_byteorder(file: InputFile, record: zipfile.ZipInfo | None, check: Callable) -> None:
    if record is not None and (order := _read_small(file, record, 16, check)) != b"little":
        raise ValueError(f"the byte order is {order!r}; only b'little' is read; re-save it on a little-endian machine")


def _read_small(file: InputFile, record: zipfile.ZipInfo, limit: int, check: Callable) -> bytes:
    start = record_start(file, record)
    if record.file_size > limit:
        raise ValueError(f"record {record.filename!r} has {record.file_size} bytes; at most {limit} are read")
    data = file[start : start + record.file_size]
    if (checked := check(record, start)) is not None:
        checked.after(zlib.crc32(data), start + record.file_size)
    return data


def _find_tensors(value) -> tuple[dict[str, PickledTensor], tuple[str, ...]]:
    """The dictionary of tensors that is the value or the one that is meant inside of it, and what lies beside it."""
    if not isinstance(value, dict):
        raise ValueError(f"the file holds a {type(value).__name__}, not a dictionary of tensors")
    found = _state_dicts(value, _DEEPEST)
    usual = [path for path in found if path[-1] in _STATE_DICT_NAMES]
    if len(usual) == 1:
        return found[usual[0]], _beside(value, usual[0])
    if any(isinstance(entry, PickledTensor) for entry in value.values()) or not value:
        if others := [name for name, entry in value.items() if not _is_named_tensor(name, entry)]:
            raise ValueError(f"entries that are not tensors under a text name: {list_names(others)}")
        return value, ()
    if len(found) != 1:
        raise ValueError(_advice(value, list(found)))
    (path,) = found
    return found[path], _beside(value, path)


def _state_dicts(value: dict, depth: int) -> dict[tuple[str, ...], dict[str, PickledTensor]]:
    """Path -> dictionary of tensors, of the entries of a dictionary and, under usual names, of their entries."""
    found: dict[tuple[str, ...], dict[str, PickledTensor]] = {}
    known: dict[int, bool] = {}  # a pickle may name one dictionary again and again
    for name, entry in value.items():
        if not isinstance(entry, dict) or not isinstance(name, str):
            continue
        if id(entry) not in known:
            known[id(entry)] = _is_state_dict(entry)
        if known[id(entry)]:
            found[(name,)] = entry
        elif depth > 1 and name in _STATE_DICT_NAMES:
            found |= {(name, *path): tensors for path, tensors in _state_dicts(entry, depth - 1).items()}
    return found


def _beside(value: dict, path: tuple[str, ...]) -> tuple[str, ...]:
    """The entries that a dictionary of tensors lies beside, as "outer.inner"."""
    names: list[str] = []
    for depth, own in enumerate(path):
        names += (".".join((*path[:depth], str(name))) for name in value if name != own)
        value = value[own]
    return tuple(names)


def _advice(value: dict, found: list[tuple[str, ...]]) -> str:
    """Which entries there are, and how to say which is meant."""
    if not found:
        return f"expected one dictionary of tensors, found none among {list_names(value)}"
    keys = "".join(f"[{name!r}]" for name in found[0])
    return (
        f"expected one dictionary of tensors, found {list_names('.'.join(path) for path in found)}; save the one that "
        f"is meant by itself, such as by torch.save(torch.load(path, weights_only=True){keys}, 'weights.pt')"
    )


def _is_named_tensor(name, entry) -> bool:
    return isinstance(name, str) and isinstance(entry, PickledTensor)


def _is_state_dict(entry) -> bool:
    return isinstance(entry, dict) and bool(entry) and all(_is_named_tensor(*item) for item in entry.items())


def _place(name: str, tensor: PickledTensor, file: InputFile, records, prefix: str, check: Callable) -> StoredTensor:
    try:
        record = records.get(f"{prefix}data/{tensor.storage.key}")
        if record is None:
            raise ValueError(f"its storage {tensor.storage.key!r} is not in the file")
        start = record_start(file, record)
        _check_view(tensor, record.file_size)
        # A stride of zero repeats what is there, as often as a file cares to claim.
        if (nbytes := count_bytes(tensor.shape, tensor.dtype)) > len(file):
            raise ValueError(f"it claims {nbytes} bytes, more than the whole file has")
        empty = 0 in tensor.shape
        offset = 0 if empty else tensor.offset * DTYPES[tensor.dtype].numpy.itemsize
        strides = None if empty or _is_row_major(tensor) else _plain_strides(tensor)
        return StoredTensor(file, start + offset, tensor.shape, tensor.dtype, strides, check(record, start))
    except ValueError as fault:
        raise ValueError(f"tensor {list_names([name])}: {fault}") from None


def _check_view(tensor: PickledTensor, record_bytes: int) -> None:
    """The tensor lies within its storage, and the storage is the record."""
    count_bytes(tensor.shape, tensor.dtype)  # whose errors come first
    itemsize = DTYPES[tensor.dtype].numpy.itemsize
    storage_bytes = tensor.storage.length * (1 if tensor.storage.dtype is None else itemsize)
    if storage_bytes != record_bytes:
        raise ValueError(f"its storage is {storage_bytes} bytes long but the record has {record_bytes}")
    if len(tensor.strides) != len(tensor.shape):
        raise ValueError("its shape and its strides have not the same number of axes")
    if not all(type(number) is int and number >= 0 for number in (tensor.offset, *tensor.strides)):
        raise ValueError("its offset or a stride is not a non-negative integer")
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in tensor.shape and (tensor.offset + reach + 1) * itemsize > storage_bytes:
        raise ValueError(f"it reaches beyond its storage of {storage_bytes} bytes")


def _is_row_major(tensor: PickledTensor) -> bool:
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _plain_strides(tensor: PickledTensor) -> tuple[int, ...]:
    # Torch lets the stride of an axis of one element be any number, NumPy wants it within 64 bits.
    return tuple(stride if length > 1 else 0 for length, stride in zip(tensor.shape, tensor.strides, strict=True))


# --- writing ---------------------------------------------------------------------------------------


def _records(sources: list[TensorSource], written: Progress, under: str | None) -> Iterator[Record]:
    yield _small_record("data.pkl", dump_state_dict(sources, under))
    yield _small_record("byteorder", b"little")
    for number, source in enumerate(sources):
        write = partial(_write_storage, source=source, written=written)
        yield Record(f"archive/data/{number}", count_bytes(source.shape, source.dtype), write)
    yield _small_record("version", b"3\n")


def _small_record(name: str, data: bytes) -> Record:
    def write(file: BinaryIO) -> int:
        file.write(data)
        return zlib.crc32(data)

    return Record(f"archive/{name}", len(data), write)


def _write_storage(file: BinaryIO, source: TensorSource, written: Progress) -> int:
    write_tensor(file, source, written)
    return written.checksum(source.name)
