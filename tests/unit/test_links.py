"""Links in a checkpoint: those that lead out of it are read, and never copied into a result without a word."""

import json
import os
import subprocess
import sys

import pytest

import mamba_core as mc
from mamba_core.registry import installed
from mamba_core.spec.init import initial_values
from mamba_core.weights.convert import convert
from mamba_core.weights.opening import open_model
from mamba_core.weights.source import TOKENIZER_FILES
from mamba_core.weights.writing import write_model

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=256, d_state=2)
SECRET = '{"auths": "secret"}'


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, CONFIG, dict(initial_values(CONFIG)), layout="hf", dtype="float32")
    (tmp_path / "secret").write_text(SECRET)
    return folder


def linked(folder, name):
    (folder / name).symlink_to(folder.parent / "secret")
    return pytest.warns(
        UserWarning, match=rf"{name}: is a link to .*secret, outside of the checkpoint.*; it is left out"
    )


@pytest.mark.parametrize("name", [*TOKENIZER_FILES, "generation_config.json"])
def test_a_link_that_leads_out_is_not_copied(folder, tmp_path, name):
    with linked(folder, name):
        convert(folder, tmp_path / "out", to="mamba_ssm")
    assert not any("secret" in path.read_text("latin-1") for path in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / name).exists() or name == "generation_config.json"


def test_save_leaves_it_out_too(folder, tmp_path):
    model = mc.load(folder, backend=installed()[0])
    model.source = folder
    with linked(folder, "vocab.txt"):
        mc.save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_the_command_line_says_so_in_one_line(folder, tmp_path):
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    line = [sys.executable, "-m", "mamba_core.cli", "convert", str(folder), str(tmp_path / "out"), "--to", "mamba_ssm"]
    done = subprocess.run([*line, "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith(f"mamba-core: warning: {folder}/vocab.txt: is a link to {tmp_path}/secret, outside")
    assert done.stderr.count("\n") == 1


def test_links_inside_of_a_checkpoint_are_copied(folder, tmp_path, recwarn):
    (folder / "inner").mkdir()
    (folder / "inner" / "words").write_text("words")
    (folder / "vocab.txt").symlink_to("inner/words")
    os.symlink(folder, tmp_path / "alias")
    convert(tmp_path / "alias", tmp_path / "out", to="mamba_ssm")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    assert not recwarn.list


def in_hub_cache(folder, repository):
    """The folder as a snapshot in a cache: links to the files, each in blobs."""
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "vocab.txt").write_text("words")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_hub_s_cache_is_copied(folder, tmp_path, recwarn):
    snapshot = in_hub_cache(folder, tmp_path / "models--owner--name")
    convert(snapshot, tmp_path / "out", to="mamba_ssm")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    assert not recwarn.list


def test_what_only_looks_like_it_is_not(folder, tmp_path):
    snapshot = in_hub_cache(folder, tmp_path / "name")
    with pytest.warns(UserWarning, match=r"vocab\.txt: is a link to"):
        convert(snapshot, tmp_path / "out", to="mamba_ssm")


def test_a_linked_config_and_weights_are_read(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert open_model(folder).config.d_model == 8
    convert(folder, tmp_path / "out", to="hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 8
