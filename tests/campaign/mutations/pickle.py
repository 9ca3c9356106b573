"""Pickles as lists of opcodes: left out, doubled, moved, given other arguments; and those that others do harm by."""

import functools
import pickletools
import struct
from random import Random

from tests.campaign.mutations import raw

CALL = b"cos\nsystem\n"  # what a pickle would run, were it executed
POOL = (
    *(b"N", b"\x88", b"\x89", b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"R"),
    *(b"b", b"Q", b"0", b"2", b"1", b".", b"q\x00", b"h\x00", b"h\x01", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f"),
    *(b"K\x00", b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x00", b"\x8a\x01\x05"),
    *(b"\x8a\xff" + b"\x7f" * 255, b"G\x7f\xf0\0\0\0\0\0\0", b"G\x7f\xf8\0\0\0\0\0\0", b"I1\n", b"L9L\n", b"F1.5\n"),
    *(
        b"X\0\0\0\0",
        b"X\1\0\0\0w",
        b"X\7\0\0\0storage",
        b"X\xff\xff\xff\x7f",
        b"X\3\0\0\0\xed\xa0\x80",
        b"U\1a",
        b"T\1\0\0\0a",
    ),
    *(CALL, CALL + b"X\4\0\0\0true\x85R", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"cposix\nsystem\n"),
    *(b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"cargparse\nNamespace\n", b"cpathlib\nPath\n", b"ctorch\nSize\n"),
    *(b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch\nHalfStorage\n", b"ctorch\nbfloat16\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\n\n", b"c\n\n"),
    *(
        b"ctorch._utils\n_rebuild_tensor_v3\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"c\xff\n\xff\n",
        b"ctorch\n" + b"a" * 3000 + b"\n",
    ),
    *(
        b"\x80\x04",
        b"\x80\xff",
        b"\x95" + b"\xff" * 8,
        b"\x8c\1a",
        b"\x94",
        b"\x93",
        b"\x81",
        b"\x92",
        b"P1\n",
        b"\x8f",
    ),
    *(
        b"\x82\1",
        b"i" + b"os\nsystem\n",
        b"o",
        b"d",
        b"l",
        b"S'a'\n",
        b"V\\ud800\n",
        b"\x96\1\0\0\0\0\0\0\0a",
        b"\x97",
        b"\x98",
    ),
)
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 65535, 2**31 - 1, -(2**31))


def edited(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """The kind of edit, and the bytes. other: another pickle."""
    kind = r.choice(("drop", "double", "move", "exchange", "replace", "insert", "insert", "number", "number", "number",
                     "text", "text", "graft", "tail", "raw"))  # fmt: skip
    if kind == "raw":
        name, changed = raw.edited(r, data, other)
        return f"pickle.{name}", changed
    if r.random() < 0.08:
        return "pickle.sequence", b"\x80\x02" + b"".join(r.choices(POOL, k=r.randint(1, 40))) + b"."
    parts = list(opcodes(data))
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        EDITS[kind](r, parts, other)
    return f"pickle.{kind}", b"".join(parts)


@functools.lru_cache(64)
def opcodes(data: bytes) -> tuple[bytes, ...]:
    """The bytes of each opcode with its argument, of a valid pickle."""
    places = [place for _, _, place in pickletools.genops(data)]
    return tuple(data[begin:end] for begin, end in zip(places, [*places[1:], len(data)], strict=True))


def _at(r: Random, parts: list[bytes]) -> int:
    return r.randrange(len(parts)) if parts else 0


def _drop(r: Random, parts: list[bytes], other: bytes) -> None:
    at = _at(r, parts)
    del parts[at : at + r.choice((1, 1, 1, 2, 8))]


def _double(r: Random, parts: list[bytes], other: bytes) -> None:
    at, size = _at(r, parts), r.choice((1, 1, 2, 20))
    parts[at:at] = parts[at : at + size] * r.choice((1, 1, 3))


def _move(r: Random, parts: list[bytes], other: bytes) -> None:
    if parts:
        parts.insert(_at(r, parts), parts.pop(_at(r, parts)))


def _exchange(r: Random, parts: list[bytes], other: bytes) -> None:
    if parts:
        one, two = _at(r, parts), _at(r, parts)
        parts[one], parts[two] = parts[two], parts[one]


def _replace(r: Random, parts: list[bytes], other: bytes) -> None:
    if parts:
        parts[_at(r, parts)] = r.choice(POOL)


def _insert(r: Random, parts: list[bytes], other: bytes) -> None:
    parts.insert(_at(r, parts), r.choice(POOL))


def _number(r: Random, parts: list[bytes], other: bytes) -> None:
    """A size, a stride, an offset or a length of another value."""
    places = [place for place, part in enumerate(parts) if part[:1] in (b"J", b"K", b"M", b"\x8a")]
    if places:
        value = r.choice(NUMBERS)
        new = b"J" + struct.pack("<i", value)
        if r.random() < 0.15:
            new = b"\x8a\x09" + struct.pack("<q", r.choice((2**62, -(2**62), 2**31))) + b"\x01"
        parts[r.choice(places)] = new


def _text(r: Random, parts: list[bytes], other: bytes) -> None:
    """A name, a storage's key or a device of another text: another one's, or one that is not usual."""
    places = [place for place, part in enumerate(parts) if part[:1] == b"X"]
    if places:
        new = r.choice((b"", b"0", b"1", b"../x", b"\xed\xa0\x80", b"a\nb", b"model", b"state_dict", b"x" * 3000))
        new = parts[r.choice(places)][5:] if r.random() < 0.4 else new
        parts[r.choice(places)] = b"X" + struct.pack("<I", len(new)) + new


def _graft(r: Random, parts: list[bytes], other: bytes) -> None:
    theirs = opcodes(other)
    at, begin = _at(r, parts), r.randrange(len(theirs))
    parts[at : at + r.choice((0, 1, 12))] = theirs[begin : begin + r.choice((1, 12, 40))]


def _tail(r: Random, parts: list[bytes], other: bytes) -> None:
    """The end left out, or followed by more."""
    if r.random() < 0.5:
        del parts[_at(r, parts) :]
    else:
        parts += opcodes(other)


EDITS = {
    "drop": _drop,
    "double": _double,
    "move": _move,
    "exchange": _exchange,
    "replace": _replace,
    "insert": _insert,
    "number": _number,
    "text": _text,
    "graft": _graft,
    "tail": _tail,
}
