"""Inputs of about a megabyte whose reading could take long: each is to be read, or refused, within seconds."""

import json
import struct
from collections.abc import Callable
from random import Random

from tests.campaign.inputs import Base, bases
from tests.campaign.mutations import safetensors
from tests.campaign.mutations import zip as zips

SIZE = 1_000_000


def heavy(r: Random) -> tuple[str, Base, dict[str, bytes], str]:
    """(kind, the valid input, its files that are replaced, the entry that is called)."""
    kind = r.choice(list(KINDS))
    base, name, data, entry = KINDS[kind](r)
    return f"heavy.{kind}", bases()[base], {name: data}, entry


def _pickled(pickle: bytes, name: str = "model.pt") -> tuple[str, str, bytes, str]:
    records = [
        zips.sealed(entry, pickle) if entry.name.endswith(b"data.pkl") else entry
        for entry in zips.entries(bases()["trainer"].files["model.pt"])
    ]
    return "trainer", name, zips.assembled(records), "model"


def _opcodes(r: Random):
    """A million values, lists or marks, some of them inside of each other."""
    alone = b"N", b"]", b"(", b"}", b"]q\0", b"N2", b"K\1"
    part, close = r.choice((*((part, b"") for part in alone), (b"]", b"a"), (b"N", b"0"), (b"(", b"t")))
    count = SIZE // (len(part) + len(close))
    return _pickled(b"\x80\x02" + part * count + close * (count - 1) + b".")


