"""Folders and files that appear only when they are complete."""

import os

import numpy as np
import pytest

from mamba_core.weights.io import (
    CheckpointError,
    atomic_file,
    atomic_folder,
    sources_of,
    write_safetensors,
)

# --- atomicity -------------------------------------------------------------------------------------


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "inner" / "file").read_text() == "new"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(tmp_path, failure):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(failure), atomic_folder(tmp_path / "out", overwrite=True) as partial:  # noqa: PT012
        (partial / "file").write_text("new")
        raise failure
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_failed_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    rename = os.rename

    def fail_into_place(source, target):
        if (source / "file").read_text() == "new":
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(OSError, match="no space"), atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "first").write_text("1")
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "second").write_text("2")
        assert names(tmp_path / "out") == ["first"]
    assert names(tmp_path / "out") == ["second"]
    assert names(tmp_path) == ["out"]


def test_an_occupied_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):
        raise AssertionError("entered")
    with pytest.raises(CheckpointError, match="is a file"), atomic_folder(tmp_path / "out" / "file", overwrite=True):
        raise AssertionError("entered")
    monkeypatch.chdir(tmp_path / "out")
    for path in (".", tmp_path):
        with pytest.raises(CheckpointError, match="current directory"), atomic_folder(path, overwrite=True):
            raise AssertionError("entered")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_folder_that_others_made_meanwhile_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")
    assert (tmp_path / "out" / "file").read_text() == "theirs"
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
