"""Folders and files that appear only when they are complete."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from mamba_core.weights.formats import (
    CheckpointError,
    atomic,
    atomic_file,
    atomic_folder,
    early_sync,
    restore_folder,
    sources_of,
    write_safetensors,
)
from mamba_core.weights.formats.exchange import exchange

# --- atomicity -------------------------------------------------------------------------------------


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "config.json").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "inner" / "config.json").read_text() == "new"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(tmp_path, failure):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(failure), atomic_folder(tmp_path / "out", overwrite=True) as partial:  # noqa: PT012
        (partial / "config.json").write_text("new")
        raise failure
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("exchanges", [False, True])
def test_a_failed_rename_leaves_the_old_folder(tmp_path, monkeypatch, exchanges):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    rename = os.rename

    def fail_into_place(source, target):
        if (source / "config.json").read_text() == "new":
            raise OSError("no space")
        rename(source, target)

    def fail_to_exchange(one, other):
        if exchanges:
            raise OSError("no space")
        return False

    monkeypatch.setattr(os, "rename", fail_into_place)
    monkeypatch.setattr(atomic, "exchange", fail_to_exchange)
    with pytest.raises(OSError, match="no space"), atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("1")
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "second").write_text("2")
        assert names(tmp_path / "out") == ["config.json"]
    assert names(tmp_path / "out") == ["second"]
    assert names(tmp_path) == ["out"]


def test_an_occupied_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):
        raise AssertionError("entered")
    with (
        pytest.raises(CheckpointError, match="is a file"),
        atomic_folder(tmp_path / "out" / "config.json", overwrite=True),
    ):
        raise AssertionError("entered")
    monkeypatch.chdir(tmp_path / "out")
    for path in (".", tmp_path):
        with pytest.raises(CheckpointError, match="current directory"), atomic_folder(path, overwrite=True):
            raise AssertionError("entered")
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="holds no config"), atomic_folder(tmp_path / "out", overwrite=True):
        raise AssertionError("entered")
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_a_failure_leaves_no_new_parents(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "old" / "new" / "newer" / "out"):
        raise RuntimeError
    assert names(tmp_path / "old") == []


def test_a_fault_names_the_target_and_not_the_partial_folder(tmp_path):
    with pytest.raises(CheckpointError) as caught, atomic_folder(tmp_path / "out") as partial:
        raise CheckpointError(f"{partial / 'config.json'}: at fault")
    assert str(caught.value) == f"{tmp_path / 'out' / 'config.json'}: at fault"


def test_a_folder_that_others_made_meanwhile_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "out"
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(CheckpointError, match="exists"), atomic_file(path):
        raise AssertionError("entered")
    with pytest.raises(CheckpointError, match="is a folder"), atomic_file(tmp_path, overwrite=True):
        raise AssertionError("entered")
    with pytest.raises(RuntimeError), atomic_file(path, overwrite=True) as partial:  # noqa: PT012
        partial.write_text("broken")
        raise RuntimeError
    assert path.read_text() == "new"
    with atomic_file(path, overwrite=True) as partial:
        partial.write_text("newer")
    assert path.read_text() == "newer"
    assert names(tmp_path) == ["out"]


def test_what_appears_has_been_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), fsync(number)))
    with atomic_folder(tmp_path / "out") as partial:
        write_safetensors(partial, sources_of({"w": np.zeros(3)}))
        expected = [(partial / "model.safetensors").stat().st_ino, partial.stat().st_ino]
    assert synced == [*expected, tmp_path.stat().st_ino]


def test_what_is_being_written_is_synced_already(tmp_path, monkeypatch):
    synced = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda number: synced.set())
    (tmp_path / "config.json").write_text("first half")
    with early_sync(tmp_path):
        assert synced.wait(30)


def test_a_fault_of_an_early_sync_is_raised(tmp_path, monkeypatch):
    tried = threading.Event()

    def fail(number):
        tried.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "config.json").write_text("first half")
    with pytest.raises(OSError, match="Input/output"), early_sync(tmp_path):
        assert tried.wait(30)


# --- what a killed process leaves, and a disk that does not take it --------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="the locks are of POSIX")
def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".out.0123abcd.partial").mkdir()
    (tmp_path / ".out.0123abcd.partial" / "config.json").write_text("half")
    others = [".out.0123abcd.partial2", ".other.0123abcd.partial", ".out.words.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        assert names(tmp_path) == sorted([*others, partial.name])
    assert names(tmp_path) == sorted([*others, "out"])


@pytest.mark.skipif(sys.platform == "win32", reason="the locks are of POSIX")
def test_a_file_that_a_killed_process_left_is_removed(tmp_path):
    others = [".out.0123abcd.partial2", ".other.0123abcd.partial", ".out.words.partial"]
    for name in [".out.0123abcd.partial", *others]:
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "out", overwrite=True) as partial:
        assert names(tmp_path) == sorted([*others, partial.name])
    assert names(tmp_path) == sorted([*others, "out"])


@pytest.mark.skipif(sys.platform == "win32", reason="the locks are of POSIX")
@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_of_two_writers_the_second_is_refused(tmp_path, writer):
    with writer(tmp_path / "out", overwrite=True) as first:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="out: is being written by another process"):
                writer(tmp_path / "out", overwrite=True).__enter__()
            assert names(tmp_path) == [first.name]
    assert names(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from mamba_core.weights.formats import atomic, atomic_folder

def write(out):
    with atomic_folder(out, overwrite=True) as partial:
        for name in ("config.json", "a", "b"):
            (partial / name).write_text("new")

def die_at(event):
    # Kills this process at that event of the file system, counted from 1.
    left = [event]
    def hook(name, arguments):
        if name.startswith(("os.", "open", "shutil.")):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

if sys.argv[2] == "without exchange":
    atomic.exchange = lambda one, other: False
for event in range(1, 200):
    folder = Path(sys.argv[1], str(event))
    (folder / "out").mkdir(parents=True)
    for name in ("config.json", "a", "b", "c"):
        (folder / "out" / name).write_text("old")
    if not (child := os.fork()):
        die_at(event)
        write(folder / "out")
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        print(event)
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("how", ["with exchange", "without exchange"])
def test_a_process_that_is_killed_anywhere_leaves_the_old_folder_or_the_new_one(tmp_path, how):
    """Before each step; without an exchange of names the old folder may have to be put back."""
    can = exchange(*(tempfile.mkdtemp(dir=tmp_path) for _ in range(2)))
    if how == "with exchange" and not can:
        pytest.skip("this system or its file system cannot exchange names")
    line = [sys.executable, "-c", KILLED, str(tmp_path / "kills"), how]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills, seen = int(done.stdout), set()
    assert kills > 15
    for event in range(1, kills):
        folder = tmp_path / "kills" / str(event)
        if how == "without exchange":
            restore_folder(folder / "out")
        texts = {path.name: path.read_text() for path in (folder / "out").iterdir()}
        whole = {"old": {"a", "b", "c", "config.json"}, "new": {"a", "b", "config.json"}}
        (text,) = set(texts.values())
        assert set(texts) == whole[text]
        seen.add(text)
        with atomic_folder(folder / "out", overwrite=True) as partial:
            (partial / "config.json").write_text("next")
        assert names(folder) == ["out"]
        assert names(folder / "out") == ["config.json"]
    assert seen == {"old", "new"}


def test_a_folder_that_was_moved_away_by_a_killed_process_returns(tmp_path):
    (tmp_path / ".out.0123abcd.old").mkdir()
    (tmp_path / ".out.0123abcd.old" / "config.json").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):
        raise AssertionError("entered")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_folder_that_was_replaced_by_a_killed_process_goes(tmp_path):
    for name in (".out.0123abcd.old", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    with atomic_folder(tmp_path / "out", overwrite=True):
        assert names(tmp_path)[-1] == "out"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("function", ["mkdir", "fsync", "rename"])
def test_a_disk_that_does_not_take_it(tmp_path, monkeypatch, code, function):
    def fail(*arguments, **settings):
        raise OSError(code, os.strerror(code), None if function == "fsync" else str(tmp_path / ".out.0123abcd.partial"))

    monkeypatch.setattr(os, function, fail)
    message = f"{tmp_path / 'out'}: cannot be written: {os.strerror(code)}"
    with pytest.raises(CheckpointError) as caught, atomic_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("new")
    assert str(caught.value) == message
    assert names(tmp_path) == []


def test_a_fault_of_another_file_is_shown_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_folder(tmp_path / "out"):
        Path("/nowhere/elsewhere").read_text()
    assert names(tmp_path) == []


def test_a_target_below_a_file(tmp_path):
    (tmp_path / "config.json").write_text("text")
    with (
        pytest.raises(CheckpointError, match="cannot be written: Not a directory"),
        atomic_folder(tmp_path / "config.json" / "out"),
    ):
        raise AssertionError("entered")
