"""What a user calls with an input: each function gives what it read, by name, or raises what the reader raised."""

import contextlib
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mamba_core import chat, factory
from mamba_core.cli import main
from mamba_core.config import from_dict
from mamba_core.data import read_tokens
from mamba_core.spec.params import parameter_table
from mamba_core.tokenizer import SubwordTokenizer
from mamba_core.training import load_settings, train
from mamba_core.weights import layouts
from mamba_core.weights.convert import convert, inspect
from mamba_core.weights.formats import read_json
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from tests.campaign import standin
from tests.campaign.cases import FORMATS, Case
from tests.campaign.inputs import DATA, TINY

SECRET = b"what lies beside the checkpoint"
# Name -> (dtype, shape, CRC-32 of its bytes) of every tensor, or what else was read.
Read = dict[str, Any]


class InconsistentError(BaseException):
    """What was accepted is not what was announced, or not what is in the file."""


def expect(holds: bool, *told) -> None:
    if not holds:
        raise InconsistentError(" ".join(map(str, told)))


def digest(array: np.ndarray) -> tuple[str, tuple[int, ...], int]:
    return array.dtype.name, array.shape, zlib.crc32(array.tobytes())


def _model(path: Path, case: Case) -> Read:
    opened = open_model(path, **case.options)
    found, table = {}, parameter_table(opened.config)
    for parameter, name, source in opened.sources():
        array = source.read()
        expect(array.shape == parameter.shape == source.shape, name, array.shape, parameter.shape)
        expect(array.dtype.name == source.dtype, name, array.dtype, source.dtype)
        found[parameter.name] = digest(array)
    expect(found.keys() == table.keys(), "not the parameters of the config")
    return found | {"config": repr(opened.config)}


def _file(path: Path, case: Case) -> Read:
    opened = open_checkpoint(path)
    found = {}
    for name in opened:
        header, array = opened.header(name), opened[name]
        expect(array.shape == header.shape, name, array.shape, header.shape)
        expect((array.dtype.name, array.nbytes) == (header.dtype, header.nbytes), name, array.dtype, header)
        found[name] = digest(array)
    if not path.is_dir():
        _compare(path, opened, found)
    return found


def _compare(path: Path, opened: Mapping[str, np.ndarray], found: Read) -> None:
    """What other readers accept too must be the same."""
    if path.suffix == ".safetensors":
        _compare_safetensors(path, found)
    elif path.suffix in (".npz", ".bin", ".pt", ".pth"):
        _compare_zip(path, found)


def _compare_safetensors(path: Path, found: Read) -> None:
    with contextlib.suppress(Exception):
        for name, array in safetensors.numpy.load(path.read_bytes()).items():
            expect(found.get(name) == digest(array), name, "is read otherwise than by safetensors")


