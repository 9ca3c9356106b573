"""Safetensors files: the header's JSON, the spans of its tensors, its length, and the data behind it."""

import json
from random import Random

from tests.campaign.mutations import objects, raw

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2}
_BYTES |= {"I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
_MOST_BYTES = 100_000  # of the data that a changed header is given


def edited(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """The kind of edit, and the bytes. other: another valid file."""
    kind = r.choice(("json", "json", "json", "rebuilt", "rebuilt", "entry", "entry", "length", "data", "raw"))
    return EDITS[kind](r, data, other)


def split(data: bytes) -> tuple[str, bytes]:
    """The header's text and the data."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length].decode(), data[8 + length :]


def joined(header: str, data: bytes) -> bytes:
    """A file whose length fits the header."""
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def _json(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """The header edited; its length is made right again, in most cases."""
    header, body = split(data)
    kind, changed = objects.edited(r, header, split(other)[0])
    if r.random() < 0.15:
        return f"safetensors.{kind}", data[:8] + changed.encode("utf-8", "surrogatepass") + body
    return f"safetensors.{kind}.sealed", joined(changed, body)


def _rebuilt(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """Tensors of other shapes, dtypes or names, whose offsets and data are made to fit."""
    header, body = split(data)
    entries, theirs = json.loads(header), json.loads(split(other)[0])
    names = [name for name in entries if name != "__metadata__"]
    for name in r.sample(names, min(len(names), r.choice((1, 1, 2, 4)))):
        kind = r.choice(("shape", "dtype", "name", "drop", "add", "graft", "metadata"))
        if kind == "shape" and name in entries:
            entries[name]["shape"] = _shape(r, entries[name]["shape"])
        elif kind == "dtype" and name in entries:
            entries[name]["dtype"] = r.choice(list(_BYTES))
        elif kind == "name" and name in entries:
            entries[r.choice([*theirs, *objects.KEYS, name + ".scales", name[:-1]])] = entries.pop(name)
        elif kind == "drop":
            entries.pop(name, None)
        elif kind == "metadata":
            entries["__metadata__"] = {"format": r.choice(("pt", "mlx", "np", "")), r.choice(objects.KEYS): "x"}
        else:
            new = r.choice([each for each in theirs if each != "__metadata__"])
            entries[new if kind == "graft" else new + str(r.randrange(9))] = dict(theirs[new])
    return "safetensors.rebuilt.sealed", _filled(r, entries, body)


def _filled(r: Random, entries: dict, body: bytes) -> bytes:
    reached = 0
    for entry in entries.values():
        if not isinstance(entry.get("shape"), list):  # the metadata, whichever name it has now
            continue
        nbytes = _BYTES[entry["dtype"]]
        for length in entry["shape"]:
            nbytes *= max(0, length)
        nbytes = min(nbytes, _MOST_BYTES)
        entry["data_offsets"] = [reached, reached := reached + nbytes]
    return joined(json.dumps(entries), (body + bytes(max(0, reached - len(body))))[:reached])


def _shape(r: Random, shape: list[int]) -> list[int]:
    shape = list(shape)
    kind = r.choice(("length", "swap", "one", "cut", "zero", "many"))
    if kind == "length" and shape:
        shape[r.randrange(len(shape))] += r.choice((-1, 1, 2, 8))
    elif kind == "swap":
        r.shuffle(shape)
    elif kind == "cut":
        return shape[: r.randint(0, len(shape))]
    elif kind == "zero" and shape:
        shape[r.randrange(len(shape))] = 0
    else:
        shape.insert(r.randint(0, len(shape)), 1 if kind != "many" else 7)
        shape += [1] * r.choice((0, 0, 1, 70)) if kind == "many" else []
    return shape


def _entry(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """One field of one tensor, such as offsets that overlap or leave the file."""
    header, body = split(data)
    entries = json.loads(header)
    name = r.choice([each for each in entries if each != "__metadata__"])
    entry = entries[name]
    kind = r.choice(("begin", "end", "both", "dtype", "shape", "exchange", "axis"))
    step = r.choice((-8, -4, -1, 1, 4, 8, 2**31, 2**63, -(2**63), 2**70))
    if kind == "dtype":
        entry["dtype"] = r.choice([*_BYTES, "F4", "f32", "C64", "E8M0", "F32 ", ""])
    elif kind == "shape":
        entry["shape"] = _shape(r, entry["shape"])
    elif kind == "axis":
        entry["shape"] = r.choice(([-1, -1], [2**32, 2**32], [2**62, 4], [0, 2**70], [1.0], [True], [[1]], ["1"], None))
    elif kind == "exchange":
        twin = entries[r.choice([each for each in entries if each != "__metadata__"])]
        entry["data_offsets"], twin["data_offsets"] = twin["data_offsets"], entry["data_offsets"]
    else:
        for place in {"begin": (0,), "end": (1,), "both": (0, 1)}[kind]:
            entry["data_offsets"][place] += step
    return f"safetensors.{kind}.sealed", joined(json.dumps(entries), body)


def _length(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    old = int.from_bytes(data[:8], "little")
    new = r.choice((0, 1, 2, old - 1, old + 1, old + 8, len(data) - 8, len(data), 10**8, 10**8 + 1, 2**63, 2**64 - 1))
    return "safetensors.length", max(0, new).to_bytes(8, "little") + data[8:]


def _data(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """More or less data than is announced, or bits of it turned over."""
    header, body = split(data)
    kind = r.choice(("more", "less", "flip", "others"))
    size = r.choice((1, 4, 64))
    changed = {
        "more": body + bytes(size),
        "less": body[:-size],
        "flip": raw.flips(r, body),
        "others": split(other)[1],
    }
    return f"safetensors.data.{kind}", joined(header, changed[kind])


EDITS = {
    "json": _json,
    "rebuilt": _rebuilt,
    "entry": _entry,
    "length": _length,
    "data": _data,
    "raw": raw.edited,
}
