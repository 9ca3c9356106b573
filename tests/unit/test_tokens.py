"""Special tokens: from generation_config.json, config.json and the tokenizer's files; and what a conversion keeps."""

import dataclasses
import json

import pytest

import mamba_core as mc
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import copy_companions

from .layout_files import CONFIG, write

IDS = dataclasses.replace(CONFIG, tie_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=3)
SILENT = dataclasses.replace(CONFIG, tie_embeddings=True)


def put(folder, name, fields):
    (folder / name).write_text(json.dumps(fields))


def ids(folder) -> tuple:
    config = open_model(folder).config
    return config.bos_token_id, config.eos_token_id, config.pad_token_id


@pytest.mark.parametrize("layout", ["hf", "mamba_ssm", "mambapy", "mlx_lm"])
def test_generation_config_counts_before_config(tmp_path, layout):
    folder = write(tmp_path / "a", IDS, layout)
    own = (None,) * 3 if layout == "mamba_ssm" else (1, 2, 3)
    assert ids(folder) == own
    put(folder, "generation_config.json", {"eos_token_id": [5, 6], "pad_token_id": None, "temperature": 0.5})
    assert ids(folder) == (own[0], (5, 6), own[2])
    put(folder, "generation_config.json", {"bos_token_id": 7, "eos_token_id": 8})
    assert ids(folder) == (7, 8, own[2])


ADDED = {"added_tokens_decoder": {"9": {"content": "<e>"}, "10": {"content": "<p>"}, "x": {}, "1" * 5000: "<e>"}}
TOKENIZER = {"added_tokens": [{"id": 9, "content": "<e>"}, {"id": 10, "content": "<p>"}, 3]}
VOCABULARY = {"model": {"vocab": {"<e>": 9, "<p>": 10, "<b>": "no"}}}


@pytest.mark.parametrize("layout", ["hf", "mamba_ssm", "mambapy", "mlx_lm"])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": ADDED},
        {"added_tokens.json": {"<e>": 9, "<p>": 10}},
        {"tokenizer.json": TOKENIZER},
        {"tokenizer.json": VOCABULARY},
        {"vocab.json": {"<e>": 9, "<p>": 10}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<e>"}}}, "vocab.json": {"<p>": 10}},
    ],
)
def test_the_tokenizers_files_tell_what_no_config_does(tmp_path, layout, files):
    folder = write(tmp_path / "a", SILENT, layout)
    assert ids(folder) == (None, None, None)
    named = {"eos_token": "<e>", "pad_token": {"__type": "AddedToken", "content": "<p>"}, "bos_token": None}
    for name, fields in {"tokenizer_config.json": {}, **files}.items():
        put(folder, name, fields | (named if name == "tokenizer_config.json" else {}))
    assert ids(folder) == (None, 9, 10)
    put(folder, "generation_config.json", {"eos_token_id": 4})
    assert ids(folder) == (None, 4, 10)


def test_a_map_of_special_tokens_names_them_too(tmp_path):
    folder = write(tmp_path / "a", SILENT, "mamba_ssm")
    put(folder, "special_tokens_map.json", {"eos_token": "<e>", "bos_token": "<unknown>"})
    put(folder, "added_tokens.json", {"<e>": 9})
    assert ids(folder) == (None, 9, None)


def test_a_config_that_says_an_id_is_believed_before_the_tokenizer(tmp_path):
    for layout in ("hf", "mambapy"):
        folder = write(tmp_path / layout, IDS, layout)
        put(folder, "tokenizer_config.json", ADDED | {"eos_token": "<e>", "pad_token": "<p>"})
        assert ids(folder) == (1, 2, 3)


