"""The pickle inside a torch checkpoint, read and written without the pickle machine.

The opcodes are data here: those that a dictionary of tensors needs are interpreted into plain values and the
stand-ins below, every other one is refused, and nothing is ever imported or called. Values of a few harmless classes
that training scripts keep beside the weights are dropped. An interpreter of our own rather
than `pickle.Unpickler` with a whitelist, because the latter allocates what a hostile file asks for (a memo of 2**32
slots), sets attributes on whatever the whitelist returns, and hashes keys that take exponential time.
"""

import pickle
import pickletools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mamba_core.weights.formats.base import DTYPES, TensorSource, count_bytes
from mamba_core.weights.formats.errors import list_names


class Global(NamedTuple):
    """A name that the pickle imports."""

    module: str
    name: str


class Storage(NamedTuple):
    """The record `key` of the archive: `length` elements of `dtype`, or `length` bytes where that is None."""

    dtype: str | None
    key: str
    length: int


class PickledTensor(NamedTuple):
    """A tensor as torch rebuilds it: offset, shape and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Dropped(NamedTuple):
    """A value that holds no tensor, of a class that training scripts keep beside the weights."""

    kind: str


_ORDERED_DICT = Global("collections", "OrderedDict")
_SIZE = Global("torch", "Size")
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_TENSOR_OF_BYTES = Global("torch._utils", "_rebuild_tensor_v3")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_PARAMETER_WITH_STATE = Global("torch._utils", "_rebuild_parameter_with_state")
_BYTES = Global("torch.storage", "UntypedStorage")
_STORAGES: dict[Global, str | None] = {
    Global("torch", dtype.torch_storage): name for name, dtype in DTYPES.items() if dtype.torch_storage
}
_STORAGES[_BYTES] = None
_TORCH_DTYPES = {Global("torch", name): name for name in DTYPES}
_OTHER_TORCH_DTYPES = ("complex32", "complex64", "complex128", "quint8", "qint8", "qint32")
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_DROPPED = {
    Global("argparse", "Namespace"),
    Global("torch", "device"),
    Global("_codecs", "encode"),  # the bytes of what follows
    *(Global("numpy", name) for name in ("dtype", "ndarray")),
    *(Global(module, name) for module in _NUMPY for name in ("scalar", "_reconstruct")),
    *(Global(module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(Global("torch", name) for name in _OTHER_TORCH_DTYPES),
}
_KNOWN_GLOBALS = {
    *(_ORDERED_DICT, _SIZE, _TENSOR, _TENSOR_OF_BYTES, _PARAMETER, _PARAMETER_WITH_STATE),
    *_STORAGES,
    *_TORCH_DTYPES,
    *_DROPPED,
}


def load_pickle(data: bytes):
    """The value of a pickle. Raises ValueError for whatever is not part of a dictionary of tensors."""
    machine = _Machine()
    try:
        for opcode, argument in _opcodes(data):
            machine.step(opcode, argument)
        return machine.stack.pop()
    except (IndexError, KeyError):
        raise ValueError("the pickle is malformed: it uses a value that it never made") from None


# --- reading ---------------------------------------------------------------------------------------


def _opcodes(data: bytes) -> Iterator[tuple[str, object]]:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            yield opcode.name, argument
    except ValueError as fault:
        raise ValueError(f"the pickle is malformed: {fault}") from None


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" if argument != 2:
                raise ValueError(f"pickle protocol {argument} is not read; save it with torch.save's own, 2")
            case "PROTO" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode]())
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(opcode[-1]))))
            case "APPEND" | "APPENDS":
                _extend(*self.pop_items(opcode, 1))
            case "SETITEM" | "SETITEMS":
                _update(*self.pop_items(opcode, 2))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_find_global(argument))
            case "BINPERSID":
                stack.append(_find_storage(stack.pop()))
            case "REDUCE":
                stack.append(_call(*self.pop(2)))
            case "NEWOBJ":
                kind, arguments = self.pop(2)
                if not isinstance(kind, Global) or kind not in _DROPPED or not isinstance(arguments, tuple):
                    raise ValueError(f"the pickle uses opcode {opcode} for what no dictionary of tensors needs")
                stack.append(Dropped(".".join(kind)))
            case "BUILD":
                # The attributes of a state_dict, its `_metadata`, are dropped.
                stack.pop()
                if not isinstance(stack[-1], (dict, Dropped)):
                    raise ValueError("the pickle sets attributes on something that is not a dictionary")
            case _:
                raise ValueError(f"the pickle uses opcode {opcode}, which no dictionary of tensors needs")

    def pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def pop_items(self, opcode: str, width: int) -> tuple[object, list]:
        """The container that stays on the stack, and the values for it."""
        values = self.pop_to_mark() if opcode.endswith("S") else self.pop(width)
        return self.stack[-1], values


def _extend(container, values: list) -> None:
    if not isinstance(container, list):
        raise ValueError("the pickle appends to something that is not a list")
    container.extend(values)


def _update(container, values: list) -> None:
    if not isinstance(container, dict) or len(values) % 2:
        raise ValueError("the pickle sets items of something that is not a dictionary")
    keys = values[::2]
    if not all(isinstance(key, str | int) for key in keys):
        raise ValueError("the pickle has a dictionary key that is neither text nor an integer")
    container.update(zip(keys, values[1::2], strict=True))


def _find_global(argument: str) -> Global:
    found = Global(*argument.split(" ", 1))
    if found not in _KNOWN_GLOBALS:
        raise ValueError(
            f"the pickle asks for {list_names(['.'.join(found)])}, which is not executed; save the weights alone, such "
            "as by torch.save(model.state_dict(), path)"
        )
    return found


def _find_storage(reference) -> Storage:
    match reference:
        case ("storage", Global() as kind, str(key), _, int(length)) if kind in _STORAGES and length >= 0:
            return Storage(_STORAGES[kind], key, length)
    raise ValueError("the pickle has a persistent id that is not a tensor's storage")


def _call(function, arguments):
    """What torch's function would return, as a plain value."""
    match function, arguments:
        case Global(), () if function == _ORDERED_DICT:
            return {}
        case Global(), (tuple(size),) if function == _SIZE:
            return size
        case Global(), (Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _) if function == _TENSOR:
            return PickledTensor(storage, storage.dtype, offset, shape, strides)
        case Global(), (Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, Global() as dtype) if (
            function == _TENSOR_OF_BYTES and dtype in _TORCH_DTYPES
        ):
            return PickledTensor(storage, _TORCH_DTYPES[dtype], offset, shape, strides)
        case Global(), (PickledTensor() as data, _, _) if function == _PARAMETER:
            return data
        case Global(), (PickledTensor() as data, _, _, _) if function == _PARAMETER_WITH_STATE:
            return data
        case Global(), tuple() if function in _DROPPED:
            return Dropped(".".join(function))
    name = ".".join(function) if isinstance(function, Global) else type(function).__name__
    raise ValueError(f"the pickle calls {name} with arguments that are not read here")


