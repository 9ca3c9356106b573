"""Folders and files that appear only when they are complete."""

import errno
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mamba_core.weights.formats import (
    CheckpointError,
    atomic_file,
    atomic_folder,
    early_sync,
    sources_of,
    write_safetensors,
)

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


def test_a_failed_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    rename = os.rename

    def fail_into_place(source, target):
        if (source / "config.json").read_text() == "new":
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_into_place)
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
def test_a_file_that_a_killed_process_left_is_removed_and_one_that_is_being_written_is_not(tmp_path):
    others = [".out.0123abcd.partial2", ".other.0123abcd.partial", ".out.words.partial"]
    for name in [".out.0123abcd.partial", *others]:
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "out", overwrite=True) as first:  # noqa: SIM117
        with atomic_file(tmp_path / "out") as second:
            assert names(tmp_path) == sorted([*others, first.name, second.name])
    assert names(tmp_path) == sorted([*others, "out"])


@pytest.mark.skipif(sys.platform == "win32", reason="the locks are of POSIX")
def test_a_folder_that_is_being_written_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "out") as first:  # noqa: SIM117
        with atomic_folder(tmp_path / "out") as second:
            assert names(tmp_path) == sorted([first.name, second.name])


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
