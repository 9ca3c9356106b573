"""The boundary of the readers: whatever is raised while something is read is one line that names it, with its cause."""

import json
import os
import struct
import zipfile
from itertools import cycle

import pytest

import mamba_core as mc
from mamba_core import architectures, cli
from mamba_core.data import read_tokens
from mamba_core.registry import installed
from mamba_core.spec.init import initial_values
from mamba_core.tokenizer import SubwordTokenizer
from mamba_core.training import load_settings
from mamba_core.weights import layouts
from mamba_core.weights.convert import convert, inspect
from mamba_core.weights.formats import CheckpointError, boundary, files, safetensors
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

from . import layout_files

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=256, d_state=2)
PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
FAULTS = {
    "KeyError: 'a'": KeyError("a"),
    "IndexError: a": IndexError("a"),
    "it is nested too deeply": RecursionError("maximum recursion depth exceeded"),
    "OverflowError: a": OverflowError("a"),
    "reading it needs more memory than there is": MemoryError(),
    "error: a": struct.error("a"),
    "surrogates": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    "BadZipFile: a": zipfile.BadZipFile("a"),
    "AssertionError: a": AssertionError("a"),
    "No space left on device": OSError(28, "No space left on device"),
    "PanicException: a": PanicException("a"),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, CONFIG, dict(initial_values(CONFIG)), layout="hf", dtype="float32")
    return folder


def raising(fault):
    def raise_it(*_, **__):
        raise fault

    return raise_it


def uses(folder):
    return {
        "open_checkpoint": lambda: open_checkpoint(folder),
        "open_model": lambda: open_model(folder),
        "load": lambda: mc.load(folder, backend=installed()[0]),
        "convert": lambda: convert(folder, folder.parent / "out", to="mamba_ssm"),
        "inspect": lambda: inspect(folder),
        "load_state": lambda: mc.load_state(folder / "model.safetensors", mc.build(CONFIG)),
    }


@pytest.mark.parametrize("words", FAULTS)
def test_faults_of_a_header(folder, monkeypatch, words):
    fault = FAULTS[words]
    monkeypatch.setattr(safetensors, "_parse_tensor", raising(fault))
    for use in uses(folder).values():
        with pytest.raises(CheckpointError, match=words) as caught:
            use()
        assert str(caught.value).startswith(str(folder))
        assert caught.value.__cause__ is fault or isinstance(fault, ValueError)


@pytest.mark.parametrize("words", FAULTS)
def test_faults_of_a_tensor(folder, monkeypatch, words):
    opened, fault = open_model(folder), FAULTS[words]
    monkeypatch.setattr(files.InputFile, "read_into", raising(fault))
    for use in (lambda: dict(opened.tensors()), uses(folder)["load"], uses(folder)["convert"]):
        with pytest.raises(CheckpointError, match=words) as caught:
            use()
        assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_passes(folder, monkeypatch, fault):
    monkeypatch.setattr(safetensors, "_parse_tensor", raising(fault()))
    for use in uses(folder).values():
        with pytest.raises(fault):
            use()


def test_a_callback_s_fault_is_its_own(folder, tmp_path):
    with pytest.raises(KeyError, match="mine"):
        convert(folder, tmp_path / "out", to="hf", progress=raising(KeyError("mine")))
    (tmp_path / "text").write_text("text")
    tokenizer = type("Tokenizer", (), {"encode": raising(KeyError("mine")), "decode": raising(KeyError("mine"))})
    with pytest.raises(KeyError, match="mine"):
        read_tokens(tmp_path / "text", tokenizer())


def test_a_name_that_is_not_there_stays_a_key_error(folder):
    with pytest.raises(KeyError):
        open_checkpoint(folder)["other"]
    assert open_checkpoint(folder).get("other") is None


