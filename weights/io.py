"""A file of weights, or a folder of them, as one mapping of tensor name to array."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import nsmallest
from itertools import islice
from pathlib import Path

import numpy as np

from mamba_core.weights.formats import (
    READERS,
    CheckpointError,
    FileContents,
    Header,
    StoredTensor,
    boundary,
    list_names,
    read_json,
)
from mamba_core.weights.formats.errors import shorten

__all__ = ["Checkpoint", "open_checkpoint"]

_INDEX_SUFFIX = ".index.json"
# In the order in which transformers looks for them; then what libraries without a name of their own are written as.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "weights.npz",
)
# Of which a folder may hold one of any name. Not .bin, as which trainers save other things too.
_ANY_NAME = (".safetensors", ".pt", ".pth", ".ckpt", ".npz")
_SHOWN = 8
_SHARD_NAME = re.compile(r"\w[\w.+ -]*")


class Checkpoint(Mapping[str, np.ndarray]):
    """A read-only mapping of tensor name to array. An array is read when it is asked for.

    files: the files opened, in order. metadata: the text that safetensors files carry, {} for torch's.
    skipped: names of what lies beside the tensors and is not read, such as an optimizer's state.
    tensors: name -> its place in its file.
    """

    def __init__(
        self,
        tensors: dict[str, StoredTensor],
        files: tuple[Path, ...],
        metadata: dict[str, str],
        skipped: tuple[str, ...] = (),
    ) -> None:
        self.tensors = tensors
        self.files = files
        self.metadata = metadata
        self.skipped = skipped

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        with boundary(tensor.file.path):
            return tensor.array()

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The tensor's elements, row-major, as flat pieces of at most a megabyte, each read when its turn comes."""
        tensor = self.tensors[name]
        with boundary(tensor.file.path):
            yield from tensor.blocks()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"Checkpoint({len(self)} tensors, files={[str(path) for path in self.files]})"

    def have_same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are one in shape, dtype and bits; of either a few blocks are in memory at a time."""
        tensors = self.tensors[first], self.tensors[second]
        if tensors[0].header() != tensors[1].header():
            return False
        pairs = zip(tensors[0].blocks(), tensors[1].blocks(), strict=True)
        with boundary(tensors[0].file.path):
            return all(np.array_equal(one.view(np.uint8), other.view(np.uint8)) for one, other in pairs)

    def header(self, name: str) -> Header:
        """Shape, dtype name and size in bytes, from the file's header alone."""
        return self.tensors[name].header()


def open_checkpoint(path) -> Checkpoint:
    """Open a .safetensors, .bin, .pt, .pth, .ckpt or .npz file, an index of shards, or a folder with one of them.

    Raises:
        CheckpointError: the path, the index, or any header is at fault; no tensor has been read.
    """
    path = Path(path)
    with boundary(path):
        return _open(path)


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        path = _find_in_folder(path)
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file or folder")
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_shards(path)
    contents = _read_file(path)
    return Checkpoint(contents.tensors, (path,), contents.metadata, contents.skipped)


def _find_in_folder(folder: Path) -> Path:
    # What is no regular file, such as a link to nothing, is refused when it is opened, and not passed over.
    for name in _FOLDER_FILES:
        if os.path.lexists(folder / name):
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in _ANY_NAME and not path.is_dir())
    if len(found) > 1:
        names = list_names(path.name for path in found)
        raise CheckpointError(f"{folder}: the folder holds several files of weights: {names}; name the one to read")
    if not found:
        expected = f"{', '.join(_FOLDER_FILES)}, and no other file of {', '.join(_ANY_NAME)}"
        raise CheckpointError(f"{folder}: the folder holds none of {expected}")
    return found[0]


def _read_file(path: Path) -> FileContents:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise CheckpointError(f"{path}: unknown kind of file; expected one of {', '.join(READERS)}")
    return reader(path)


def _open_shards(index: Path) -> Checkpoint:
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    absent = (name for name in names if not os.path.lexists(f"{index.parent}{os.sep}{name}"))
    if missing := list(islice(absent, _SHOWN + 1)):  # of an index that names a million, the first few are looked for
        more = ", and more" if len(missing) > _SHOWN else ""
        raise CheckpointError(f"{index}: shards that are missing from the folder: {list_names(missing[:_SHOWN])}{more}")
    shards = {name: index.parent / name for name in names}
    contents = {name: _read_file(path) for name, path in shards.items()}
    held = {(tensor, name) for name in contents for tensor in contents[name].tensors}
    faults = [f"{tensor} is listed in {name} but not there" for tensor, name in _first(weight_map.items() - held)]
    faults += [f"{tensor} is in {name} but not listed there" for tensor, name in _first(held - weight_map.items())]
    if faults:
        raise CheckpointError(f"{index}: {'; '.join(faults)}")
    tensors = {tensor: contents[name].tensors[tensor] for tensor, name in weight_map.items()}
    metadata = {key: text for name in contents for key, text in contents[name].metadata.items()}
    skipped = tuple(dict.fromkeys(name for each in contents.values() for name in each.skipped))
    return Checkpoint(tensors, tuple(shards.values()), metadata, skipped)


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor name to file name")
    outside = [name for name in dict.fromkeys(weight_map.values()) if not _SHARD_NAME.fullmatch(name)]
    if outside:
        raise CheckpointError(f"{index}: shards that are not plain file names: {list_names(outside)}")
    by_folded = defaultdict(set)
    for name in weight_map.values():
        by_folded[name.casefold()].add(name)
    if clashes := [name for same in by_folded.values() if len(same) > 1 for name in sorted(same)]:
        raise CheckpointError(f"{index}: shards whose names differ in case only: {list_names(clashes)}")
    return weight_map


def _first(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The first few pairs of names in their order, for a message."""
    for pair in nsmallest(_SHOWN, pairs):
        yield shorten(pair[0]), shorten(pair[1])
