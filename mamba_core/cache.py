"""The folder of this user's cache: compiled GPU kernels, and the verdicts of self-tests."""

import os
import sys
from pathlib import Path


def folder() -> Path:
    """$MAMBA_CORE_CACHE, or mamba_core in the folder where this system keeps caches.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if given := os.environ.get("MAMBA_CORE_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "mamba_core"
    if sys.platform == "win32" and (given := os.environ.get("LOCALAPPDATA")):
        return Path(given) / "mamba_core"
    caches = Path("Library", "Caches") if sys.platform == "darwin" else Path(".cache")
    return Path.home() / caches / "mamba_core"


def keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a cache that cannot be written is done without."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            return
