"""Training data from files: text as tokens, and the source of Python's standard library as a corpus always at hand."""

import codecs
import sysconfig
from pathlib import Path

import numpy as np

from mamba_core.tokenizer import as_tokenizer
from mamba_core.weights.formats import CheckpointError, boundary, read_npy
from mamba_core.weights.formats.files import BLOCK_BYTES, open_input


def read_tokens(path: Path | str, tokenizer=None) -> np.ndarray:
    """(tokens,) of a text file, of every text file in a folder, or of a .npy file of token ids.

    The bytes of the files, or of the array, are in memory once, beside the tokens.

    Args:
        path: of regular files: what a pipe or a device gives cannot be read again when the run is resumed.
        tokenizer: any object with `encode(text)` and `decode(ids)`; text is its UTF-8 bytes without one.

    Raises:
        ValueError: there is nothing there that can be read as text: UTF-8 without the character of number 0.
    """
    path = Path(path)
    with boundary(path):
        files = _files(path)
        tokens = _read_ids(path) if path.suffix == ".npy" else None
    return encode_files(files, tokenizer, where=path) if tokens is None else tokens


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]


def _read_ids(path: Path) -> np.ndarray:
    tokens = read_npy(path).array()
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise CheckpointError(f"{path}: is {tokens.dtype} of shape {tokens.shape}; expected one axis of integers")
    return tokens


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
    """The files one after another. Those that are not text, as `read_tokens` has it, are left out."""
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    parts = []
    for path in files:
        with boundary(path):
            data = _read_text(path)
        if data is not None:
            bytes_ = np.frombuffer(data, np.uint8)
            parts.append(bytes_ if tokenizer is None else np.array(tokenizer.encode(data.decode("utf-8")), np.int32))
    if not sum(len(part) for part in parts):
        raise ValueError(f"{where}: holds no UTF-8 text")
    return np.concatenate(parts)


def _read_text(path: Path) -> bytes | None:
    """The bytes of a text file, None for another. No more than a block is read of what does not begin as text."""
    decoder, parts = codecs.getincrementaldecoder("utf-8")(), []
    with open(open_input(path), "rb", buffering=0) as file:
        try:
            while block := file.read(BLOCK_BYTES):
                decoder.decode(block)
                if 0 in block:
                    return None
                parts.append(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return None
    return b"".join(parts)