# --- writing ---------------------------------------------------------------------------------------


def dump_state_dict(sources: Iterable[TensorSource]) -> bytes:
    """An OrderedDict of tensors, the data of the i-th in the record of that number."""
    parts = [pickle.PROTO, b"\x02", _dump_global(_ORDERED_DICT), b")R", pickle.MARK]
    for number, source in enumerate(sources):
        parts += [_dump(source.name), _dump_tensor(source, str(number))]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _dump_tensor(source: TensorSource, key: str) -> bytes:
    storage = DTYPES[source.dtype].torch_storage
    nbytes = count_bytes(source.shape, source.dtype)
    if storage is None:
        kind, length, rebuild = _BYTES, nbytes, _TENSOR_OF_BYTES
        dtype = _dump_global(Global("torch", source.dtype))
    else:
        kind, length, rebuild = Global("torch", storage), nbytes // DTYPES[source.dtype].numpy.itemsize, _TENSOR
        dtype = b""
    reference = [_dump("storage"), _dump_global(kind), _dump(key), _dump("cpu"), _dump(length)]
    arguments = [
        _dump_tuple(reference) + pickle.BINPERSID,
        *(_dump(0), _dump_tuple(map(_dump, source.shape)), _dump_tuple(map(_dump, _row_major(source.shape)))),
        *(pickle.NEWFALSE, _dump_global(_ORDERED_DICT) + b")R", dtype),
    ]
    return _dump_global(rebuild) + _dump_tuple(arguments) + pickle.REDUCE


def _row_major(shape: tuple[int, ...]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(shape[axis], 1)
    return strides


def _dump(value: str | int) -> bytes:
    if isinstance(value, str):
        text = value.encode("utf-8")
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _dump_global(name: Global) -> bytes:
    return pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode()


def _dump_tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
