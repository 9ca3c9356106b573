"""Arrays in NumPy's format: magic, version, the header's length and text, and the data."""

from random import Random

from tests.campaign.mutations import raw

DESCRS = (
    *("'<f4'", "'<f8'", "'<f2'", "'<V2'", "'|V2'", "'|V0'", "'|S0'", "'<U0'", "'|O'", "'>f4'", "'<c8'", "'<m8[s]'"),
    *("'|b1'", "'|u1'", "'|i1'", "'<i4'", "'<i8'", "'<u8'", "'<f16'", "'|S4'", "'<V4294967296'", "[('a', '<f4')]"),
    *("'f4'", "'=f4'", "''", "'<f4\\x00'", "8", "None", "'" + "f" * 3000 + "'", "__import__('os').system('true')"),
)
SHAPES = (
    *(
        "()",
        "(0,)",
        "(0, 0)",
        "(1,)",
        "(-1,)",
        "(1,1,1)",
        "(4294967296, 4294967296)",
        "(9223372036854775807,)",
        "(1L,)",
    ),
    *("(" + "9" * 5000 + ",)", "(" + "1, " * 70 + ")", "(0, 18446744073709551616)", "[2]", "None", "(2.0,)", "(,)"),
    *("( 2 , 3 )", "(2", "2", "(1_000,)", "(0x10,)", "(2, 3, )", "(" + "1," * 1500 + ")"),
)


def edited(r: Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """The kind of edit, and the bytes. other: another array of that format."""
    kind = r.choice(("descr", "order", "shape", "shape", "fits", "text", "length", "version", "data", "raw"))
    if kind == "raw":
        return raw.edited(r, data, other)
    text, body = split(data)
    descr, order, shape = _fields(text)
    if kind == "descr":
        descr = r.choice(DESCRS)
    elif kind == "order":
        order = r.choice(("True", "False", "0", "None", "'True'", "true"))
    elif kind == "shape":
        shape = r.choice(SHAPES)
    elif kind == "fits":
        shape, body = _fitting(r, body)
        descr = r.choice(("'<f4'", "'<V2'", "'<i8'", "'|u1'", descr))
    elif kind == "data":
        body = r.choice((body[:-1], body + b"\0", raw.flips(r, body), b"", split(other)[1]))
    elif kind == "version":
        return "npy.version", data[:6] + r.choice((b"\2\0", b"\3\0", b"\0\0", b"\xff\xff", b"\1\1")) + data[8:]
    elif kind == "length":
        length = r.choice((0, 1, len(text) - 1, len(text) + 1, 65535))
        return "npy.length", data[:8] + length.to_bytes(2, "little") + data[10:]
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if kind == "text":
        header = _text(r, header)
    return f"npy.{kind}", joined(header, body)


def split(data: bytes) -> tuple[str, bytes]:
    """The header's text and the data, of a valid array of version 1."""
    length = int.from_bytes(data[8:10], "little")
    return data[10 : 10 + length].decode("latin1"), data[10 + length :]


def joined(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8")[:65000]
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + body


def _fields(header: str) -> tuple[str, str, str]:
    descr = header.split("'descr': ")[1].split(", 'fortran")[0]
    order = header.split("'fortran_order': ")[1].split(",")[0]
    return descr, order, header.split("'shape': ")[1].split(")")[0] + ")"


def _fitting(r: Random, body: bytes) -> tuple[str, bytes]:
    """A shape and as much data as it takes in some of the dtypes."""
    shape = [r.choice((0, 1, 2, 3, 8)) for _ in range(r.randint(0, 4))]
    size = r.choice((1, 2, 4, 8))
    for length in shape:
        size *= length
    return "(" + "".join(f"{length}, " for length in shape) + ")", (body + bytes(size))[:size]


def _text(r: Random, header: str) -> str:
    return r.choice(
        (
            header.replace("'descr'", "'Descr'"),
            header.replace("'descr'", '"descr"'),
            header.replace(", }", "}"),
            header.replace("{", "{'more': 1, "),
            header + header,
            "{" * 2000,
            "dict()",
            header.replace("'shape'", "'shape', 'shape'"),
            header + "x" * 5000,
            "\0" * 100,
        )
    )
