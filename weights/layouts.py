"""Layouts of checkpoints: which one a folder has, its config, and its tensors under canonical names.

A layout is a row in `LAYOUTS` and a table in `names.py`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core.config import MambaConfig
from mamba_core.spec.params import Parameter, parameter_table
from mamba_core.weights.formats import parse_json
from mamba_core.weights.io import (
    Checkpoint,
    CheckpointError,
    TensorSource,
    open_checkpoint,
    write_safetensors,
    write_torch,
)
from mamba_core.weights.names import EMBEDDING, HEAD, RENAMED, WRITES_TIED_HEAD, names

FLOATS = ("float32", "bfloat16", "float16", "float64")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "generation_config.json"),
)


class Layout(NamedTuple):
    """How a family of checkpoints is laid out.

    recognises: whether a parsed config.json is of this layout.
    read_config, write_config: config.json's fields <-> our config.
    file_format: what its own library reads, "safetensors" or "bin".
    """

    recognises: Callable[[dict], bool]
    read_config: Callable[[dict], Any]
    write_config: Callable[[Any], dict]
    file_format: str


LAYOUTS = {
    "hf": Layout(
        lambda fields: "model_type" in fields or "hidden_size" in fields,
        MambaConfig.from_hf,
        MambaConfig.to_hf,
        "safetensors",
    ),
    "mamba_ssm": Layout(
        lambda fields: "d_model" in fields and "architecture" not in fields,
        MambaConfig.from_mamba_ssm,
        MambaConfig.to_mamba_ssm,
        "bin",
    ),
}
WRITERS = {
    "safetensors": lambda folder, sources: write_safetensors(folder, sources),
    "bin": lambda folder, sources: write_torch(folder / "pytorch_model.bin", sources),
}


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that has been checked against its config; its tensors are not loaded until asked for."""

    layout: str
    config: Any
    folder: Path
    checkpoint: Checkpoint

    @property
    def dtype(self) -> str:
        """The compute dtype that it was saved in: that of its embedding, float32 for float64."""
        stored = self.checkpoint.header(names(self.config, self.layout)[EMBEDDING]).dtype
        return "float32" if stored == "float64" else stored

    def sources(self) -> Iterator[tuple[Parameter, str, TensorSource]]:
        """(parameter, its name in the file, its source under the canonical name) in the table's order."""
        theirs = names(self.config, self.layout)
        for name, parameter in parameter_table(self.config).items():
            dtype = self.checkpoint.header(theirs[name]).dtype
            read = lambda stored=theirs[name]: self.checkpoint[stored]  # noqa: E731
            yield parameter, theirs[name], TensorSource(name, parameter.shape, dtype, read)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, memory-mapped array) in the table's order."""
        for _, _, source in self.sources():
            yield source.name, source.read()


def open_model(source: str | Path, *, layout: str | None = None, revision: str | None = None) -> OpenedModel:
    """Open a checkpoint in any readable layout.

    Args:
        source: a folder, a file with its config.json beside it, or the id of a repository on the Hugging Face hub.
        layout: a key of `LAYOUTS`; detected by default, from the config and the tensor names together.
        revision: of the hub repository.

    Raises:
        CheckpointError: every fault of the names, shapes and dtypes at once.
    """
    path = _local(source, revision)
    folder = path if path.is_dir() else path.parent
    fields = _read_config(folder)
    checkpoint = open_checkpoint(path)
    layout = _detect(folder, fields, checkpoint) if layout is None else layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    try:
        config = LAYOUTS[layout].read_config(fields)
    except (ValueError, TypeError) as fault:
        raise CheckpointError(f"{folder / 'config.json'}: {fault}") from None
    _check_tensors(path, config, layout, checkpoint)
    return OpenedModel(layout, config, folder, checkpoint)


