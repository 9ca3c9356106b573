"""What the checkpoint formats share: the table of dtypes, a tensor's place in a mapped file, the error, strict JSON."""

import json
import math
import mmap
import reprlib
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Self

import ml_dtypes
import numpy as np

MAX_JSON_BYTES = 100_000_000  # the limit that safetensors itself sets on a header
MAX_AXES = 64  # NumPy's limit, and torch's
MAX_MESSAGE = 2000
_SHALLOW = reprlib.Repr()
_SHALLOW.maxlevel = 2
# Small enough to stay in a processor's cache while it is cast, hashed and written.
BLOCK_BYTES = 2**20
BLOCKS_WAITING = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one line that names the file and the fault."""

    def __init__(self, message: str) -> None:
        # Names and fields of a hostile file may hold line ends and a terminal's commands, and be of any length.
        message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
        super().__init__("".join(part if part.isprintable() else repr(part)[1:-1] for part in message))


class DType(NamedTuple):
    """The names of one dtype. `torch_storage` is None where torch saves it as untyped bytes."""

    safetensors: str
    torch_storage: str | None
    numpy: np.dtype


DTYPES = {
    "float64": DType("F64", "DoubleStorage", np.dtype("<f8")),
    "float32": DType("F32", "FloatStorage", np.dtype("<f4")),
    "float16": DType("F16", "HalfStorage", np.dtype("<f2")),
    "bfloat16": DType("BF16", "BFloat16Storage", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": DType("F8_E4M3", None, np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": DType("F8_E5M2", None, np.dtype(ml_dtypes.float8_e5m2)),
    "int64": DType("I64", "LongStorage", np.dtype("<i8")),
    "int32": DType("I32", "IntStorage", np.dtype("<i4")),
    "int16": DType("I16", "ShortStorage", np.dtype("<i2")),
    "int8": DType("I8", "CharStorage", np.dtype("i1")),
    "uint64": DType("U64", None, np.dtype("<u8")),
    "uint32": DType("U32", None, np.dtype("<u4")),
    "uint16": DType("U16", None, np.dtype("<u2")),
    "uint8": DType("U8", "ByteStorage", np.dtype("u1")),
    "bool": DType("BOOL", "BoolStorage", np.dtype("?")),
}
# The dtypes of parameters and of decode states.
FLOATS = ("float32", "bfloat16", "float16", "float64")


class Header(NamedTuple):
    """What a file says of a tensor without its data being read."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class StoredTensor(NamedTuple):
    """A tensor's place in a mapped file: `offset` in bytes, `strides` in elements, None for row-major.

    check: raises CheckpointError if its bytes are not those that were written; None where nothing tells.
    """

    buffer: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    check: Callable[[], None] | None = None

    def header(self) -> Header:
        return Header(self.shape, self.dtype, count_bytes(self.shape, self.dtype))

    def array(self) -> np.ndarray:
        """A read-only view of the file.

        Raises:
            CheckpointError: the bytes have not their checksum.
        """
        if self.check is not None:
            self.check()
        dtype = DTYPES[self.dtype].numpy
        strides = None if self.strides is None else tuple(stride * dtype.itemsize for stride in self.strides)
        return np.ndarray(self.shape, dtype, self.buffer, self.offset, strides)

    def release(self) -> None:
        """Let the system take back the memory of the file's pages; they are read again when they are used again."""
        if hasattr(self.buffer, "madvise"):  # not on Windows
            self.buffer.madvise(mmap.MADV_DONTNEED)


class FileContents(NamedTuple):
    """The tensors and the metadata of one file.

    skipped: names of what lies beside the tensors and is not read, such as an optimizer's state.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    skipped: tuple[str, ...] = ()


class TensorSource(NamedTuple):
    """A tensor to be written; `read` is called once, when its turn comes.

    dtype: what is written. cast_from: the dtype of what `read` gives, where that is another one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    cast_from: str | None = None


class Progress:
    """What has been written: a checksum of each tensor's bytes, computed in a thread beside the writing."""

    def __init__(self) -> None:
        self._checksums: Counter[str] = Counter()
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown()

    def __call__(self, name: str, block: np.ndarray) -> None:
        """Take a block of a tensor, flat and in the dtype that is written, before it is written."""
        # Some blocks may wait, so that neither thread does for each of the other's; few, for they are in memory.
        if len(self._pending) == BLOCKS_WAITING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._record, name, block))

    def checksum(self, name: str) -> int:
        """CRC-32 of what has been written of a tensor."""
        while self._pending:
            self._pending.popleft().result()
        return self._checksums[name]

    def _record(self, name: str, block: np.ndarray) -> None:
        self._checksums[name] = zlib.crc32(block.view(np.uint8).data, self._checksums[name])


