"""Zip files taken apart into records and put together again, with any field of any header otherwise."""

import functools
import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from random import Random

from tests.campaign.mutations import npy, pickle, raw

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4sH5H3I2H3H2I")
_END = struct.Struct("<4s4H2IH")
_M16, _M32 = 2**16 - 1, 2**32 - 1
_FIELDS = ("name", "method", "flags", "csize", "usize", "crc", "offset", "extra", "local", "version", "disk", "date")


@dataclass(frozen=True)
class Entry:
    """A record, and what its headers say otherwise. local: the name in the local header, where that is another.

    said: field of the central directory -> its value; told: the same of the local header.
    """

    name: bytes
    data: bytes
    crc: int
    local: bytes | None = None
    said: dict = field(default_factory=dict)
    told: dict = field(default_factory=dict)
    extra: bytes = b""


@functools.lru_cache(64)
def entries(data: bytes) -> tuple[Entry, ...]:
    """The records of a valid file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        items = archive.infolist()
    spans = [_span(data, item) for item in items]
    return tuple(Entry(i.filename.encode(), data[a:b], i.CRC) for i, (a, b) in zip(items, spans, strict=True))


@functools.lru_cache(64)
def covered(data: bytes) -> tuple[tuple[int, int], ...]:
    """Where the bytes lie that checksums cover, in a valid file that has them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        items = archive.infolist()
    return tuple(_span(data, item) for item in items) if any(item.CRC for item in items) else ()


def _span(data: bytes, item: zipfile.ZipInfo) -> tuple[int, int]:
    begin = item.header_offset + 30
    begin += sum(struct.unpack("<2H", data[begin - 4 : begin]))
    return begin, begin + item.file_size


def sealed(entry: Entry, data: bytes) -> Entry:
    return replace(entry, data=data, crc=zlib.crc32(data) if entry.crc else 0)


def assembled(records, end: dict | None = None, before: bytes = b"", after: bytes = b"") -> bytes:
    """The file. end: field of the end of the central directory -> its value."""
    parts, directory, reached = [before], [], len(before)
    for entry in records:
        name = entry.name if entry.local is None else entry.local
        size = len(entry.data)
        usual = {"version": 45, "flags": 0x800, "method": 0, "time": 0, "date": 33, "crc": entry.crc}
        usual |= {"csize": size, "usize": size}
        told, said = usual | entry.told, usual | entry.said
        extra = entry.extra + struct.pack("<2sH", b"FB", pad := -(reached + 34 + len(name) + len(entry.extra)) % 64)
        header = _header(told)
        length, more = told.get("name_length", len(name)), told.get("extra_length", len(extra) + pad)
        local = _LOCAL.pack(told.get("signature", b"PK\3\4"), *header, length & _M16, more & _M16)
        local += name + extra + b"Z" * pad
        offset = said.get("offset", reached)
        rest = len(entry.name), len(entry.extra), 0, said.get("disk", 0), 0, 0, offset & _M32
        directory.append(_CENTRAL.pack(b"PK\1\2", 45, *_header(said), *rest) + entry.name + entry.extra)
        parts += [local, entry.data]
        reached += len(local) + size
    body, listing = b"".join(parts), b"".join(directory)
    end = {"disk": 0, "start": 0, "here": len(directory), "count": len(directory), "size": len(listing),
           "offset": reached, "comment": len(after)} | (end or {})  # fmt: skip
    numbers = [end[name] for name in ("disk", "start", "here", "count", "size", "offset", "comment")]
    masks = (_M16, _M16, _M16, _M16, _M32, _M32, _M16)
    return body + listing + _END.pack(b"PK\5\6", *(n & m for n, m in zip(numbers, masks, strict=True))) + after


def _header(fields: dict) -> tuple[int, ...]:
    small = [fields[name] & _M16 for name in ("version", "flags", "method", "time", "date")]
    return *small, *(fields[name] & _M32 for name in ("crc", "csize", "usize"))


# --- edits -----------------------------------------------------------------------------------------


def edited(r: Random, data: bytes, other: bytes) -> tuple[str, bytes, bool]:
    """The kind of edit, the bytes, and whether a checksum covers what was changed and was left as it was."""
    kind = r.choice(("content", "content", "content", "content", "content", "flip", "field", "field", "records", "end",
                     "raw"))  # fmt: skip
    if kind == "content":
        return _content(r, data, other)
    if kind == "flip":
        spans = [span for span in covered(data) if span[1] > span[0]]
        return ("zip.flip", raw.flips(r, data, *r.choice(spans)), True) if spans else (*_raw(r, data, other), False)
    edit = {"field": _field, "records": _records, "end": _end, "raw": _raw}[kind]
    return *edit(r, data, other), False


def _content(r: Random, data: bytes, other: bytes) -> tuple[str, bytes, bool]:
    """What one record holds, with the checksum made right again in half of the cases."""
    records = list(entries(data))
    if not records:
        return *_raw(r, data, other), False
    names = [entry.name for entry in records]
    pickles = [place for place, name in enumerate(names) if name.endswith(b"data.pkl")]
    place = pickles[0] if pickles and r.random() < 0.8 else r.randrange(len(records))
    entry = records[place]
    theirs = [each.data for each in entries(other) if each.name.endswith(entry.name[-4:])] or [entry.data]
    if entry.name.endswith(b".pkl"):
        kind, changed = pickle.edited(r, entry.data, r.choice([t for t in theirs if t[:1] == b"\x80"] or [entry.data]))
    elif entry.name.endswith(b".npy"):
        kind, changed = npy.edited(r, entry.data, r.choice([t for t in theirs if t[:1] == b"\x93"] or [entry.data]))
    else:
        kind, changed = raw.edited(r, entry.data, r.choice(theirs))
    if r.random() < (0.7 if kind.startswith("pickle") else 0.5):
        records[place] = sealed(entry, changed)
        return f"{kind}.sealed", assembled(records), False
    records[place] = replace(entry, data=changed)
    return kind, assembled(records), bool(entry.crc) and changed != entry.data


