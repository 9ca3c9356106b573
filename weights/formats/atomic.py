"""Folders and files that appear under their final name only when they are complete and on disk."""

import glob
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mamba_core.weights.formats.errors import CheckpointError, boundary
from mamba_core.weights.formats.exchange import exchange

try:
    import fcntl
except ModuleNotFoundError:  # on Windows, where what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

SYNC_SECONDS = 0.1
_PARTIAL, _OLD = ".partial", ".old"
# Files that lie together in a checkpoint's folder alone. The second pair is mistral-inference's.
_CHECKPOINTS = (("config.json",), ("params.json", "consolidated.safetensors"))


@contextmanager
def atomic_folder(path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path` when the block ends, and is removed if it fails.

    A folder that is not empty is refused unless `overwrite`; then it stays as it was until the new one is complete.
    One that holds no config is no checkpoint and is never replaced, nor is the current directory, nor those above
    it. Whoever is killed leaves the old folder or the new one; what it left beside `path` goes, or returns, when the
    next begins.

    Raises:
        CheckpointError: `path` cannot be replaced, another process is writing it, or the disk is full or read-only.
    """
    final = resolved(path)
    with _disk_faults(final):
        restore_folder(final)
        _check_folder(final, overwrite)
        _remove_stale(final)
        partial = _beside(final, _PARTIAL)
        parents = _missing_parents(final)
        partial.mkdir(parents=True)
        lock = _lock(partial)
        try:
            _check_alone(final, partial)
            yield partial
            for entry in partial.rglob("*"):
                _sync(entry)
            _sync(partial)
            _check_folder(final, overwrite)
            _replace_folder(partial, final)
        except BaseException as fault:
            shutil.rmtree(partial, ignore_errors=True)
            _remove_empty(parents)
            if isinstance(fault, CheckpointError):  # it may name the partial folder, which nobody knows
                raise CheckpointError(str(fault).replace(str(partial), str(final))) from None
            raise
        finally:
            _unlock(lock)
        _sync(final.parent)


@contextmanager
def atomic_file(path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty file beside `path` that becomes `path` when the block ends, and is removed if it fails.

    It is to be written to, not replaced. What a killed process left beside `path` is removed first.
    """
    final = resolved(path)
    _check_file(final, overwrite)
    partial = _beside(final, _PARTIAL)
    with _disk_faults(final):
        parents = _missing_parents(final)
        partial.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final)
        partial.touch()
        lock = _lock(partial)
        try:
            _check_alone(final, partial)
            yield partial
            _sync(partial)
            _check_file(final, overwrite)
            os.replace(partial, final)
        except BaseException:
            partial.unlink(missing_ok=True)
            _remove_empty(parents)
            raise
        finally:
            _unlock(lock)
        _sync(final.parent)


def probe_folder(path, overwrite: bool = False) -> None:
    """Check that `atomic_folder` could write there now: before the work is done that the folder is to hold.

    Raises:
        CheckpointError: as `atomic_folder`.
    """
    with suppress(_ProbedError), atomic_folder(path, overwrite):
        raise _ProbedError


def probe_file(path, overwrite: bool = False) -> None:
    """As `probe_folder`, of `atomic_file`."""
    with suppress(_ProbedError), atomic_file(path, overwrite):
        raise _ProbedError


def resolved(path) -> Path:
    """The path without links.

    Raises:
        CheckpointError: it is none, such as a loop of links, or a name too long or with a character that no file has.
    """
    with boundary(path):
        final = Path(path).resolve()
        final.exists()  # which a name of too many letters does not survive
        os.fsencode(final)
        return final


class _ProbedError(Exception):
    """Ends a probe, so that nothing is left of it."""


@contextmanager
def _disk_faults(final: Path) -> Iterator[None]:
    """Faults of the disk name what was to be written, not the partial file that nobody knows."""
    try:
        yield
    except OSError as fault:
        if fault.errno is None or not _is_about(fault.filename, final):
            raise
        raise CheckpointError(f"{final}: cannot be written: {fault.strerror}") from None


def _is_about(name: str | None, final: Path) -> bool:
    # A write to an open file, such as one on a full disk, fails without a name.
    return name is None or Path(name).is_relative_to(final.parent) or final.is_relative_to(name)


@contextmanager
def early_sync(folder: Path) -> Iterator[None]:
    """Sync the folder's files again and again while they are written, so that the disk does not begin at the end."""
    ended = threading.Event()

    def sync() -> None:
        while not ended.wait(SYNC_SECONDS):
            for path in folder.iterdir():
                _sync(path)

    with ThreadPoolExecutor(1) as thread:
        syncing = thread.submit(sync)
        try:
            yield
        finally:
            ended.set()
        syncing.result()  # a fault of the disk is told once, so that the sync at the end might not see it


def _check_folder(final: Path, overwrite: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise CheckpointError(f"{final}: is a file; expected a folder, or a name that is free")
    if any(final.iterdir()) and not overwrite:
        raise CheckpointError(f"{final}: the folder is not empty; choose another, or overwrite it")
    if Path.cwd().is_relative_to(final):
        raise CheckpointError(f"{final}: is or holds the current directory, which is never replaced")
    if any(final.iterdir()) and not any(all((final / name).is_file() for name in names) for names in _CHECKPOINTS):
        raise CheckpointError(f"{final}: holds no config.json, so it is no checkpoint; remove it yourself")


def _check_file(final: Path, overwrite: bool) -> None:
    if final.is_dir():
        raise CheckpointError(f"{final}: is a folder; expected a file, or a name that is free")
    if final.exists() and not overwrite:
        raise CheckpointError(f"{final}: the file exists; choose another name, or overwrite it")


def _missing_parents(final: Path) -> list[Path]:
    """Those that are to be made, the innermost first."""
    return [parent for parent in final.parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # another process has put something there
            folder.rmdir()


def _replace_folder(partial: Path, final: Path) -> None:
    """Where names cannot be exchanged there is no folder for a moment; who is killed then leaves the old one aside."""
    if not final.exists():
        os.rename(partial, final)
        return
    if exchange(partial, final):
        shutil.rmtree(partial, ignore_errors=True)  # what is left goes with the next writer
        return
    old = _beside(final, _OLD)
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old)


def restore_folder(path) -> None:
    """The folder that a killed process had moved away returns, or goes if its successor is in place."""
    final = resolved(path)
    for old in _all_beside(final, _OLD):
        if final.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, final)


def _remove_stale(final: Path) -> None:
    for partial in _all_beside(final, _PARTIAL):
        if (lock := _lock(partial)) is not None:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
            _unlock(lock)


def _check_alone(final: Path, partial: Path) -> None:
    """Of several writers that begin at once, each sees another: all may be refused, and never two go on."""
    for other in _all_beside(final, _PARTIAL):
        if other == partial or fcntl is None:
            continue
        if (lock := _lock(other)) is None and other.exists():
            raise CheckpointError(f"{final}: is being written by another process")
        _unlock(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the path's lock until it is closed or its process ends; None if it cannot be had."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # its writer has just ended
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _beside(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}{suffix}")


def _all_beside(final: Path, suffix: str) -> list[Path]:
    return list(final.parent.glob(f".{glob.escape(final.name)}.{'[0-9a-f]' * 8}{suffix}"))


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no folder, and syncs only what was opened for writing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
