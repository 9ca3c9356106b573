"""Conversion between layouts, a tensor at a time, bytes preserved; and what a checkpoint holds, from its headers."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from mamba_core.spec.params import parameter_count
from mamba_core.weights.io import atomic_folder
from mamba_core.weights.layouts import copy_tokenizer, open_model, write_layout
from mamba_core.weights.names import names


@dataclass(frozen=True)
class ConvertedTensor:
    """One row of a conversion's report."""

    source: str
    target: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    source_layout: str
    target_layout: str
    tensors: tuple[ConvertedTensor, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. dtypes: how many tensors have each. tensors: name in the file -> shape and dtype."""

    layout: str
    config: dict
    files: tuple[str, ...]
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    tensors: dict[str, tuple[tuple[int, ...], str]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    layout: str | None = None,
    file_format: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> Conversion:
    """Write a checkpoint in another layout. Every tensor keeps its bytes.

    Args:
        source: a folder, file or hub id. target: a folder, which appears only when complete and checked.
        to: "hf" or "mamba_ssm".
        layout: that of the source; detected by default.
        file_format: "safetensors" or "bin"; by default what the layout's own library reads.
        overwrite: replace an existing folder.

    Raises:
        CheckpointError: the source is broken, or the target exists.
        ValueError: an unknown layout, or a config that the target layout cannot express.
    """
    opened = open_model(source, layout=layout, revision=revision)
    if Path(target).resolve() == opened.folder.resolve():
        raise ValueError(f"{target}: is the source too; choose another folder to write")
    listed = list(opened.sources())
    with atomic_folder(target, overwrite=overwrite) as folder:
        write_layout(folder, opened.config, [source for _, _, source in listed], to, file_format)
        copy_tokenizer(opened.folder, folder)
        open_model(folder, layout=to)
    theirs = names(opened.config, to)
    rows = (ConvertedTensor(stored, theirs[item.name], item.shape, item.dtype) for _, stored, item in listed)
    return Conversion(opened.layout, to, tuple(rows))


def inspect(source: str | Path, *, layout: str | None = None, revision: str | None = None) -> Inspection:
    """Layout, config, files, parameters and dtypes of a checkpoint, from its headers alone."""
    opened = open_model(source, layout=layout, revision=revision)
    headers = {name: opened.checkpoint.header(name) for name in opened.checkpoint}
    return Inspection(
        layout=opened.layout,
        config=opened.config.to_dict(),
        files=tuple(path.name for path in opened.checkpoint.files),
        parameters=parameter_count(opened.config),
        nbytes=sum(header.nbytes for header in headers.values()),
        dtypes=dict(Counter(header.dtype for header in headers.values())),
        tensors={name: (header.shape, header.dtype) for name, header in headers.items()},
    )
