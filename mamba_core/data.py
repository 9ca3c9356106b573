"""Training data from files: text as tokens, and the source of Python's standard library as a corpus always at hand."""

import sysconfig
from pathlib import Path

import numpy as np

from mamba_core.tokenizer import as_tokenizer
from mamba_core.weights.formats import read_npy


def read_tokens(path: Path | str, tokenizer=None) -> np.ndarray:
    """(tokens,) of a text file, of every text file in a folder, or of a .npy file of token ids.

    Args:
        tokenizer: any object with `encode(text)` and `decode(ids)`; text is its UTF-8 bytes without one.

    Raises:
        ValueError: there is nothing there that can be read as text.
    """
    path = Path(path)
    if path.suffix == ".npy":
        tokens = read_npy(path).array()
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{path}: is {tokens.dtype} of shape {tokens.shape}; expected one axis of integers")
        return tokens
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return encode_files(files, tokenizer, where=path)


def standard_library(limit: int = 4_000_000) -> np.ndarray:
    """(tokens,) of the modules of this Python's standard library as bytes, about `limit` of them."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files, total = [], 0
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if total < limit and path.parent.name not in ("site-packages", "test", "idlelib", "lib2to3"):
            files.append(path)
            total += path.stat().st_size
    return encode_files(files, where=folder)


def encode_files(files: list[Path], tokenizer=None, *, where: Path) -> np.ndarray:
    """The files one after another. Those that are not UTF-8 text are left out."""
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    parts = []
    for path in files:
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        parts.append(np.frombuffer(data, np.uint8) if tokenizer is None else np.array(tokenizer.encode(text), np.int32))
    if not sum(len(part) for part in parts):
        raise ValueError(f"{where}: holds no UTF-8 text")
    return np.concatenate(parts)
