"""The valid inputs that a campaign mutates: folders of small files, as bytes, of every layout and reader."""

import dataclasses
import functools
import io
import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mamba_core import factory
from mamba_core.architectures.jamba import JambaConfig
from mamba_core.architectures.mamba2 import Mamba2Config
from mamba_core.config import MambaConfig
from mamba_core.training import TrainSettings, train
from mamba_core.weights import layouts, tables
from mamba_core.weights.formats import sources_of, write_npz, write_safetensors, write_safetensors_file, write_torch
from mamba_core.weights.formats.pickle import dump_state_dict
from tests.campaign import standin
from tests.campaign.mutations import zip as zips
from tests.unit import layout_files
from tests.unit.checkpoints import example_arrays

TINY = dataclasses.replace(layout_files.CONFIG, d_model=4, n_layer=1, vocab_size=6)
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "[UNK]": 5}


class Base(NamedTuple):
    """A valid input.

    files: name -> bytes. target: which of them is read, "" for the folder. reads: the entries that can be called.
    options: of `open_model`.
    """

    name: str
    files: dict[str, bytes]
    reads: tuple[str, ...]
    target: str = ""
    options: Mapping[str, Any] = MappingProxyType({})


@functools.cache
def bases() -> dict[str, Base]:
    """Name -> input, the same bytes in every process."""
    with tempfile.TemporaryDirectory() as folder, standin.installed():
        found = [
            *_layouts(Path(folder)),
            *_shards(Path(folder)),
            *_quantised(Path(folder)),
            *_torch(Path(folder)),
            *_adapter(Path(folder)),
            *_state(Path(folder)),
            *_training(Path(folder)),
            *_tokens(),
        ]
    return {base.name: base for base in found}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


_MODEL = ("model", "model", "file", "inspect", "convert", "cli")


def _layouts(root: Path) -> Iterator[Base]:
    """Every layout with every architecture that it holds, in its own format and in others."""
    for layout in layouts.names():
        for name in tables.holding(layout):
            config = _tiny(name, layout)
            config = dataclasses.replace(config, tie_embeddings=layout in layout_files.TIED or name == "falcon_mamba")
            own = layouts.find(layout).file_format
            other = () if layouts.find(layout).told_by_format else {"npz": ("bin",), "safetensors": ("npz",)}
            formats = (own, *(other.get(own, ("safetensors",)) if other else ()))
            for file_format in formats:
                folder = layout_files.write(
                    root / f"{layout}-{name}-{file_format}", config, layout, "float32", file_format
                )
                compat = layout_files.options_of(config)
                yield Base(folder.name, files_in(folder) | _token_files(layout), _MODEL, options=compat)


def _tiny(name: str, layout: str):
    """Of the least sizes that the layout can hold."""
    if name == "vision_mamba" and layout != "hf":
        blocks = dataclasses.replace(layout_files.VISION, task="layers", task_options={})
        return blocks if layout == "mambapy" else layout_files.VISION
    if name == "jamba":
        return JambaConfig(d_model=4, n_layer=2, vocab_size=TINY.vocab_size, d_state=2, **layout_files.FEW)
    if name != "mamba2":
        return layout_files.of_architecture(TINY, name)
    sizes = {} if layout == "mistral_inference" else {"headdim": 8, "d_state": 4}
    return Mamba2Config(d_model=32, n_layer=1, vocab_size=TINY.vocab_size, pad_vocab_size_multiple=1, **sizes)


def _token_files(layout: str) -> dict[str, bytes]:
    """The files of tokens and generation, beside some of the layouts."""
    if layout not in ("hf", "mamba_ssm"):
        return {}
    return {
        "generation_config.json": _json({"bos_token_id": 0, "eos_token_id": [1, 2], "max_length": 20}),
        "tokenizer_config.json": _json(
            {"eos_token": "</s>", "bos_token": {"content": "<s>", "lstrip": False}, "pad_token": None,
             "added_tokens_decoder": {"0": {"content": "<s>"}, "1": {"content": "</s>"}}}
        ),
        "special_tokens_map.json": _json({"pad_token": "a", "eos_token": {"content": "</s>"}}),
        "added_tokens.json": _json({"<s>": 0, "</s>": 1}),
        "tokenizer.json": _tokenizer(),
        "vocab.json": _json(WORDS),
    }  # fmt: skip


def _shards(root: Path) -> Iterator[Base]:
    source = root / "hf-mamba-safetensors"
    folder = root / "shards"
    arrays = layout_files.arrays_of(source)
    write_safetensors(folder, sources_of(arrays), shard_bytes=300)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    yield Base("shards", files_in(folder), _MODEL)
    index = "model.safetensors.index.json"
    yield Base("index", files_in(folder), ("file", "model"), target=index)


