"""What the checkpoint formats share: the table of dtypes, a tensor's place in a file, and how tensors are written."""

import math
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np

from mamba_core.weights.formats.errors import CheckpointError, shorten
from mamba_core.weights.formats.files import BLOCK_BYTES, InputFile

MAX_AXES = 64  # NumPy's limit, and torch's
BLOCKS_WAITING = 8
# A view of a storage is read with what lies between its elements, and is packed where that is more than the elements.
_LOOSE = 2


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


class Checked(Protocol):
    """The checksum of the record of a file in which tensors lie."""

    def before(self, begin: int) -> int:
        """The checksum of the record's bytes before that place of the file."""

    def after(self, checksum: int, end: int) -> None:
        """Compare the checksum of the record's bytes up to that place, once the rest is read.

        Raises:
            ValueError: it does not fit.
        """


class StoredTensor(NamedTuple):
    """A tensor's place in a file: `offset` in bytes, `strides` in elements, None for row-major.

    check: of the record that it lies in; None where nothing tells whether its bytes are those that were written.
    """

    file: InputFile
    offset: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    check: Checked | None = None

    def header(self) -> Header:
        return Header(self.shape, self.dtype, count_bytes(self.shape, self.dtype))

    def span(self) -> int:
        """The bytes from its first to its last, what lies between its elements included."""
        itemsize = DTYPES[self.dtype].numpy.itemsize
        if self.strides is None or 0 in self.shape:
            return count_bytes(self.shape, self.dtype)
        return itemsize * (1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)))

    def array(self) -> np.ndarray:
        """The tensor, read now. It is read-only.

        Raises:
            CheckpointError: the file was changed since it was opened.
            ValueError: the bytes have not their checksum.
        """
        dtype = DTYPES[self.dtype].numpy
        data = self.file.scratch.take(self.span())
        for _ in self._blocks(data):
            pass
        strides = None if self.strides is None else tuple(stride * dtype.itemsize for stride in self.strides)
        array = np.ndarray(self.shape, dtype, data, 0, strides)
        if data.size > _LOOSE * array.nbytes:
            array = array.copy()
        array.flags.writeable = False
        return array

    def blocks(self) -> Iterator[np.ndarray]:
        """Its elements, row-major, as flat pieces of at most BLOCK_BYTES, each read when its turn comes."""
        if self.strides is not None:
            yield from blocks(self.array())
            return
        for block in self._blocks(None):
            yield block.view(DTYPES[self.dtype].numpy)

    def _blocks(self, data: np.ndarray | None) -> Iterator[np.ndarray]:
        """The bytes of the span a block at a time, as they come to be in `data`, or each in an array of its own."""
        count = self.span()
        checksum = 0 if self.check is None else self.check.before(self.offset)
        for begin in range(0, count, BLOCK_BYTES):
            size = min(BLOCK_BYTES, count - begin)
            block = self.file.pieces.take(size) if data is None else data[begin : begin + size]
            self.file.read_into(block, self.offset + begin)
            checksum = checksum if self.check is None else zlib.crc32(block.data, checksum)
            yield block
        if self.check is not None:
            self.check.after(checksum, self.offset + count)


class FileContents(NamedTuple):
    """The tensors and the metadata of one file.

    skipped: names of what lies beside the tensors and is not read, such as an optimizer's state.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    skipped: tuple[str, ...] = ()


class TensorSource(NamedTuple):
    """A tensor to be written; `read` is called when its turn comes, and once more for the fault of a cast.

    dtype: what is written. cast_from: the dtype of what `read` gives, where that is another one.
    stream: gives what `read` does as `blocks` has it, for a tensor that need not be in memory whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    cast_from: str | None = None
    stream: Callable[[], Iterator[np.ndarray]] | None = None


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
        self.settle()
        return self._checksums[name]

    def settle(self) -> None:
        """Wait until no block waits. A block may hold the memory of a whole tensor."""
        while self._pending:
            self._pending.popleft().result()

    def _record(self, name: str, block: np.ndarray) -> None:
        self._checksums[name] = zlib.crc32(block.view(np.uint8).data, self._checksums[name])