def _colliding(r: Random):
    """Keys that all have one hash."""
    prime, begin = 2**61 - 1, r.randrange(1, 1000)
    keys = (((begin + n) * prime).to_bytes(16, "little") for n in range(SIZE // 19))
    items = b"".join(b"\x8a\x10" + key + b"N" for key in keys)
    return _pickled(b"\x80\x02}(" + items + b"u.")


def _shared(r: Random):
    """Tuples that hold each other twice, so that their text would have 2**40 parts; as a shape, a key or a value."""
    nest = b")" + b"".join(b"q\0h\0\x86" for _ in range(r.choice((20, 40, 200_000))))
    ends = (b".", b"Q.", b"}q\1" + nest + b"Ns.", b"ctorch\nSize\n" + nest + b"\x85R.", b"cos\nsystem\n" + nest + b"R.")
    return _pickled(b"\x80\x02" + nest + r.choice(ends))


def _tensors_in_pickle(r: Random):
    """Thousands of tensors that are views of one storage."""
    entry = next(e for e in zips.entries(bases()["trainer"].files["model.pt"]) if e.name.endswith(b"data.pkl"))
    begin = entry.data.index(b"ctorch._utils")
    one = entry.data[begin : entry.data.index(b"R", entry.data.index(b"OrderedDict\n)R", begin) + 14) + 1]
    items = b"".join(_text(f"layers.{n}.a") + one for n in range(SIZE // (len(one) + 18)))
    return _pickled(b"\x80\x02}(" + items + b"u.")


def _header(r: Random):
    """Thousands of tensors of no bytes, with names that are short, long, or alike for long."""
    name = r.choice(("{}", "a." * 200 + "{}", "{}" + ".module" * 50, "backbone.layers.{}.mixer.D", "x" * 400 + "{}"))
    entry = '"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    count = SIZE // (len(name) + 55)
    text = "{" + ",".join(entry % name.format(n) for n in range(count)) + "}"
    target = r.choice(("hf-mamba-safetensors", "mlx_lm-mamba-safetensors", "mambapy-mamba-safetensors"))
    return target, "model.safetensors", safetensors.joined(text, b""), r.choice(("model", "file"))


def _faults(r: Random):
    """A header in which every tensor is at fault."""
    entry = r.choice(
        ('"a%d":{"dtype":"X"}', '"a":%d', '"a%d":[[]]', '"a%d":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}')
    )
    text = "{" + ",".join(entry % n for n in range(SIZE // 20)) + "}"
    return "hf-mamba-safetensors", "model.safetensors", safetensors.joined(text, b""), "file"


def _missing(r: Random):
    """An index of tens of thousands of shards that are not there, or of tensors that one shard has not."""
    shard = r.choice(("m-{}.safetensors", "model-00001-of-00006.safetensors", "A{}.safetensors", "../{}"))
    pairs = {f"t{n}": shard.format(n) for n in range(SIZE // 35)}
    return "index", "model.safetensors.index.json", json.dumps({"weight_map": pairs}).encode(), "file"


def _nested(r: Random):
    text = r.choice(("[" * SIZE, '{"a":' * (SIZE // 5), "[" * 400_000 + "]" * 400_000, '{"a":[' * 100_000))
    return _json_file(r, text)


def _json_file(r: Random, text: str):
    data = text.encode()
    return r.choice(
        (
            ("hf-mamba-safetensors", "config.json", data, "model"),
            ("hf-mamba-safetensors", "generation_config.json", data, "model"),
            ("mamba_ssm-mamba-bin", "tokenizer_config.json", data, "model"),
            ("mamba_ssm-mamba-bin", "tokenizer.json", data, "model"),
            ("hf-mamba-safetensors", "model.safetensors", safetensors.joined(text, b""), "file"),
            ("index", "model.safetensors.index.json", data, "file"),
            ("training", "training.json", data, "resume"),
            ("tokenizer", "tokenizer.json", data, "tokenizer"),
            ("chat", "tokenizer_config.json", data, "chat"),
            ("config", "config.json", data, "config"),
        )
    )


def _long(r: Random):
    """One value as long as the file, or many in one list."""
    lists = ("[" + item * (SIZE // len(item)) + "0]" for item in ("1e400,", "{},", "0,"))
    texts = (f'"{part * (SIZE // len(part))}"' for part in ("x", "\\u2028"))
    value = r.choice(("9" * SIZE, "1" * 4000 + "e" + "9" * 4000, *lists, *texts))
    key = r.choice(
        ("hidden_size", "num_hidden_layers", "eos_token_id", "architectures", "weight_map", "zzz", "history")
    )
    return _json_file(r, f'{{"model_type": "mamba", "{key}": {value}}}')


def _keys(r: Random):
    """Tens of thousands of entries, each of its own name or all of one."""
    name = r.choice(("k{}", "k", "added{}", "model.layers.{}", "{}"))
    text = ",".join(f'"{name.format(n)}":{n}' for n in range(SIZE // (len(name) + 12)))
    outer = r.choice(("{%s}", '{"model_type":"mamba",%s}', '{"vocab":{%s}}', '{"added_tokens_decoder":{%s}}',
                      '{"eos_token":"k7","model":{"vocab":{%s}}}', '{"ssm_cfg":{%s},"d_model":4}'))  # fmt: skip
    return _json_file(r, outer % text)


def _records(r: Random):
    """Thousands of records, or one that thousands of names in the directory share."""
    entry = zips.entries(bases()["dtypes-a.npz"].files["a.npz"])[0]
    count = SIZE // 400 if r.random() < 0.5 else SIZE // 300
    records = [zips.replace(entry, name=b"%d.npy" % n) for n in range(count)]
    if r.random() < 0.5:
        records = [zips.replace(record, data=b"", said={"offset": 0}) for record in records]
    return "mambapy_mlx-mamba-npz", "weights.npz", zips.assembled(records), "file"


def _template(r: Random):
    text = r.choice(("{{ " + "(" * 100_000 + " }}", "{% if 1 %}" * 50_000, "{{ " + "1+" * 100_000 + "1 }}", "a" * SIZE,
                     "{" * SIZE, "{# " * 100_000, "{{ 'a' * 1000000 }}" * 3, "{% for i in [1] %}" * 30))  # fmt: skip
    return "chat-file", "chat_template.jinja", text.encode(), "chat"


def _words(r: Random):
    data = r.choice((b"word " * (SIZE // 5), bytes(SIZE), "漢".encode() * (SIZE // 3), b"\xff" * SIZE, b"a" * SIZE))
    return "text", "a.txt", data, "tokens"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


KINDS: dict[str, Callable] = {
    "opcodes": _opcodes,
    "colliding": _colliding,
    "shared": _shared,
    "tensors": _tensors_in_pickle,
    "header": _header,
    "faults": _faults,
    "missing": _missing,
    "nested": _nested,
    "long": _long,
    "keys": _keys,
    "records": _records,
    "template": _template,
    "words": _words,
}