def _field(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """One field of one record: in the directory, in the local header, or in both."""
    records = list(entries(data))
    if not records:
        return _raw(r, data, other)
    place = r.randrange(len(records))
    entry, kind = records[place], r.choice(_FIELDS)
    size = len(entry.data)
    values = {
        "method": (8, 12, 14, 93, 99, _M16),
        "flags": (0, 1, 8, 0x20, 0x40, 0x801, 0x2000, _M16),
        "csize": (0, size - 1, size + 1, 2**31, _M32),
        "usize": (0, size - 1, size + 1, 2 * size, 2**31, _M32),
        "crc": (0, 1, entry.crc ^ 1, _M32),
        "offset": (0, 1, 30, len(data) - 1, len(data), 2**31, _M32),
        "version": (0, 63, 255, _M16),
        "disk": (1, _M16),
        "date": (0, _M16),
    }
    if kind == "name":
        return "zip.name", _renamed(r, records, place, other)
    if kind == "extra":
        extra = r.choice(
            (
                b"\1\0\0\0",
                b"\1\0\x08\0" + b"\xff" * 8,
                b"\1\0\x10\0" + bytes(16),
                b"\1\0\xff\xff",
                b"ab",
                b"up\x09\0" + b"\1" * 9,
            )
        )
        wide = {"csize": _M32, "usize": _M32} if r.random() < 0.5 else {}
        records[place] = replace(entry, extra=extra, said=wide)
    elif kind == "local":
        told = r.choice(({"name_length": len(entry.name) + 1}, {"name_length": 0}, {"extra_length": 0},
                         {"extra_length": _M16}, {"signature": b"PK\0\0"}, {"extra_length": 64}))  # fmt: skip
        records[place] = replace(entry, told=told) if r.random() < 0.8 else replace(entry, local=b"other")
    elif kind == "method" and r.random() < 0.4:  # really compressed
        packed = zlib.compressobj(wbits=-15)
        changed = packed.compress(entry.data) + packed.flush()
        both = {"method": 8, "usize": size, "csize": len(changed)}
        records[place] = replace(entry, data=changed, said=both, told=both)
    else:
        changed = {kind: r.choice(values[kind])}
        where = r.choice(("said", "told", "both"))
        records[place] = replace(
            entry, said=changed if where != "told" else {}, told=changed if where != "said" else {}
        )
    return f"zip.{kind}", assembled(records)


def _renamed(r: Random, records: list[Entry], place: int, other: bytes) -> bytes:
    entry = records[place]
    theirs = entries(other) or (entry,)
    new = r.choice((b"", b"/", b"../x", b"/etc/x", b"archive/data.pkl", b"data.pkl", entry.name.upper(), b"a\nb.npy",
                    b"x" * 3000 + b".npy", b"\xff\xfe", entry.name + b"/", entry.name + b"\0", b".npy",
                    r.choice(records).name, r.choice(theirs).name))  # fmt: skip
    records[place] = replace(entry, name=new, local=entry.name if r.random() < 0.3 else None)
    return assembled(records)


def _records(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """Records left out, doubled, in another order, exchanged, from another file, or in the same place."""
    records, theirs = list(entries(data)), list(entries(other))
    kind = r.choice(("drop", "double", "order", "exchange", "graft", "same", "nested", "many"))
    if not records or not theirs:
        return _raw(r, data, other)
    place, twin = r.randrange(len(records)), r.randrange(len(records))
    if kind == "drop":
        del records[place]
    elif kind == "double":
        records.insert(twin, records[place])
    elif kind == "order":
        r.shuffle(records)
    elif kind == "exchange":
        one, two = records[place], records[twin]
        records[place], records[twin] = sealed(one, two.data), sealed(two, one.data)
    elif kind == "graft":
        records[place] = sealed(records[place], r.choice(theirs).data)
    elif kind == "same":
        records[place] = replace(records[place], said={"offset": 0})
    elif kind == "nested":
        records[place] = sealed(records[place], data)
    else:
        more = records[place]
        records += [replace(more, name=more.name + str(number).encode()) for number in range(r.choice((10, 200)))]
    return f"zip.{kind}", assembled(records)


def _end(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """The end of the central directory, and what lies around the file."""
    records = entries(data)
    kind = r.choice(("disk", "start", "here", "count", "size", "offset", "comment", "before", "after", "two"))
    if kind == "before":
        return "zip.before", assembled(records, before=r.choice((b"MZ", bytes(64), other)))
    if kind == "after":
        return "zip.after", assembled(records, after=r.choice((b"x", bytes(70_000), data[-22:])))
    if kind == "two":
        return "zip.two", other + data if r.random() < 0.5 else data + other
    return "zip.end", assembled(records, end={kind: r.choice((0, 1, 2, len(records) + 1, 2**31, _M16, _M32))})


def _raw(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    return raw.edited(r, data, other)
