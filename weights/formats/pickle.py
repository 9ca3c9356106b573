"""The pickle inside a torch checkpoint, read and written without the pickle machine.

The opcodes are data here: those that a dictionary of tensors needs are interpreted into plain values and the
stand-ins below, every other one is refused, and nothing is ever imported or called. Values of a few harmless classes
that training scripts keep beside the weights are dropped. An interpreter of our own rather
than `pickle.Unpickler` with a whitelist, because the latter allocates what a hostile file asks for (a memo of 2**32
slots), sets attributes on whatever the whitelist returns, and hashes keys that take exponential or quadratic time.
"""

import pickle
import pickletools
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mamba_core.weights.formats.base import DTYPES, TensorSource, count_bytes
from mamba_core.weights.formats.errors import list_names
from mamba_core.weights.formats.files import uncollected


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


class Number(NamedTuple):
    """An integer as a dictionary's key: its text, because a file can choose integers that all have one hash."""

    text: str

    def __repr__(self) -> str:
        return self.text


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
    """The value of a pickle. Raises ValueError for whatever is not part of a dictionary of tensors.

    It takes time in proportion to its bytes, a fraction of a second a megabyte, and memory of at most 80 bytes a byte.
    """
    machine = _Machine(data)
    try:
        with uncollected():
            return machine.run()
    except (IndexError, struct.error):
        raise ValueError("the pickle is malformed: it ends early, or uses a value that it never made") from None
    except UnicodeDecodeError as fault:
        raise ValueError(f"the pickle is malformed: {fault}") from None


# --- reading ---------------------------------------------------------------------------------------