def sources_of(arrays: Mapping[str, np.ndarray]) -> Iterator[TensorSource]:
    """The sources of a mapping of arrays. Of an opened checkpoint they read no data until written."""
    headers = getattr(arrays, "header", None)
    for name in arrays:
        shape, dtype = headers(name)[:2] if headers else (arrays[name].shape, arrays[name].dtype.name)
        yield TensorSource(name, shape, dtype, partial(arrays.__getitem__, name))


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
    for block in blocks(_read(source)) if source.stream is None else source.stream():
        written = block if source.cast_from is None else _cast(block, source)
        if progress is not None:
            progress(source.name, written)
        file.write(written.view(np.uint8))


def _read(source: TensorSource) -> np.ndarray:
    array = np.asarray(source.read())
    expected = source.cast_from or source.dtype
    if array.shape != source.shape or array.dtype != DTYPES[expected].numpy:
        raise CheckpointError(
            f"tensor {source.name!r} was announced as {expected} {source.shape} but is {array.dtype} {array.shape}"
        )
    return array


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's elements, row-major, as flat pieces of at most BLOCK_BYTES.

    Of an array whose elements do not follow one another some entries of the first axis are copied at a time.
    """
    if not array.flags.c_contiguous and array.ndim > 1 and array.size:
        entries = max(1, BLOCK_BYTES // array[0].nbytes)
        for begin in range(0, len(array), entries):
            yield from blocks(np.ascontiguousarray(array[begin : begin + entries]))
        return
    flat = np.ascontiguousarray(array).reshape(-1)
    step = BLOCK_BYTES // flat.itemsize
    for begin in range(0, flat.size, step):
        yield flat[begin : begin + step]


def fill(target: np.ndarray, pieces: Iterable[np.ndarray]) -> None:
    """Write an array's elements, row-major, from flat pieces such as `blocks` gives, as many as it has."""
    runs = _runs(target)
    run = target[:0].reshape(-1)
    for piece in pieces:
        while piece.size:
            run = run if run.size else next(runs)
            count = min(run.size, piece.size)
            run[:count] = piece[:count]
            run, piece = run[count:], piece[count:]


def _runs(target: np.ndarray) -> Iterator[np.ndarray]:
    """The parts of an array that are flat without a copy, row-major."""
    if target.flags.c_contiguous or target.ndim == 1:
        yield target.reshape(-1)
    else:
        for entry in target:
            yield from _runs(entry)


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements of a float array are NaN or infinite, found in their bits, which is fast for any dtype."""
    unsigned, signed = array.view(f"u{array.itemsize}"), array.view(f"i{array.itemsize}")
    infinities = np.array([np.inf, -np.inf], array.dtype)
    positive, negative = infinities.view(signed.dtype)[0], infinities.view(unsigned.dtype)[1]
    # As integers those of either sign lie at its upper end, so two maxima tell that there are none.
    if signed.max(initial=0) < positive and unsigned.max(initial=0) < negative:
        return 0
    return int(np.count_nonzero(signed >= positive) + np.count_nonzero(unsigned >= negative))


def _cast(block: np.ndarray, source: TensorSource) -> np.ndarray:
    dtype = DTYPES[source.dtype].numpy
    with np.errstate(over="ignore", invalid="ignore"):
        cast = block.astype(dtype)
    if count_nonfinite(cast) > count_nonfinite(block):
        values = (np.abs(part.astype(np.float64)) for part in blocks(_read(source)))
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
        raise ValueError(f"shape {shorten(shape)} has an axis that is not a non-negative integer")
    itemsize = DTYPES[dtype].numpy.itemsize
    # NumPy multiplies out the other axes of an empty array too.
    if len(shape) > MAX_AXES or math.prod(length for length in shape if length) * itemsize >= 2**63:
        raise ValueError(f"shape {shorten(shape)} is too large for an array")
    return math.prod(shape) * itemsize