def _compare_zip(path: Path, found: Read) -> None:
    """Python's own reader finds no record damaged among those that were read."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records if any(record.CRC for record in records) else ():
            stem = record.filename.removesuffix(".npy")
            if stem in found or record.filename.endswith("/data.pkl"):
                try:
                    data = archive.read(record)
                except Exception as fault:
                    raise InconsistentError(f"accepted, though {fault}") from None
                if stem in found:
                    _compare_array(stem, data, found)


def _compare_array(name: str, data: bytes, found: Read) -> None:
    with contextlib.suppress(Exception):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.dtype.kind != "V":
            expect(found.get(name) == digest(array), name, "is read otherwise than by numpy")


def _inspect(path: Path, case: Case) -> Read:
    found = inspect(path, values=True, **case.options)
    json.loads(found.to_json())
    return {name: value for name, value in vars(found).items() if name != "files"}


def _convert(path: Path, case: Case) -> Read:
    """Into a folder beside the input, with --verify, and compared with the source again."""
    r, target = case.random, path.parent / "converted"
    options = {"file_format": r.choice(FORMATS), "dtype": r.choice((None, None, None, "float32", "bfloat16"))}
    options["lossy"] = options["dtype"] == "bfloat16"
    options["shard_bytes"] = r.choice((None, None, 200))
    to = _layout(r)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        convert(path, target, to=to, verify=True, **options, **case.options)
    for file in target.iterdir():
        expect(bool(told) or SECRET not in file.read_bytes(), file.name, "is a copy of what a link led to")
    source = open_model(path, **case.options)
    result = open_model(target, layout=to, compat=source.config.architecture)
    if options["dtype"] is None:
        theirs = dict(result.tensors())
        for name, array in source.tensors():
            expect(digest(theirs[name]) == digest(array), name, "is not what was read")
    return {}


def _layout(r) -> str:
    """What is written, in half of the cases the one that holds every architecture."""
    return "hf" if r.random() < 0.5 else r.choice(layouts.names())


class CommandError(BaseException):
    """A command ended otherwise than well, or with one line and status 2."""


def _cli(path: Path, case: Case) -> Read:
    """The command line, in this process: refused with one line and status 2, or status 0."""
    r, shown, told = case.random, io.StringIO(), io.StringIO()
    command = r.choice((["inspect", str(path)], ["inspect", str(path), "--json"], ["inspect", str(path), "--values"],
                        ["convert", str(path), str(path.parent / "converted"), "--to", _layout(r)]))  # fmt: skip
    command += ["--compat", compat] if (compat := case.options.get("compat")) else []
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told):
            status = main(command)
    except SystemExit as end:
        status = end.code
    # Beside warnings and a bar that shows how far the writing is.
    lines = [line for line in told.getvalue().splitlines() if "warning: " not in line and "━" not in line]
    if status == 2:
        if len(lines) != 1 or shown.getvalue():
            raise CommandError(f"{len(lines)} lines: {told.getvalue()[:500]!r} and {shown.getvalue()[:100]!r}")
        raise ValueError(lines[0])
    if status != 0:
        raise CommandError(f"status {status}: {told.getvalue()[:500]!r}")
    return {}


def _state(path: Path, case: Case) -> Read:
    model = standin.Model(TINY)
    state = factory.load_state(path, model)
    found, zeros = {}, model.init_state(len(state.segment))
    for n, (layer, whole) in enumerate(zip(state.layers, zeros.layers, strict=True)):
        for name, value in layer._asdict().items():
            expect(value.shape == getattr(whole, name).shape, n, name, value.shape)
            found[f"{n}.{name}"] = digest(value)
    return found | {"segment": digest(state.segment)}


def _resume(path: Path, case: Case) -> Read:
    """`train --resume` up to its first step."""
    standin.LOADED.clear()
    settings = load_settings(path)
    model = standin.Model(TINY)
    for name, array in open_model(path).tensors():
        model.values[name] = np.array(array)
    with contextlib.suppress(standin.ResumedError):
        for place, entry in enumerate(train(model, DATA, settings, resume=path)):
            expect(entry["step"] == place and isinstance(entry["loss"], (int, float)), "history", entry)
            f"{entry['loss']:.4f} {entry['learning_rate']:.2e} {entry['gradient_norm']:.2e}"
    loaded = {name: digest(array) for name, array in standin.LOADED.items()}
    _compare_safetensors(path / "optimizer.safetensors", loaded)
    return loaded | {"settings": repr(settings)}


def _tokens(path: Path, case: Case) -> Read:
    tokens = read_tokens(path)
    expect(tokens.ndim == 1 and tokens.dtype.kind in "iu", tokens.dtype, tokens.shape)
    if path.suffix == ".npy":
        with contextlib.suppress(Exception):
            other = np.load(path, allow_pickle=False)
            expect(digest(other) == digest(tokens), "is read otherwise than by numpy")
    return {"tokens": digest(tokens)}


def _tokenizer(path: Path, case: Case) -> Read:
    tokenizer = SubwordTokenizer(path)
    found = []
    for text in ("", "ab a", "<s>b</s>", "a b é 漢\n"):
        ids = tokenizer.encode(text)
        expect(all(isinstance(token, int) and token >= 0 for token in ids), ids)
        decode = tokenizer.decoder(ids[:1])
        found.append((ids, [decode(token) for token in ids[1:]], decode(None), tokenizer.encode_more(text)))
    return {"texts": found}


def _chat(path: Path, case: Case) -> Read:
    model = standin.Model(TINY)
    model.source = path
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}, {"role": "user", "content": "c"}]
    (text,) = chat.rendered(model, talk)
    expect(isinstance(text, str), type(text))
    return {"text": text}


def _config(path: Path, case: Case) -> Read:
    return {"config": repr(from_dict(read_json(path)))}


ENTRIES: dict[str, Callable[[Path, Case], Read]] = {
    "model": _model,
    "file": _file,
    "inspect": _inspect,
    "convert": _convert,
    "cli": _cli,
    "state": _state,
    "resume": _resume,
    "tokens": _tokens,
    "tokenizer": _tokenizer,
    "chat": _chat,
    "config": _config,
}