class _Machine:
    """What the opcodes act on. memo: what was put there, by its number, which the pickler counts."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self):
        data, steps = self.data, _STEPS
        while (opcode := data[self.at]) != _STOP:
            self.at += 1
            steps[opcode](self)
        return self.stack.pop()

    def unpack(self, form: struct.Struct):
        """The number that stands there."""
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) < count:
            raise IndexError
        self.at += count
        return found

    def line(self) -> str:
        if (end := self.data.find(b"\n", self.at)) < 0:
            raise IndexError
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

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

    def push(self, value) -> None:
        self.stack.append(value)

    def put(self, number: int) -> None:
        value = self.stack[-1]
        if number >= len(self.data):  # each takes two bytes, and their numbers have no gaps
            raise IndexError
        self.memo += [_NOTHING] * (number + 1 - len(self.memo))
        self.memo[number] = value

    def get(self, number: int) -> None:
        if (value := self.memo[number]) is _NOTHING:
            raise IndexError
        self.stack.append(value)


_NOTHING = object()
_BYTE, _SHORT, _INT, _UNSIGNED, _DOUBLE = map(struct.Struct, ("<B", "<H", "<i", "<I", ">d"))


def _protocol(machine: _Machine) -> None:
    if (version := machine.unpack(_BYTE)) != 2:
        raise ValueError(f"pickle protocol {version} is not read; save it with torch.save's own, 2")


def _new_object(machine: _Machine) -> None:
    kind, arguments = machine.pop(2)
    if not isinstance(kind, Global) or kind not in _DROPPED or not isinstance(arguments, tuple):
        raise ValueError("the pickle uses opcode NEWOBJ for what no dictionary of tensors needs")
    machine.push(Dropped(".".join(kind)))


def _build(machine: _Machine) -> None:
    # The attributes of a state_dict, its `_metadata`, are dropped.
    machine.stack.pop()
    if not isinstance(machine.stack[-1], (dict, Dropped)):
        raise ValueError("the pickle sets attributes on something that is not a dictionary")


def _tuple_1(machine: _Machine) -> None:
    machine.stack[-1] = (machine.stack[-1],)


def _refused(opcode: int):
    name = next((known.name for known in pickletools.opcodes if known.code == chr(opcode)), None)
    fault = f"is malformed: it uses {bytes([opcode])!r}, which is no opcode"
    if name is not None:
        fault = f"uses opcode {name}, which no dictionary of tensors needs"

    def refuse(machine: _Machine) -> None:
        raise ValueError(f"the pickle {fault}")

    return refuse


# By the opcode's byte. Those of a dictionary of tensors, and none that imports or calls.
_STOP = pickle.STOP[0]
_STEPS: list[Callable[[_Machine], None]] = [_refused(opcode) for opcode in range(256)]
for _opcode, _step in {
    pickle.PROTO: _protocol,
    pickle.NONE: lambda machine: machine.stack.append(None),
    pickle.NEWTRUE: lambda machine: machine.stack.append(True),
    pickle.NEWFALSE: lambda machine: machine.stack.append(False),
    pickle.BININT: lambda machine: machine.push(machine.unpack(_INT)),
    pickle.BININT1: lambda machine: machine.push(machine.unpack(_BYTE)),
    pickle.BININT2: lambda machine: machine.push(machine.unpack(_SHORT)),
    pickle.LONG1: lambda machine: machine.push(
        int.from_bytes(machine.take(machine.unpack(_BYTE)), "little", signed=True)
    ),
    pickle.BINFLOAT: lambda machine: machine.push(machine.unpack(_DOUBLE)),
    pickle.BINUNICODE: lambda machine: machine.push(
        machine.take(machine.unpack(_UNSIGNED)).decode("utf-8", "surrogatepass")
    ),
    pickle.EMPTY_DICT: lambda machine: machine.stack.append({}),
    pickle.EMPTY_LIST: lambda machine: machine.stack.append([]),
    pickle.EMPTY_TUPLE: lambda machine: machine.stack.append(()),
    pickle.MARK: lambda machine: machine.marks.append(len(machine.stack)),
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.pop_to_mark())),
    pickle.TUPLE1: _tuple_1,
    pickle.TUPLE2: lambda machine: machine.push(tuple(machine.pop(2))),
    pickle.TUPLE3: lambda machine: machine.push(tuple(machine.pop(3))),
    pickle.APPEND: lambda machine: _extend(machine, machine.pop(1)),
    pickle.APPENDS: lambda machine: _extend(machine, machine.pop_to_mark()),
    pickle.SETITEM: lambda machine: _update(machine, machine.pop(2)),
    pickle.SETITEMS: lambda machine: _update(machine, machine.pop_to_mark()),
    pickle.BINPUT: lambda machine: machine.put(machine.unpack(_BYTE)),
    pickle.LONG_BINPUT: lambda machine: machine.put(machine.unpack(_UNSIGNED)),
    pickle.BINGET: lambda machine: machine.get(machine.unpack(_BYTE)),
    pickle.LONG_BINGET: lambda machine: machine.get(machine.unpack(_UNSIGNED)),
    pickle.GLOBAL: lambda machine: machine.push(_find_global(machine.line(), machine.line())),
    pickle.BINPERSID: lambda machine: machine.push(_find_storage(machine.stack.pop())),
    pickle.REDUCE: lambda machine: machine.push(_call(*machine.pop(2))),
    pickle.NEWOBJ: _new_object,
    pickle.BUILD: _build,
}.items():
    _STEPS[_opcode[0]] = _step


def _extend(machine: _Machine, values: list) -> None:
    if not isinstance(container := machine.stack[-1], list):
        raise ValueError("the pickle appends to something that is not a list")
    container.extend(values)


def _update(machine: _Machine, values: list) -> None:
    if not isinstance(container := machine.stack[-1], dict) or len(values) % 2:
        raise ValueError("the pickle sets items of something that is not a dictionary")
    container.update(zip(map(_key, values[::2]), values[1::2], strict=True))


def _key(key) -> str | Number:
    if isinstance(key, str):
        return key
    if isinstance(key, int):
        return Number(str(key))
    raise ValueError("the pickle has a dictionary key that is neither text nor an integer")


def _find_global(module: str, name: str) -> Global:
    found = Global(module, name)
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


def dump_state_dict(sources: Iterable[TensorSource], under: str | None = None) -> bytes:
    """An OrderedDict of tensors, the data of the i-th in the record of that number.

    under: the entry of a dictionary that it is.
    """
    outer = [] if under is None else [pickle.EMPTY_DICT, _dump(under)]
    parts = [pickle.PROTO, b"\x02", *outer, _dump_global(_ORDERED_DICT), b")R", pickle.MARK]
    for number, source in enumerate(sources):
        parts += [_dump(source.name), _dump_tensor(source, str(number))]
    closing = [pickle.SETITEMS] if under is None else [pickle.SETITEMS, pickle.SETITEM]
    return b"".join([*parts, *closing, pickle.STOP])


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
