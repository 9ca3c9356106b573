"""Bytes of any file: flips, cuts, splices, and numbers that readers trip over."""

import struct
from random import Random

HOSTILE = (
    *(b"\xff" * 4, b"\xff" * 8, b"\x00" * 4, b"\x00" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"),
    *(struct.pack("<I", 2**31), struct.pack("<Q", 2**63 - 1), struct.pack("<Q", 2**40), b"9" * 30),
    *(b"-1", b"1e9", b"NaN", b"\n", b"\x1b[2J", "\u2028".encode(), b"\xed\xa0\x80", b"\xc0\xaf", b"{", b"[", b'"'),
)


def edited(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """The kind of edit, and the bytes. other: those of another valid file, to splice with."""
    kind = r.choice(("flip", "flip", "overwrite", "insert", "delete", "truncate", "zero", "splice", "repeat", "empty"))
    return f"raw.{kind}", EDITS[kind](r, data, other)


def flips(r: Random, data: bytes, low: int = 0, high: int | None = None) -> bytes:
    """One to three bits of the bytes from `low` to below `high` turned over."""
    changed = bytearray(data)
    high = len(data) if high is None else high
    for _ in range(r.choice((1, 1, 1, 2, 3)) if high > low else 0):
        changed[r.randrange(low, high)] ^= 1 << r.randrange(8)
    return bytes(changed)


def _overwrite(r: Random, data: bytes, other: bytes) -> bytes:
    at, new = r.randint(0, len(data)), r.choice(HOSTILE)
    return data[:at] + new + data[at + len(new) :]


def _insert(r: Random, data: bytes, other: bytes) -> bytes:
    at = r.randint(0, len(data))
    return data[:at] + (r.choice(HOSTILE) if r.random() < 0.7 else r.randbytes(r.randint(1, 40))) + data[at:]


def _delete(r: Random, data: bytes, other: bytes) -> bytes:
    at = r.randint(0, len(data))
    return data[:at] + data[at + r.choice((1, 2, 8, 40, 400)) :]


def _truncate(r: Random, data: bytes, other: bytes) -> bytes:
    return data[: r.randint(0, len(data))] if r.random() < 0.5 else data[: max(0, len(data) - r.randint(1, 24))]


def _zero(r: Random, data: bytes, other: bytes) -> bytes:
    at, size = r.randint(0, len(data)), r.choice((4, 16, 64, 512))
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def _splice(r: Random, data: bytes, other: bytes) -> bytes:
    return data[: r.randint(0, len(data))] + other[r.randint(0, len(other)) :]


def _repeat(r: Random, data: bytes, other: bytes) -> bytes:
    at, size = r.randint(0, len(data)), r.choice((1, 16, 200, len(data)))
    return data[:at] + data[at : at + size] * r.choice((2, 3, 20)) + data[at + size :]


EDITS = {
    "flip": lambda r, data, other: flips(r, data),
    "overwrite": _overwrite,
    "insert": _insert,
    "delete": _delete,
    "truncate": _truncate,
    "zero": _zero,
    "splice": _splice,
    "repeat": _repeat,
    "empty": lambda r, data, other: b"",
}
