"""Folders and files that appear under their final name only when they are complete and on disk."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mamba_core.weights.formats import CheckpointError


@contextmanager
def atomic_folder(path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path` when the block ends, and is removed if it fails.

    A folder that is not empty is refused unless `overwrite`; then it stays as it was until the new one is complete.
    The current directory and those above it are never replaced.
    """
    final = Path(path).resolve()
    _check_folder(final, overwrite)
    partial = _beside(final)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in partial.rglob("*"):
            _sync(entry)
        _sync(partial)
        _check_folder(final, overwrite)
        _replace_folder(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(final.parent)


@contextmanager
def atomic_file(path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a file name beside `path` that becomes `path` when the block ends, and is removed if it fails."""
    final = Path(path).resolve()
    _check_file(final, overwrite)
    partial = _beside(final)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _sync(partial)
        _check_file(final, overwrite)
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(final.parent)


def _check_folder(final: Path, overwrite: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise CheckpointError(f"{final}: is a file; expected a folder, or a name that is free")
    if any(final.iterdir()) and not overwrite:
        raise CheckpointError(f"{final}: the folder is not empty; choose another, or overwrite it")
    if Path.cwd().is_relative_to(final):
        raise CheckpointError(f"{final}: is or holds the current directory, which is never replaced")


def _check_file(final: Path, overwrite: bool) -> None:
    if final.is_dir():
        raise CheckpointError(f"{final}: is a folder; expected a file, or a name that is free")
    if final.exists() and not overwrite:
        raise CheckpointError(f"{final}: the file exists; choose another name, or overwrite it")


def _replace_folder(partial: Path, final: Path) -> None:
    if not final.exists():
        os.rename(partial, final)
        return
    old = _beside(final)
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old)


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no folder, and syncs only what was opened for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
