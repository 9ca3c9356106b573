"""Every file that is read: no regular file is a refusal, and one that changes meanwhile is an error and no signal."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import cli
from mamba_core.chat import rendered
from mamba_core.data import read_tokens
from mamba_core.registry import installed
from mamba_core.spec.init import initial_values
from mamba_core.tokenizer import tokenizer_of
from mamba_core.training import load_settings
from mamba_core.weights.convert import convert
from mamba_core.weights.formats import CheckpointError, sources_of, write_npz, write_safetensors_file, write_torch
from mamba_core.weights.formats.files import MAX_JSON_BYTES
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs")

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=256, d_state=2)
SECONDS = 5


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, CONFIG, dict(initial_values(CONFIG)), layout="mamba_ssm", dtype="float32")
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    write_model(folder, CONFIG, dict(initial_values(CONFIG)), layout="hf", dtype="float32")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"eos_token_id"', '"other"'))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    return folder


@pytest.fixture(autouse=True)
def _in_time():
    """A read that waits for ever ends as one that has another message."""

    def late(*_):
        raise TimeoutError("waited")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def place(kind: str, path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a character device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as bound:
            before = os.getcwd()
            os.chdir(path.parent)  # a socket's path has 107 bytes at most
            bound.bind(path.name)
            os.chdir(before)


KINDS = ("a FIFO", "a character device", "a folder", "a socket")
MODEL = type("Model", (), {"config": CONFIG})


def model_of(folder):
    model = MODEL()
    model.source = folder
    return model


# A file of a checkpoint -> what reads it.
READERS = {
    **dict.fromkeys(
        ("config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json", "added_tokens.json"),
        open_model,
    ),
    **dict.fromkeys(("special_tokens_map.json", "tokenizer.json", "vocab.json"), open_model),
    "chat_template.jinja": lambda folder: rendered(model_of(folder), [{"role": "user", "content": "a"}]),
    "training.json": load_settings,
    "tokenizer.json of text": lambda folder: tokenizer_of(model_of(folder)),
    **{
        name: lambda folder, name=name: open_checkpoint(folder / name)
        for name in ("model.safetensors.index.json", "a.bin", "a.npz", "optimizer.safetensors")
    },
    "a.npy": lambda folder: read_tokens(folder / "a.npy"),
    "a.txt": lambda folder: read_tokens(folder / "a.txt"),
}


# A folder of text is read, and one of any name may be a checkpoint.
MAY_BE_FOLDERS = ("a.txt", "a.bin", "a.npz", "optimizer.safetensors", "model.safetensors.index.json")
SPECIAL = [(name, kind) for name in READERS for kind in KINDS if kind != "a folder" or name not in MAY_BE_FOLDERS]


@pytest.mark.parametrize(("name", "kind"), SPECIAL)
def test_what_is_no_regular_file_is_refused(folder, name, kind):
    place(kind, folder / name.removesuffix(" of text"))
    if kind == "a folder" and name in (
        "a.txt",
        "a.bin",
        "a.npz",
        "optimizer.safetensors",
        "model.safetensors.index.json",
    ):
        pytest.skip("a folder of text is read, and one of another name is a checkpoint")
    with pytest.raises(
        CheckpointError, match=f"{name.removesuffix(' of text')}: .*is {kind}.*; expected a regular file"
    ):
        READERS[name](folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "training.json", "chat_template.jinja"])
def test_a_sparse_file_is_refused_by_its_size(folder, name):
    with open(folder / name, "wb") as file:
        file.truncate(2**36)
    with pytest.raises(CheckpointError, match=rf"{name}: .*has more than {MAX_JSON_BYTES} bytes"):
        READERS[name](folder)


@pytest.mark.parametrize("name", ["a.txt", "a.npy", "a.bin", "a.npz", "a.safetensors"])
def test_a_sparse_file_is_not_read_to_its_end(folder, name):
    with open(folder / name, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError if name != "a.txt" else ValueError, match=name):
        (read_tokens if name in ("a.txt", "a.npy") else open_checkpoint)(folder / name)


def test_a_zip_that_claims_a_directory_of_gigabytes(folder):
    write_npz(folder / "a.npz", sources_of({"w": np.zeros(2)}))
    whole = (folder / "a.npz").read_bytes()
    end = whole.rindex(b"PK\5\6")
    with open(folder / "a.npz", "wb") as file:
        file.truncate(2**31)
        file.seek(2**31)
        file.write(whole[end : end + 12] + (2**31).to_bytes(4, "little") + bytes(4) + whole[end + 20 :])
    with pytest.raises(CheckpointError, match="directory has 2147483648 bytes; at most"):
        open_checkpoint(folder / "a.npz")


@pytest.mark.parametrize("option", ["--data", "--config", "--tokenizer"])
def test_the_command_line_refuses_a_fifo(tmp_path, option, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("some text")
    given = {"--data": tmp_path / "text", "--out": tmp_path / "out"} | {option: tmp_path / "fifo"}
    assert cli.main(["train", *(str(part) for pair in given.items() for part in pair)]) == 2
    assert capsys.readouterr().err == f"mamba-core: {tmp_path / 'fifo'}: is a FIFO or a pipe; expected a regular file\n"


def test_a_fifo_beside_a_checkpoint_is_not_copied(folder, tmp_path):
    os.mkfifo(folder / "tokenizer.model")
    with pytest.warns(UserWarning, match=r"tokenizer\.model: is a FIFO .*; it is left out"):
        convert(folder, tmp_path / "out", to="mamba_ssm")
    assert not (tmp_path / "out" / "tokenizer.model").exists()


# --- files that change -----------------------------------------------------------------------------

ARRAYS = {"w": np.arange(2**19, dtype=np.float32), "v": np.ones((3, 2), np.float32).T}
WRITERS = {"a.safetensors": write_safetensors_file, "a.bin": write_torch, "a.npz": write_npz}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("change", ["cut short", "changed"])
def test_a_file_that_changes_while_it_is_read(tmp_path, name, change):
    path = tmp_path / name
    WRITERS[name](path, sources_of(ARRAYS))
    opened, size = open_checkpoint(path), path.stat().st_size
    assert opened["w"][-1] == 2**19 - 1
    if change == "changed":
        path.write_bytes(bytes(size))
        os.utime(path, ns=(0, 0))  # a clock may not have moved
    else:
        os.truncate(path, size // 2)
    for use in (lambda: opened["w"], lambda: opened.have_same_bytes("w", "w")):
        with pytest.raises(CheckpointError, match=f"{name}: was {change} while it was read"):
            use()


def test_a_file_that_is_replaced_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors_file(path, sources_of(ARRAYS))
    opened = open_checkpoint(path)
    write_safetensors_file(tmp_path / "new", sources_of({"w": np.zeros(1)}))
    os.replace(tmp_path / "new", path)
    assert np.array_equal(opened["w"], ARRAYS["w"])


CUTTING = """
import os, sys
from mamba_core import cli
from mamba_core.weights.formats.files import InputFile
read, calls = InputFile.read_into, []
def cutting(self, *arguments):
    calls.append(None)
    if len(calls) == 5:
        os.truncate(self.path, len(self) // 4)
    read(self, *arguments)
InputFile.read_into = cutting
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["convert", "generate", "inspect"])
def test_a_source_that_is_cut_while_a_command_reads_it(folder, tmp_path, command):
    rest = {
        "convert": [str(tmp_path / "out"), "--to", "mamba_ssm", "--json"],
        "generate": ["a", "--backend", installed()[0]],
        "inspect": ["--values"],
    }
    signal.setitimer(signal.ITIMER_REAL, 0)
    done = subprocess.run(
        [sys.executable, "-c", CUTTING, command, str(folder), *rest[command]], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"mamba-core: {folder}")
    assert "model.safetensors: was cut short while it was read" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [folder]


def test_memory_that_is_held_is_not_used_again(tmp_path):
    """What is read next goes to memory that nobody holds, by whatever view."""
    arrays = {str(number): np.full((600, 600), number, np.float32) for number in range(6)}
    write_safetensors_file(tmp_path / "a.safetensors", sources_of(arrays))
    opened = open_checkpoint(tmp_path / "a.safetensors")
    kept = {"0": opened["0"].T, "2": memoryview(opened["2"]), "3": opened["3"][5:].view(np.int32)}
    for name in arrays:
        assert (opened[name] == int(name)).all()
    assert (kept["0"] == 0).all()
    assert (np.asarray(kept["2"]) == 2).all()
    assert (kept["3"].view(np.float32) == 3).all()