def write_model(folder: Path, config, parameters: Mapping[str, np.ndarray], *, layout: str, dtype: str) -> None:
    """Write config.json and the tensors of a model into a folder that exists.

    parameters: by canonical name, asked for one at a time. dtype: their compute dtype.
    """
    sources = [
        TensorSource(name, parameter.shape, parameter.dtype(dtype), lambda name=name: parameters[name])
        for name, parameter in parameter_table(config).items()
    ]
    write_layout(folder, config, sources, layout)


def write_layout(folder: Path, config, sources: Iterable[TensorSource], layout: str, file_format=None) -> None:
    """Write config.json and tensors under canonical names as a layout has them.

    file_format: "safetensors" or "bin"; the layout's own by default.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    file_format = LAYOUTS[layout].file_format if file_format is None else file_format
    if file_format not in WRITERS:
        raise ValueError(f"file_format is {file_format!r}; expected one of {', '.join(WRITERS)}")
    sources = list(sources)
    fields = LAYOUTS[layout].write_config(config)
    if "model_type" in fields:  # transformers keeps the dtype beside the config
        fields["torch_dtype"] = next(source.dtype for source in sources if source.name == EMBEDDING)
    WRITERS[file_format](folder, _renamed(config, sources, layout))
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of the tokenizer that lie beside a checkpoint."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _renamed(config, sources: list[TensorSource], layout: str) -> list[TensorSource]:
    theirs = names(config, layout)
    written = [source._replace(name=theirs[source.name]) for source in sources]
    if config.tie_embeddings and WRITES_TIED_HEAD[layout]:
        embedding = next(source for source in sources if source.name == EMBEDDING)
        written.append(embedding._replace(name=HEAD))
    return written


def _local(source: str | Path, revision: str | None) -> Path:
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such file or folder")
    return _download(source, revision)


def _download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{repository}: no such folder; reading it from the hub needs pip install 'mamba_core[hub]'"
        ) from None
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.bin"]))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise CheckpointError(f"{repository}: no such folder, and not to be had from the hub: {reason}") from None


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return parse_json(path.read_bytes())
    except OSError:
        raise CheckpointError(f"{path}: no such file; a checkpoint needs its config.json") from None
    except ValueError as fault:
        raise CheckpointError(f"{path}: {fault}") from None


def _detect(folder: Path, fields: dict, checkpoint: Checkpoint) -> str:
    by_config = [name for name, layout in LAYOUTS.items() if layout.recognises(fields)]
    by_names = [name for name, renamed in RENAMED.items() if renamed.get(EMBEDDING, EMBEDDING) in checkpoint]
    both = [name for name in by_config if name in by_names]
    if len(both) == 1:
        return both[0]
    raise CheckpointError(
        f"{folder}: cannot tell the layout: config.json fits {' and '.join(by_config) or 'none'}, the tensor names fit "
        f"{' and '.join(by_names) or 'none'} of {', '.join(LAYOUTS)}; if you know it, name it"
    )


def _check_tensors(path: Path, config, layout: str, checkpoint: Checkpoint) -> None:
    table = parameter_table(config)
    theirs = names(config, layout)
    expected = set(theirs.values())
    optional = {HEAD} if config.tie_embeddings else set()
    faults = [f"missing {name}" for name in theirs.values() if name not in checkpoint]
    faults += [f"unexpected {name}" for name in checkpoint if name not in expected | optional]
    for name, stored in theirs.items():
        if stored not in checkpoint:
            continue
        shape, dtype, _ = checkpoint.header(stored)
        if shape != table[name].shape:
            faults.append(f"{stored} has shape {shape}, expected {table[name].shape}")
        if dtype not in FLOATS:
            faults.append(f"{stored} has dtype {dtype}, expected one of {', '.join(FLOATS)}")
    if not faults and config.tie_embeddings and HEAD in checkpoint:
        head, embedding = checkpoint[HEAD], checkpoint[theirs[EMBEDDING]]
        if head.shape != embedding.shape or not np.array_equal(_bits(head), _bits(embedding)):
            faults.append(f"{HEAD} differs from {theirs[EMBEDDING]}, but the config ties them")
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(f"{path}: does not fit its config: {shown}")


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")