def _quantised(root: Path) -> Iterator[Base]:
    """mlx-lm's four bits, in groups of eight columns."""
    config = dataclasses.replace(TINY, d_model=8, vocab_size=8)
    folder = layout_files.write(root / "quantised", config, "mlx_lm")
    arrays, rng = layout_files.arrays_of(folder), np.random.default_rng(0)
    for name in [name for name in arrays if name.endswith(("in_proj.weight", "embeddings.weight"))]:
        rows, columns = arrays[name].shape
        arrays[name] = rng.integers(0, 2**32, (rows, columns * 4 // 32), np.uint32)
        for end in ("scales", "biases"):
            arrays[name.removesuffix("weight") + end] = rng.normal(size=(rows, columns // 8)).astype(np.float16)
    for name in [name for name, array in arrays.items() if array.dtype == np.float32 and "_log" not in name]:
        arrays[name] = arrays[name] if name.endswith((".D", "dt_proj.bias")) else arrays[name].astype(np.float16)
    write_safetensors_file(folder / "model.safetensors", sources_of(arrays), metadata={"format": "mlx"})
    fields = json.loads((folder / "config.json").read_text())
    settings = {"group_size": 8, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_bytes(_json(fields | {"quantization": settings, "quantization_config": settings}))
    yield Base("quantised", files_in(folder), _MODEL)


def _torch(root: Path) -> Iterator[Base]:
    """A training checkpoint with the weights inside, a file without checksums, and one of every dtype."""
    arrays = layout_files.arrays_of(root / "mamba_ssm-mamba-bin")
    config = (root / "mamba_ssm-mamba-bin" / "config.json").read_bytes()
    write_torch(root / "plain.bin", sources_of(arrays))
    plain = (root / "plain.bin").read_bytes()
    inner = dump_state_dict(list(sources_of(arrays)))[2:-1]
    beside = _text("optimizer") + b"}q\x01" + _text("steps") + b"K\x03s"
    wrapped = b"\x80\x02}q\x00(" + _text("model") + inner + beside + b"u."
    records = [
        zips.sealed(entry, wrapped) if entry.name.endswith(b"data.pkl") else entry for entry in zips.entries(plain)
    ]
    yield Base("trainer", {"model.pt": zips.assembled(records), "config.json": config}, _MODEL)
    bare = [dataclasses.replace(entry, crc=0) for entry in zips.entries(plain)]
    yield Base("unchecked", {"pytorch_model.bin": zips.assembled(bare), "config.json": config}, _MODEL)
    every = example_arrays()
    for name, writer in {"a.bin": write_torch, "a.safetensors": write_safetensors_file, "a.npz": write_npz}.items():
        held = {key: array for key, array in every.items() if not (name == "a.npz" and "float8" in key)}
        writer(root / name, sources_of(held))
        yield Base(f"dtypes-{name}", {name: (root / name).read_bytes()}, ("file",), target=name)


def _adapter(root: Path) -> Iterator[Base]:
    """A base with an adapter beside it, and an adapter alone: both are always refused."""
    files = files_in(root / "hf-mamba-safetensors")
    name = "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"
    write_safetensors_file(root / "adapter.safetensors", sources_of({name: np.ones((2, 4), np.float32)}))
    adapter = {
        "adapter_config.json": _json({"base_model_name_or_path": "a/b", "peft_type": "LORA", "r": 2}),
        "adapter_model.safetensors": (root / "adapter.safetensors").read_bytes(),
    }
    yield Base("adapter", files | adapter, ("model",))
    yield Base("adapter-alone", adapter, ("model",))


def _state(root: Path) -> Iterator[Base]:
    model = standin.Model(TINY)
    factory.save_state(model.init_state(2), root / "state.safetensors", model)
    yield Base(
        "state",
        {"state.safetensors": (root / "state.safetensors").read_bytes()},
        ("state",),
        target="state.safetensors",
    )


def _training(root: Path) -> Iterator[Base]:
    standin.ALLOWED_STEPS[0] = 2
    settings = TrainSettings(steps=2, batch_size=1, length=4, warmup_steps=1)
    train(standin.Model(TINY), DATA, settings, checkpoint=root / "training")
    standin.ALLOWED_STEPS[0] = 0
    yield Base("training", files_in(root / "training"), ("resume",))


DATA = np.arange(64) % 6


def _tokens() -> Iterator[Base]:
    for name, dtype in {"int64": np.int64, "uint16": np.uint16}.items():
        file = io.BytesIO()
        np.save(file, np.arange(40, dtype=dtype) % 6)
        yield Base(f"tokens-{name}", {"data.npy": file.getvalue()}, ("tokens",), target="data.npy")
    text = "one two. äöü 漢字 🐍\n".encode() * 4
    yield Base("text", {"a.txt": text, "b.txt": b"more\n"}, ("tokens",))
    yield Base("tokenizer", {"tokenizer.json": _tokenizer()}, ("tokenizer",), target="tokenizer.json")
    template = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}a:"
    yield Base("chat", {"tokenizer_config.json": _json({"chat_template": template, "bos_token": "<s>"}),
                        "special_tokens_map.json": _json({"eos_token": {"content": "</s>"}})}, ("chat",))  # fmt: skip
    several = [{"name": "default", "template": template}, {"name": "tools", "template": "x"}]
    yield Base("chat-several", {"tokenizer_config.json": _json({"chat_template": several})}, ("chat",))
    yield Base("chat-file", {"chat_template.jinja": template.encode()}, ("chat",))
    fields = MambaConfig(d_model=8, n_layer=2, vocab_size=16).to_dict()
    yield Base("config", {"config.json": _json(fields)}, ("config",), target="config.json")


@functools.cache
def _tokenizer() -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(WORDS, [("a", "b")], unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer.to_str().encode()


def _json(value) -> bytes:
    return json.dumps(value).encode()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()