def sources_of(arrays: Mapping[str, np.ndarray]) -> Iterator[TensorSource]:
    """The sources of a mapping of arrays. Of an opened checkpoint they touch no data until written."""
    for name in arrays:
        array = arrays[name]
        yield TensorSource(name, array.shape, array.dtype.name, partial(arrays.__getitem__, name))


def checked_sources(target, tensors: Iterable[TensorSource]) -> list[TensorSource]:
    """The sources as a list, every fault of their names, shapes and dtypes raised together."""
    sources, faults, seen = [], [], set()
    for source in (TensorSource(*tensor) for tensor in tensors):
        source = source._replace(shape=tuple(source.shape))
        if source.name in seen:
            faults.append(f"{source.name!r} is given twice")
        seen.add(source.name)
        try:
            count_bytes(source.shape, source.dtype)
        except ValueError as fault:
            faults.append(f"{source.name!r}: {fault}")
        sources.append(source)
    if faults:
        raise CheckpointError(f"{target}: cannot be written: {'; '.join(faults)}")
    return sources


def write_tensor(file, source: TensorSource, progress: Callable[[str, np.ndarray], None] | None = None) -> None:
    """Write the bytes of a source, row-major and little-endian, a block at a time."""
    array = np.asarray(source.read())
    expected = source.cast_from or source.dtype
    if array.shape != source.shape or array.dtype != DTYPES[expected].numpy:
        raise CheckpointError(
            f"tensor {source.name!r} was announced as {expected} {source.shape} but is {array.dtype} {array.shape}"
        )
    for block in blocks(array):
        written = block if source.cast_from is None else _cast(block, source, array)
        if progress is not None:
            progress(source.name, written)
        file.write(written.view(np.uint8))


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's elements, row-major, as flat pieces of at most BLOCK_BYTES."""
    flat = np.ascontiguousarray(array).reshape(-1)
    step = BLOCK_BYTES // flat.itemsize
    for begin in range(0, flat.size, step):
        yield flat[begin : begin + step]


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements of a float array are NaN or infinite, found in their bits, which is fast for any dtype."""
    unsigned, signed = array.view(f"u{array.itemsize}"), array.view(f"i{array.itemsize}")
    infinities = np.array([np.inf, -np.inf], array.dtype)
    positive, negative = infinities.view(signed.dtype)[0], infinities.view(unsigned.dtype)[1]
    # As integers those of either sign lie at its upper end, so two maxima tell that there are none.
    if signed.max(initial=0) < positive and unsigned.max(initial=0) < negative:
        return 0
    return int(np.count_nonzero(signed >= positive) + np.count_nonzero(unsigned >= negative))


def _cast(block: np.ndarray, source: TensorSource, array: np.ndarray) -> np.ndarray:
    dtype = DTYPES[source.dtype].numpy
    with np.errstate(over="ignore", invalid="ignore"):
        cast = block.astype(dtype)
    if count_nonfinite(cast) > count_nonfinite(block):
        values = (np.abs(part.astype(np.float64)) for part in blocks(array))
        largest = max(float(part.max(where=np.isfinite(part), initial=0.0)) for part in values)
        raise CheckpointError(
            f"tensor {source.name!r} cannot be written as {source.dtype}: its largest value, {largest:g}, would become "
            f"infinite; choose another dtype"
        )
    return cast


def count_bytes(shape, dtype: str) -> int:
    """The size of a tensor. Raises ValueError for a shape or dtype that no array can have."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"shape {_shorten(shape)} has an axis that is not a non-negative integer")
    itemsize = DTYPES[dtype].numpy.itemsize
    # NumPy multiplies out the other axes of an empty array too.
    if len(shape) > MAX_AXES or math.prod(length for length in shape if length) * itemsize >= 2**63:
        raise ValueError(f"shape {_shorten(shape)} is too large for an array")
    return math.prod(shape) * itemsize


def map_file(file) -> mmap.mmap:
    """The open file, mapped. The map outlives the file's name, so a checkpoint can be replaced while it is read."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(f"{file.name}: the file is empty") from None


def parse_json(data: bytes) -> dict:
    """A JSON object in UTF-8. Raises ValueError, also for a key that appears twice."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ValueError(f"not valid JSON: {fault}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def list_names(names: Iterable[str], limit: int = 8) -> str:
    """Names for an error message, quoted, the first few of many."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(_shorten(name) for name in names[:limit]) + more


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"keys that appear twice: {list_names(key for key in counts if counts[key] > 1)}")
    return value


def _shorten(value, limit: int = 120) -> str:
    # A pickle can nest shared tuples so that their whole text would have no end.
    text = repr(value) if isinstance(value, str) else _SHALLOW.repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
