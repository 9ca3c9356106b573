"""Zip files of stored records: what torch's files and NumPy's .npz share.

The fields are those of PKWARE's APPNOTE, sections 4.3 and 4.5.3. The standard library's writer is not used because it
computes a checksum of its own between the writes; ours comes from the thread beside them.
"""

import functools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mamba_core.weights.formats.base import FileContents
from mamba_core.weights.formats.errors import CheckpointError, explained
from mamba_core.weights.formats.files import BLOCK_BYTES, MAX_JSON_BYTES, InputFile

ALIGNMENT = 64  # what torch.save aligns records to
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE = b"PK\x03\x04", b"PK\x01\x02"
# Version, flags, method, time, date, checksum, two sizes, the lengths of name and extra field: in both headers.
_FIELDS = "5H3I2H"
_LOCAL_HEADER = struct.Struct(f"<4s{_FIELDS}")
_CENTRAL_HEADER = struct.Struct(f"<4sH{_FIELDS}3H2I")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_EXTRA_FIELD = struct.Struct("<2sH")
_VERSION = 45  # the one that has 64-bit sizes
_UTF8, _ENCRYPTED, _PATCHED = 0x800, 0x41, 0x20
_FIRST_DAY = 1 << 5 | 1  # January 1, 1980: the same tensors are the same file
_MOST_REPEATED = 64
_MAX_16, _MAX_32 = 2**16 - 1, 2**32 - 1


class Record(NamedTuple):
    """A record to be written; `write` writes its bytes and returns their CRC-32."""

    name: str
    nbytes: int
    write: Callable[[BinaryIO], int]


def write_zip(path, records: Iterable[Record]) -> None:
    """Write the records one after another, each one's bytes at a multiple of 64."""
    with open(path, "wb") as file:
        directory = []
        for record in records:
            begin = file.tell()
            file.write(_local_header(record, 0, begin))
            checksum = record.write(file)
            end = file.tell()
            file.seek(begin)
            file.write(_local_header(record, checksum, begin))
            file.seek(end)
            directory.append(_central_header(record, checksum, begin))
        begin = file.tell()
        file.write(b"".join(directory))
        file.write(_end(len(directory), begin, file.tell()))


class Check:
    """Compares a record's bytes with its checksum, as `base.Checked` has it."""

    def __init__(self, file: InputFile, record: zipfile.ZipInfo, start: int) -> None:
        self._file, self._record, self._start = file, record, start

    def before(self, begin: int) -> int:
        return self._added(0, self._start, begin)

    def after(self, checksum: int, end: int) -> None:
        if self._added(checksum, end, self._start + self._record.file_size) != self._record.CRC:
            raise ValueError(f"record {self._record.filename!r} is damaged: its checksum does not fit")

    def _added(self, checksum: int, begin: int, end: int) -> int:
        for at in range(begin, end, BLOCK_BYTES):
            checksum = zlib.crc32(self._file[at : min(at + BLOCK_BYTES, end)], checksum)
        return checksum


class _Stream:
    """A file as the standard library reads its directory, which has a limit."""

    def __init__(self, file: InputFile) -> None:
        self._file, self._at = file, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._file)}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning of the file")  # which the standard library expects
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        count = len(self._file) - self._at if count < 0 else count
        if count > MAX_JSON_BYTES:
            raise ValueError(f"the zip's directory has {count} bytes; at most {MAX_JSON_BYTES} are read")
        data = self._file[self._at : self._at + count]
        self._at += len(data)
        return data

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def read_zip(path: Path, parse: Callable, explain: Callable) -> FileContents:
    """What one file holds: parse(records, file, check) of its records and the open file.

    check(record, start) is a `Check` of a record whose bytes begin there, or None in a file without checksums, which
    torch.save writes when it is told to.

    Raises:
        CheckpointError: a ValueError of `parse`; a broken zip, as explain(file, fault) has it.
    """
    file = InputFile(path)
    try:
        with zipfile.ZipFile(_Stream(file)) as archive:
            directory = archive.infolist()
        has_checksums = any(record.CRC for record in directory)
        check = functools.partial(Check, file) if has_checksums else lambda record, start: None
        contents = parse(directory, file, check)
        _check_repeated(contents, len(file))
        return contents
    except ValueError as fault:
        raise CheckpointError(explained(path, fault)) from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError, struct.error) as fault:
        raise CheckpointError(f"{path}: {explain(file, fault)}") from None