def test_a_message_has_an_end():
    for letter in ("a", "\U000e0001", "\ud800", "\N{GRINNING FACE}"):
        for fault in (CheckpointError(letter * 10**6), KeyError(letter * 10**6)):
            with pytest.raises(CheckpointError) as caught, boundary("place"):
                raise fault
            assert len(str(caught.value).encode()) <= 2000
            assert str(caught.value).isprintable()


# --- paths -----------------------------------------------------------------------------------------

PATHS = {
    "loop": lambda folder: folder / "loop",
    "in_a_loop": lambda folder: folder / "loop" / "x.npz",
    "long": lambda folder: folder / ("x" * 300),
    "deep": lambda folder: folder / "/".join(["y" * 200] * 30),
    "nul": lambda folder: f"{folder}/x\0y",
    "surrogate": lambda folder: f"{folder}/x\ud800y",
    "in_a_file": lambda folder: folder / "config.json" / "x",
}
READING = {
    "open_model": open_model,
    "open_checkpoint": open_checkpoint,
    "inspect": inspect,
    "read_tokens": read_tokens,
    "load_settings": load_settings,
    "tokenizer": SubwordTokenizer,
    "convert_from": lambda path: convert(path, "out", to="hf"),
}


@pytest.mark.skipif(os.name == "nt", reason="links and names as Unix has them")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("use", [*READING, "convert_to"])
def test_paths_that_lead_nowhere(folder, tmp_path, path, use):
    (folder / "loop").symlink_to(folder / "loop")
    given = PATHS[path](folder)
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / given, to="hf") if use == "convert_to" else READING[use](given)
    assert str(caught.value).isprintable()


# --- tokenizers and layouts ------------------------------------------------------------------------


def test_a_tokenizer_that_fails(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(path))
    read = SubwordTokenizer(path)
    assert read.encode("a") == [0]
    read.tokenizer = type("Broken", (), dict.fromkeys(("encode", "decode"), raising(PanicException("index"))))()
    uses = ((read.encode, "a"), (read.encode_more, "a"), (read.encode_rendered, "a"), (read.decode, [0]))
    for use, given in (*uses, (read.decoder, [0])):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: .* that can be used: PanicException: index"):
            use(given)
    path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer that can be used"):
        SubwordTokenizer(path)


def test_a_tokenizer_that_panics(tmp_path):
    """Its template has a token that it does not define. Rust tells of it on standard error, and then raises."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(path))
    single = [{"SpecialToken": {"id": "none", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer that can be used"):
        SubwordTokenizer(path).encode("a")


def in_every_layout(folder):
    for name in architectures.names():
        heads = {"mamba2": {"headdim": 2}, "jamba": layout_files.FEW}.get(name, {})
        config = architectures.find(name).Config(d_model=8, n_layer=2, vocab_size=16, **heads)
        for layout in layouts.names():
            path = folder / f"{name}-{layout}"
            path.mkdir()
            try:
                write_model(path, config, dict(initial_values(config)), layout=layout, dtype="float32")
            except ValueError:
                continue  # a layout that cannot hold it
            yield path
            (folder / f"{name}-{layout}-alone").mkdir()
            for file in path.iterdir():
                if file.name != "config.json":
                    os.link(file, folder / f"{name}-{layout}-alone" / file.name)
            yield folder / f"{name}-{layout}-alone"


COMMANDS = {"inspect": [], "convert": ["out", "--to", "hf"], "generate": ["a"], "parity": []}


def refusal(path, layout) -> str:
    try:
        open_model(path, layout=layout)
    except ValueError as fault:
        return str(fault)
    return ""


def test_every_layout_named_for_every_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = [(path, layout) for path in in_every_layout(tmp_path) for layout in layouts.names()]
    refused = [(path, layout, text) for path, layout in every if (text := refusal(path, layout))]
    assert len(refused) > 20
    for (path, layout, text), (command, rest) in zip(refused, cycle(COMMANDS.items()), strict=False):
        assert text.startswith(str(path))
        assert cli.main([command, str(path), *rest, "--from", layout]) == 2
        assert capsys.readouterr().err == f"mamba-core: {text}\n"
