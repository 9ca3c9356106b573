"""NumPy's .npz files, which MLX's savez writes too, read through a memory map and written one tensor at a time.

A file is a zip of records NAME.npy, each the header of NumPy's format and the array's bytes. NumPy has no bfloat16:
MLX, and NumPy for arrays of ml_dtypes, write it as two bytes without a type, V2, and MLX reads that as bfloat16.
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import io
import math
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

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
from mamba_core.weights.formats.files import InputFile
from mamba_core.weights.formats.zip import Record, read_zip, record_start, write_zip

_SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {b"\1\0": 2, b"\2\0": 4}  # by version
_MAX_HEADER_BYTES = 4096  # one of NumPy or MLX has 128
# NumPy's own reader takes any Python literal; this is what it and MLX write.
_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *\} *\n?")
_DESCR = {name: dtype.numpy.str for name, dtype in DTYPES.items() if dtype.numpy.isbuiltin == 1}
_DESCR["bfloat16"] = "<V2"
_NAMES = {descr: name for name, descr in _DESCR.items()} | {"|V2": "bfloat16"}


def read_npz(path: Path) -> FileContents:
    """The tensors of one file, nothing loaded and nothing unpickled. Raises CheckpointError."""
    return read_zip(path, _read_records, lambda file, fault: f"the zip is broken or cut short, or it is none: {fault}")


def read_npy(path: Path) -> StoredTensor:
    """The array of a .npy file, nothing loaded and nothing unpickled.

    Raises:
        CheckpointError: it is none, or none of a known dtype.
        OSError: there is no such file, or it cannot be opened.
    """
    file = InputFile(path)
    try:
        return _read_array(file, 0, len(file))
    except ValueError as fault:
        raise CheckpointError(explained(path, fault)) from None


def write_npz(path, tensors: Iterable[TensorSource], progress: Progress | None = None) -> None:
    """Write a file that mx.load and np.load read; one tensor is in memory at a time."""
    sources = checked_sources(path, tensors)
    if unknown := [source.name for source in sources if source.dtype not in _DESCR]:
        raise CheckpointError(f"{path}: cannot be written: .npz has no dtype for {list_names(unknown)}")
    with Progress() as records:
        write_zip(path, (_array_record(source, records, progress) for source in sources))


def _array_record(source: TensorSource, records: Progress, progress: Progress | None) -> Record:
    """The record, whose checksum, other than the tensor's in `progress`, begins with the header."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": _DESCR[source.dtype], "fortran_order": False, "shape": source.shape})

    def tell(name: str, block: np.ndarray) -> None:
        records(name, block)
        if progress is not None:
            progress(name, block)

    def write(file: BinaryIO) -> int:
        file.write(header.getvalue())
        records(source.name, np.frombuffer(header.getvalue(), np.uint8))
        write_tensor(file, source, tell)
        return records.checksum(source.name)

    nbytes = len(header.getvalue()) + count_bytes(source.shape, source.dtype)
    return Record(source.name + _SUFFIX, nbytes, write)


def _read_records(directory: list[zipfile.ZipInfo], file: InputFile, check: Callable) -> FileContents:
    tensors: dict[str, StoredTensor] = {}
    for record in directory:
        name = record.filename.removesuffix(_SUFFIX)
        if name == record.filename or name in tensors:
            raise ValueError(f"record {record.filename!r} is there twice, or is no array NAME{_SUFFIX}")
        try:
            tensors[name] = _read_record(file, record, check)
        except ValueError as fault:
            raise ValueError(f"tensor {list_names([name])}: {fault}") from None
    return FileContents(tensors, {})


def _read_record(file: InputFile, record: zipfile.ZipInfo, check: Callable) -> StoredTensor:
    begin = record_start(file, record)
    return _read_array(file, begin, begin + record.file_size)._replace(check=check(record, begin))


def _read_array(file: InputFile, begin: int, end: int) -> StoredTensor:
    """The array whose header and data lie there."""
    header, start = _split_header(file, begin, end)
    match = _HEADER.fullmatch(header)
    if match is None:
        raise ValueError("its header is not that of an array")
    descr, order, sizes = (text.decode("ascii") for text in match.groups())
    if descr not in _NAMES:
        raise ValueError(f"dtype {descr!r} is not read; expected one of {', '.join(_NAMES)}")
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    expected, found = count_bytes(shape, _NAMES[descr]), end - start
    if expected != found:
        raise ValueError(f"{_NAMES[descr]} {shape} is {expected} bytes, but there are {found}")
    # Column-major, as MLX stores a transposed array: the first axis is the nearest.
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape))) if order == "True" else None
    return StoredTensor(file, start, shape, _NAMES[descr], strides)


def _split_header(file: InputFile, begin: int, end: int) -> tuple[bytes, int]:
    """The text of the header, and where the data begins."""
    magic = file[begin : begin + len(_MAGIC) + 2]
    if end - begin < len(magic) + 4 or magic[:-2] != _MAGIC:
        raise ValueError("this is not an array in NumPy's format")
    if magic[-2:] not in _LENGTH_BYTES:
        raise ValueError(f"version {tuple(magic[-2:])} of NumPy's format is not read; expected (1, 0) or (2, 0)")
    text = begin + len(magic) + _LENGTH_BYTES[magic[-2:]]
    start = text + int.from_bytes(file[begin + len(magic) : text], "little")
    if start > end or start - text > _MAX_HEADER_BYTES:
        raise ValueError(f"its header is {start - text} bytes long, more than its record or than {_MAX_HEADER_BYTES}")
    return file[text:start], start