def test_an_id_that_config_json_does_not_mention(tmp_path):
    """Its library's default is 0; the tokenizer knows better."""
    folder = write(tmp_path / "a", IDS, "hf")
    fields = json.loads((folder / "config.json").read_text())
    put(folder, "config.json", {name: value for name, value in fields.items() if "token_id" not in name})
    assert ids(folder) == (0, 0, 0)
    put(folder, "tokenizer_config.json", ADDED | {"eos_token": "<e>"})
    assert ids(folder) == (0, 9, 0)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("generation_config.json", "{", "not valid JSON"),
        ("generation_config.json", "[]", "not a JSON object"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2'; expected an integer, several or"),
        ("generation_config.json", '{"bos_token_id": [1]}', r"bos_token_id is \[1\]; expected an integer"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer.json", "{", "not valid JSON"),
    ],
)
def test_faults_of_the_files(tmp_path, name, text, words):
    folder = write(tmp_path / "a", SILENT, "hf")
    put(folder, "tokenizer_config.json", {"eos_token": "<e>"})
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name}: {words}"):
        open_model(folder)


# --- what is kept ----------------------------------------------------------------------------------

KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
KEPT += ("chat_template.json", "tokenizer.model", "added_tokens.json", "merges.txt")


def published(folder, layout="hf"):
    """A checkpoint with every file beside it."""
    write(folder, IDS, layout)
    for name in KEPT:
        (folder / name).write_text('{"a": 1}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5],\n "temperature": 0.7}')
    return folder


@pytest.mark.parametrize("to", ["hf", "mamba_ssm", "mamba_minimal", "mambapy", "mambapy_mlx", "mlx_lm"])
def test_a_conversion_keeps_every_file_and_every_id(tmp_path, to):
    source = published(tmp_path / "a")
    mc.convert(source, tmp_path / "b", to=to)
    for name in (*KEPT, *(("generation_config.json",) if to != "mamba_ssm" else ())):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes(), name
    assert ids(tmp_path / "b") == (1, (2, 5), 3)
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["temperature"] == 0.7
    if to in ("hf", "mlx_lm"):
        assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == [2, 5]


def test_ids_that_a_layout_has_no_place_for(tmp_path):
    mc.convert(write(tmp_path / "a", IDS, "hf"), tmp_path / "b", to="mamba_ssm")
    assert ids(tmp_path / "b") == (1, 2, 3)
    mc.convert(tmp_path / "b", tmp_path / "c", to="hf")
    assert open_model(tmp_path / "c").config == open_model(tmp_path / "a").config
    mc.convert(write(tmp_path / "d", SILENT, "hf"), tmp_path / "e", to="mamba_ssm")
    assert not (tmp_path / "e" / "generation_config.json").exists()


def test_ids_that_were_changed_are_written_in_both_files(tmp_path):
    source, target = published(tmp_path / "a"), tmp_path / "b"
    target.mkdir()
    changed = dataclasses.replace(open_model(source).config, eos_token_id=7, bos_token_id=None)
    copy_companions(source, target, changed, "hf")
    found = json.loads((target / "generation_config.json").read_text())
    assert found == {"eos_token_id": 7, "temperature": 0.7, "bos_token_id": None}


def test_a_model_is_saved_with_the_ids_that_it_has(tmp_path):
    backend = pytest.importorskip("mamba_core.registry").installed()[0]
    model = mc.load(published(tmp_path / "a"), backend=backend)
    assert model.config.eos_token_id == (2, 5)
    mc.save(model, tmp_path / "b")
    assert (tmp_path / "b" / "generation_config.json").read_bytes() == (
        tmp_path / "a" / "generation_config.json"
    ).read_bytes()
    assert ids(tmp_path / "b") == (1, (2, 5), 3)
    model.config = dataclasses.replace(model.config, eos_token_id=9)
    mc.save(model, tmp_path / "c")
    assert ids(tmp_path / "c") == (1, 9, 3)
    mc.save(mc.build(IDS, backend=backend), tmp_path / "d", layout="mamba_ssm")
    assert ids(tmp_path / "d") == (1, 2, 3)
