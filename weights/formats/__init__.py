"""Checkpoint files of every format: their readers and writers, and nothing about models.

A reader opens a regular file and executes nothing in it. A writer takes one tensor at a time.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from mamba_core.weights.formats.atomic import (
    atomic_file,
    atomic_folder,
    early_sync,
    probe_file,
    probe_folder,
    resolved,
    restore_folder,
)
from mamba_core.weights.formats.base import (
    DTYPES,
    FLOATS,
    DType,
    FileContents,
    Header,
    Progress,
    StoredTensor,
    TensorSource,
    blocks,
    count_bytes,
    count_nonfinite,
    fill,
    sources_of,
)
from mamba_core.weights.formats.errors import CheckpointError, boundary, explained, list_names
from mamba_core.weights.formats.files import MAX_JSON_BYTES, InputFile, parse_json, read_input, read_json
from mamba_core.weights.formats.npz import read_npy, read_npz, write_npz
from mamba_core.weights.formats.safetensors import read_safetensors, write_safetensors, write_safetensors_file
from mamba_core.weights.formats.torch import read_torch, write_torch

__all__ = [
    "DTYPES",
    "FLOATS",
    "MAX_JSON_BYTES",
    "READERS",
    "WRITERS",
    "CheckpointError",
    "DType",
    "FileContents",
    "Header",
    "InputFile",
    "Progress",
    "StoredTensor",
    "TensorSource",
    "atomic_file",
    "atomic_folder",
    "blocks",
    "boundary",
    "count_bytes",
    "count_nonfinite",
    "early_sync",
    "explained",
    "fill",
    "list_names",
    "parse_json",
    "probe_file",
    "probe_folder",
    "read_input",
    "read_json",
    "read_npy",
    "resolved",
    "restore_folder",
    "sources_of",
    "write_npz",
    "write_safetensors",
    "write_safetensors_file",
    "write_torch",
]

Writer = Callable[[Path, Iterable[TensorSource], dict[str, str], int | None, Progress | None], None]

# The end of a file's name -> its reader.
READERS: dict[str, Callable[[Path], FileContents]] = {".safetensors": read_safetensors, ".npz": read_npz}
READERS |= dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), read_torch)


def _safetensors(folder, sources, metadata, shard_bytes, progress) -> None:
    write_safetensors(folder, sources, metadata=metadata, shard_bytes=shard_bytes, progress=progress)


def _consolidated(folder, sources, metadata, shard_bytes, progress) -> None:
    write_safetensors_file(folder / "consolidated.safetensors", sources, metadata=metadata, progress=progress)


def _bin(folder, sources, metadata, shard_bytes, progress) -> None:
    write_torch(folder / "pytorch_model.bin", sources, progress)


def _pt(folder, sources, metadata, shard_bytes, progress) -> None:
    write_torch(folder / "model.pt", sources, progress)


def _pth(folder, sources, metadata, shard_bytes, progress) -> None:
    write_torch(folder / "model.pth", sources, progress, under="model")


def _npz(folder, sources, metadata, shard_bytes, progress) -> None:
    write_npz(folder / "weights.npz", sources, progress)


# A format's name -> write(folder, sources, metadata, shard_bytes, progress). Only safetensors has metadata and shards.
WRITERS: dict[str, Writer] = {
    "safetensors": _safetensors,
    "consolidated": _consolidated,
    "bin": _bin,
    "pt": _pt,
    "pth": _pth,
    "npz": _npz,
}