def _check_repeated(contents: FileContents, size: int) -> None:
    """What a file may ask for in time and memory is bound by its size, though tensors may share its bytes."""
    total = sum(tensor.span() for tensor in contents.tensors.values())
    if total > _MOST_REPEATED * size:
        raise ValueError(
            f"its tensors share bytes so often that they have {total} together, and the file {size}: more than "
            f"{_MOST_REPEATED} times as many are not read; save tensors that share nothing"
        )


def record_start(file: InputFile, record: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes begin in the file. Raises ValueError, also for a compressed record.

    The local header is asked: its padding is not in the directory. It must have the record's name, as every reader
    of zip files asks, for else it is another record's or damaged.
    """
    if record.flag_bits & (_ENCRYPTED | _PATCHED):
        raise ValueError(f"record {record.filename!r} is encrypted or a patch")
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise ValueError(
            f"record {record.filename!r} is compressed and cannot be mapped; save it with torch.save, or with "
            "np.savez or mx.savez"
        )
    begin = record.header_offset
    header = file[begin : begin + _LOCAL_HEADER.size] if begin >= 0 else b""
    if len(header) < _LOCAL_HEADER.size or header[:4] != _LOCAL_SIGNATURE:
        raise ValueError(f"record {record.filename!r} has no local header at byte {begin}")
    _, _, flags, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = begin + _LOCAL_HEADER.size + name_length + extra_length
    found = file[start - extra_length - name_length : start - extra_length]
    if found.decode("utf-8" if flags & _UTF8 else "cp437", "replace") != record.orig_filename:
        raise ValueError(f"record {record.filename!r} is named {found[:120]!r} by the header before its bytes")
    if start + record.file_size > len(file):
        raise ValueError(f"record {record.filename!r} runs past the end of the file")
    return start


def _local_header(record: Record, checksum: int, begin: int) -> bytes:
    """The header that ends at a multiple of 64 if it begins there, padded by an extra field as torch.save does."""
    name, extra = record.name.encode(), _extra_64(record.nbytes, record.nbytes)
    padding = -(begin + _LOCAL_HEADER.size + len(name) + len(extra) + _EXTRA_FIELD.size) % ALIGNMENT
    extra += _EXTRA_FIELD.pack(b"FB", padding) + b"Z" * padding
    return _LOCAL_HEADER.pack(_LOCAL_SIGNATURE, *_fields(record, checksum, name, extra)) + name + extra


def _central_header(record: Record, checksum: int, begin: int) -> bytes:
    name, extra = record.name.encode(), _extra_64(record.nbytes, record.nbytes, begin)
    fields = _fields(record, checksum, name, extra)
    # No comment, disk 0, no attributes.
    rest = 0, 0, 0, 0, min(begin, _MAX_32)
    return _CENTRAL_HEADER.pack(_CENTRAL_SIGNATURE, _VERSION, *fields, *rest) + name + extra


def _fields(record: Record, checksum: int, name: bytes, extra: bytes) -> tuple[int, ...]:
    nbytes = min(record.nbytes, _MAX_32)
    return _VERSION, _UTF8, zipfile.ZIP_STORED, 0, _FIRST_DAY, checksum, nbytes, nbytes, len(name), len(extra)


def _extra_64(*numbers: int) -> bytes:
    """The extra field of the numbers that their fields of 32 bits cannot hold."""
    large = [number for number in numbers if number >= _MAX_32]
    return struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""


def _end(count: int, directory: int, end: int) -> bytes:
    numbers = count, count, end - directory, directory
    end_64 = b""
    if count >= _MAX_16 or end >= _MAX_32:
        end_64 = _END_64.pack(b"PK\x06\x06", _END_64.size - 12, _VERSION, _VERSION, 0, 0, *numbers)
        end_64 += _LOCATOR_64.pack(b"PK\x06\x07", 0, end, 1)
    small = (min(number, limit) for number, limit in zip(numbers, (_MAX_16, _MAX_16, _MAX_32, _MAX_32), strict=True))
    return end_64 + _END.pack(b"PK\x05\x06", 0, 0, *small, 0)
