"""Input files: the one way in which this project opens what it is given to read.

Only a regular file is opened: a FIFO might never answer, and a device never end. What is read whole has a limit. What
is large is read by place: a file that is cut short or changed meanwhile is then an error, where a memory map would end
the process with a signal.
"""

import gc
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mamba_core.weights.formats.errors import CheckpointError, explained, list_names
from mamba_core.weights.formats.scratch import Scratch

MAX_JSON_BYTES = 100_000_000  # the limit that safetensors itself sets on a header
# Small enough to stay in a processor's cache while it is cast, hashed and written.
BLOCK_BYTES = 2**20
_PIECES = 12
_AT_ONCE = 2**30  # Linux reads a little less than 2**31 bytes in a call
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO or a pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)
# A FIFO that takes a file's place after it was looked at is not waited for, nor does a terminal become this process's.
_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)


class InputFile:
    """A regular file that is open for reading by place. It outlives its name, so that it can be replaced meanwhile.

    scratch: memory for a tensor of it, two of which are held where one is used while the next is read.
    pieces: memory for blocks, some of which wait to be written.

    Raises:
        CheckpointError: it is no regular file, or an empty one.
        OSError: it cannot be opened.
    """

    def __init__(self, path) -> None:
        self.path = Path(path)
        self.scratch, self.pieces = Scratch(), Scratch(_PIECES)
        self._descriptor = -1
        self._descriptor = open_input(path)
        self._state = _state(self._descriptor)
        if len(self) == 0:
            raise CheckpointError(f"{path}: the file is empty")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def __len__(self) -> int:
        return self._state[0]

    def __getitem__(self, place: slice) -> bytes:
        """The bytes of a slice, as `bytes` has it."""
        begin, end, _ = place.indices(len(self))
        return b"".join(self._pieces(begin, end))

    def read_into(self, block: np.ndarray, begin: int) -> None:
        """Fill a contiguous array of bytes.

        Raises:
            CheckpointError: the file was cut short or changed since it was opened.
        """
        done = 0
        while done < len(block):
            count = _read_into(self._descriptor, block.data[done : done + _AT_ONCE], begin + done)
            self._check(count)
            done += count

    def _pieces(self, begin: int, end: int) -> Iterator[bytes]:
        while begin < end:
            piece = _read(self._descriptor, min(end - begin, _AT_ONCE), begin)
            self._check(len(piece))
            begin += len(piece)
            yield piece

    def _check(self, count: int) -> None:
        size, _ = state = _state(self._descriptor)
        if not count or size < len(self):
            raise CheckpointError(f"{self.path}: was cut short while it was read, from {len(self)} to {size} bytes")
        if state != self._state:
            raise CheckpointError(f"{self.path}: was changed while it was read; read it when nothing writes it")


def open_input(path) -> int:
    """The descriptor of a regular file, to be closed by the caller.

    Raises:
        CheckpointError: it is something else, which the message says.
        OSError: there is none, or it cannot be opened.
    """
    # Before it is opened too: to open a device can do something to it.
    _check_regular(path, os.stat(path).st_mode)
    descriptor = os.open(path, _FLAGS)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_input(path, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a regular file.

    Raises:
        CheckpointError: it is none, or larger than `limit` bytes.
        OSError: there is none, or it cannot be opened.
    """
    with open(open_input(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        # Some files of the system have no size and an end, and others none.
        data = b"" if size > limit else _read_all(file, limit + 1)
    if size > limit or len(data) > limit:
        raise CheckpointError(f"{path}: has more than {limit} bytes, which is the most that is read of such a file")
    return data


def read_json(path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is no regular file, too large, or none in JSON.
        OSError: there is none, or it cannot be opened.
    """
    try:
        return parse_json(read_input(path))
    except ValueError as fault:
        raise CheckpointError(explained(path, fault)) from None


def parse_json(data: bytes) -> dict:
    """A JSON object in UTF-8. Raises ValueError, also for a key that appears twice."""
    try:
        with uncollected():
            value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ValueError(f"not valid JSON: {fault}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


@contextmanager
def uncollected() -> Iterator[None]:
    """Python looks for garbage only after the block, where a file asks for a million objects that all stay.

    Each search would visit them all and call what other packages have bound to it, as JAX has: most of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"keys that appear twice: {list_names(key for key in counts if counts[key] > 1)}")
    return value


def _check_regular(path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "no file")
        raise CheckpointError(f"{path}: is {kind}; expected a regular file")


def _read_all(file, limit: int) -> bytes:
    parts, left = [], limit
    while left and (part := file.read(min(left, BLOCK_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _state(descriptor: int) -> tuple[int, int]:
    """Size and time of the last change."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


if hasattr(os, "preadv"):

    def _read(descriptor: int, count: int, begin: int) -> bytes:
        return os.pread(descriptor, count, begin)

    def _read_into(descriptor: int, view: memoryview, begin: int) -> int:
        return os.preadv(descriptor, [view], begin)

else:  # on Windows, and on a Mac before 11: the place is the file's, so that no two threads may read it at once
    import threading

    _LOCK = threading.Lock()

    def _read(descriptor: int, count: int, begin: int) -> bytes:
        with _LOCK:
            os.lseek(descriptor, begin, os.SEEK_SET)
            return os.read(descriptor, count)

    def _read_into(descriptor: int, view: memoryview, begin: int) -> int:
        data = _read(descriptor, min(len(view), BLOCK_BYTES), begin)
        view[: len(data)] = data
        return len(data)
