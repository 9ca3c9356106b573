"""Checkpoints in any layout: opened under canonical names and checked against their config; and written.

A layout is a row in `LAYOUTS`, tables of names in `names.py`, the keys that tell it in `detect.py`, and its config's
fields in `configs.py` or `mamba_core.config`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core.config import MambaConfig
from mamba_core.spec.params import Parameter, parameter_table
from mamba_core.weights.configs import (
    LIBRARIES,
    MLX_LM_REQUIRED,
    read_library_config,
    write_library_config,
    write_mlx_lm_config,
)
from mamba_core.weights.detect import Detected, detect
from mamba_core.weights.formats import Progress
from mamba_core.weights.io import (
    Checkpoint,
    CheckpointError,
    TensorSource,
    open_checkpoint,
    write_npz,
    write_safetensors,
    write_torch,
)
from mamba_core.weights.names import EMBEDDING, HEAD, LAYERS, WRITES_TIED_HEAD, Stored, scheme_to_write, stored_tensors
from mamba_core.weights.source import TOKENIZER_FILES, locate, read_config

FLOATS = ("float32", "bfloat16", "float16", "float64")


class Layout(NamedTuple):
    """How a family of checkpoints is laid out.

    write_config: our config -> config.json's fields.
    file_format: what its own library reads, a key of `WRITERS`.
    format: what its safetensors files say of who wrote them.
    read_config: config.json's fields -> our config. Without it, as `LIBRARIES` has it.
    told_by_format: whether `format` alone tells it from another layout, so that no other kind of file may hold it.
    """

    write_config: Callable[[Any], dict]
    file_format: str
    format: str = "pt"
    read_config: Callable[[dict], Any] | None = None
    told_by_format: bool = False


LAYOUTS = {
    "hf": Layout(MambaConfig.to_hf, "safetensors", read_config=MambaConfig.from_hf),
    "mamba_ssm": Layout(MambaConfig.to_mamba_ssm, "bin", read_config=MambaConfig.from_mamba_ssm),
    "mambapy": Layout(partial(write_library_config, "mambapy"), "pt"),
    "mambapy_mlx": Layout(partial(write_library_config, "mambapy_mlx"), "npz", "mlx"),
    "minimamba": Layout(partial(write_library_config, "minimamba"), "pt"),
    "mlx_lm": Layout(write_mlx_lm_config, "safetensors", "mlx", MambaConfig.from_hf, told_by_format=True),
}

WRITERS = {
    "safetensors": lambda folder, sources, layout, shard_bytes, progress: write_safetensors(
        folder, sources, metadata={"format": LAYOUTS[layout].format}, shard_bytes=shard_bytes, progress=progress
    ),
    "bin": lambda folder, sources, layout, shard_bytes, progress: write_torch(
        folder / "pytorch_model.bin", sources, progress
    ),
    "pt": lambda folder, sources, layout, shard_bytes, progress: write_torch(folder / "model.pt", sources, progress),
    "npz": lambda folder, sources, layout, shard_bytes, progress: write_npz(folder / "weights.npz", sources, progress),
}

# Layouts that can hold a config with `compat`, which every other library would run as another function.
_COMPAT_LAYOUTS = ("hf", "minimamba")


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that has been checked against its config; its tensors are not loaded until asked for.

    stored: canonical name -> the name in the file and the transform, in the table's order.
    left_out: tensors of the file that belong to no part of the model.
    evidence: how the layout was told, a short sentence.
    """

    layout: str
    config: Any
    folder: Path
    checkpoint: Checkpoint
    stored: dict[str, Stored]
    left_out: tuple[str, ...]
    evidence: str

    @property
    def dtype(self) -> str:
        """The compute dtype that it was saved in: that of its embedding or first matrix, float32 for float64."""
        telling = self.stored.get(EMBEDDING) or self.stored[f"{LAYERS}.0.mixer.in_proj.weight"]
        stored = self.checkpoint.header(telling.name).dtype
        return "float32" if stored == "float64" else stored

    def sources(self) -> Iterator[tuple[Parameter, str, TensorSource]]:
        """(parameter, its name in the file, its source under the canonical name) in the table's order."""
        for name, parameter in parameter_table(self.config).items():
            stored = self.stored[name]
            dtype = self.checkpoint.header(stored.name).dtype
            yield parameter, stored.name, TensorSource(name, parameter.shape, dtype, partial(self._read, stored))

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, array) in the table's order; memory-mapped where it is stored as it is."""
        for _, _, source in self.sources():
            yield source.name, source.read()

    def _read(self, stored: Stored) -> np.ndarray:
        try:
            return stored.transform.read(self.checkpoint[stored.name])
        except ValueError as fault:
            raise CheckpointError(f"{self.folder}: tensor {stored.name!r}: {fault}") from None


def normalize_layout(name: str) -> str:
    """A layout's name as `LAYOUTS` spells it: mlx-lm is mlx_lm."""
    return str(name).replace("-", "_")


def layout_key(name: str) -> str:
    """The key of `LAYOUTS` that a name means. Raises ValueError."""
    if (key := normalize_layout(name)) not in LAYOUTS:
        raise ValueError(f"layout is {name!r}; expected one of {', '.join(LAYOUTS)}")
    return key


def open_model(
    source: str | Path, *, layout: str | None = None, revision: str | None = None, compat: str | None = None
) -> OpenedModel:
    """Open a checkpoint in any readable layout.

    Args:
        source: a folder, a file, its config.json beside it, or the id of a repository on the Hugging Face hub.
        layout: a key of `LAYOUTS`, hyphens allowed; detected by default, from the config and the tensor names
            together.
        revision: of the hub repository.
        compat: "minimamba" to read MiniMamba's checkpoints, with a config that reproduces its arithmetic.

    Raises:
        CheckpointError: every fault of the names, shapes and dtypes at once; a checkpoint that needs `compat`.
        ValueError: an unknown layout or compat, or a compat that this checkpoint is not for.
    """
    if layout is not None:
        layout = layout_key(layout)
    path = locate(source, revision)
    folder = path if path.is_dir() else path.parent
    fields = read_config(folder)
    checkpoint = open_checkpoint(path)
    detected = detect(path, fields, checkpoint, layout)
    if detected.layout == "minimamba" and compat is None:
        raise CheckpointError(
            f"{path}: MiniMamba computes another function than Mamba: it adds the dt bias twice and its gate has no "
            "SiLU, so a plain conversion would change the outputs; compat='minimamba' (--compat minimamba) reads it "
            "with its own arithmetic"
        )
    config = _read_config(folder, fields, checkpoint, detected)
    if compat not in (None, config.compat):
        raise ValueError(f"compat is {compat!r}, but that of {path}, of layout {detected.layout}, is {config.compat!r}")
    return _checked(path, folder, config, checkpoint, detected)


def write_model(folder: Path, config, parameters: Mapping[str, np.ndarray], *, layout: str, dtype: str) -> None:
    """Write config.json and the tensors of a model into a folder that exists.

    parameters: by canonical name, asked for one at a time. dtype: their compute dtype.
    """
    sources = [
        TensorSource(name, parameter.shape, parameter.dtype(dtype), lambda name=name: parameters[name])
        for name, parameter in parameter_table(config).items()
    ]
    write_layout(folder, config, sources, layout)


def write_layout(
    folder: Path,
    config,
    sources: Iterable[TensorSource],
    layout: str,
    file_format=None,
    *,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write config.json and tensors under canonical names as a layout has them.

    file_format: a key of `WRITERS`; the layout's own by default. shard_bytes, progress: as the writers of `io` have
    them; only safetensors has shards.

    Raises:
        ValueError: an unknown layout or file format, or a config that the layout cannot hold.
    """
    layout = layout_key(layout)
    file_format = LAYOUTS[layout].file_format if file_format is None else file_format
    if file_format not in WRITERS:
        raise ValueError(f"file_format is {file_format!r}; expected one of {', '.join(WRITERS)}")
    if LAYOUTS[layout].told_by_format and file_format != LAYOUTS[layout].file_format:
        raise ValueError(
            f"layout {layout!r} cannot be written as {file_format}, in which nothing tells it from another layout; "
            f"expected {LAYOUTS[layout].file_format}"
        )
    _check_compat(config, layout)
    sources = list(sources)
    written = stored_sources(config, sources, layout)
    fields = LAYOUTS[layout].write_config(config)
    if "model_type" in fields:  # transformers keeps the dtype beside the config
        fields["torch_dtype"] = next(source.dtype for source in sources if source.name == EMBEDDING)
    WRITERS[file_format](folder, written, layout, shard_bytes, progress)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of the tokenizer that lie beside a checkpoint."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# --- writing ---------------------------------------------------------------------------------------


def _check_compat(config, layout: str) -> None:
    if config.compat is not None and layout not in _COMPAT_LAYOUTS:
        raise ValueError(
            f"a config with compat={config.compat!r} cannot be written as {layout}, whose library would compute "
            f"another function; expected {' or '.join(_COMPAT_LAYOUTS)}"
        )
    if config.compat is None and layout == "minimamba":
        raise ValueError(
            "a Mamba model cannot be written as minimamba, whose library would compute another function: it adds the "
            "dt bias twice and its gate has no SiLU; only what was read with compat='minimamba' can"
        )


def stored_sources(config, sources: list[TensorSource], layout: str) -> list[TensorSource]:
    """The sources as they are stored, a copy of a tied embedding included."""
    scheme = scheme_to_write(config, layout)
    written = [_stored_source(source, scheme.stored(source.name)) for source in sources]
    if config.task == "lm" and config.tie_embeddings and layout in WRITES_TIED_HEAD:
        embedding = next(source for source in sources if source.name == EMBEDDING)
        written.append(_stored_source(embedding, scheme.stored(HEAD)))
    return written


def _stored_source(source: TensorSource, stored: Stored) -> TensorSource:
    shape = stored.transform.stored_shape(source.shape)
    return source._replace(name=stored.name, shape=shape, read=lambda: stored.transform.write(source.read()))


# --- reading ---------------------------------------------------------------------------------------


def _read_config(folder: Path, fields: dict | None, checkpoint: Checkpoint, detected: Detected):
    """The config that the file's fields and, where its library saves none or not all, its tensors tell."""
    path = folder / "config.json"
    if fields is None and detected.layout not in LIBRARIES:
        raise CheckpointError(f"{path}: no such file; a checkpoint of layout {detected.layout} needs its config.json")
    try:
        if detected.layout in LIBRARIES:
            return _read_library_config(fields or {}, checkpoint, detected)
        config = LAYOUTS[detected.layout].read_config(fields)
    except (ValueError, TypeError) as fault:
        raise CheckpointError(f"{path if fields is not None else folder}: {fault}") from None
    # Names without a head say so whatever the config says.
    return replace(config, task="features") if detected.scheme.task == "features" else config


def _read_library_config(fields: dict, checkpoint: Checkpoint, detected: Detected):
    shapes = {}
    for name in checkpoint:
        if known := detected.scheme.canonical(name.removeprefix(detected.prefix)):
            canonical, transform = known
            shapes[canonical] = _canonical_shape(name, checkpoint.header(name).shape, transform)
    told = {"task": detected.scheme.task}
    if detected.scheme.task == "lm":
        told["tie_embeddings"] = not _has_own_head(checkpoint, detected)
    if detected.layout == "minimamba":
        told["compat"] = "minimamba"
    return read_library_config(detected.layout, fields, shapes, **told)


def _canonical_shape(name: str, shape: tuple[int, ...], transform) -> tuple[int, ...]:
    try:
        return transform.canonical_shape(shape)
    except ValueError:
        raise ValueError(f"{name} has shape {shape}; expected {transform.name}") from None


def _has_own_head(checkpoint: Checkpoint, detected: Detected) -> bool:
    """Torch saves a tied head as a copy of the embedding, so a head that is there need not be one of its own."""
    head, embedding = (detected.prefix + detected.scheme.stored(name).name for name in (HEAD, EMBEDDING))
    return head in checkpoint and not checkpoint.have_same_bytes(head, embedding)


def _checked(path: Path, folder: Path, config, checkpoint: Checkpoint, detected: Detected) -> OpenedModel:
    if config.n_layer > len(checkpoint):  # before a table of so many layers is made
        raise CheckpointError(
            f"{path}: does not fit its config: n_layer is {config.n_layer}, but the file has {len(checkpoint)} tensors"
        )
    own = stored_tensors(config, detected.scheme)
    stored = {name: Stored(detected.prefix + tensor.name, tensor.transform) for name, tensor in own.items()}
    left_out = tuple(
        detected.prefix + name for name in detected.scheme.left_out if detected.prefix + name in checkpoint
    )
    _check_tensors(path, config, checkpoint, stored, left_out, detected)
    evidence = detected.evidence + (f"; not read: {', '.join(left_out)}" if left_out else "")
    if detected.layout == "mlx_lm" and config.norm_eps != (fixed := MLX_LM_REQUIRED["norm_eps"]):
        evidence += f"; norm_eps is the config's {config.norm_eps}, though mlx_lm computes with {fixed}"
    return OpenedModel(detected.layout, config, folder, checkpoint, stored, left_out, evidence)


def _check_tensors(path: Path, config, checkpoint: Checkpoint, stored, left_out, detected: Detected) -> None:
    table = parameter_table(config)
    tied_head = None
    if config.task == "lm" and config.tie_embeddings:
        tied_head = detected.prefix + detected.scheme.stored(HEAD).name
    allowed = {*(tensor.name for tensor in stored.values()), *left_out, tied_head}
    faults = [f"missing {tensor.name}" for tensor in stored.values() if tensor.name not in checkpoint]
    faults += [f"unexpected {name}" for name in checkpoint if name not in allowed]
    for name, tensor in stored.items():
        if tensor.name not in checkpoint:
            continue
        shape, dtype, _ = checkpoint.header(tensor.name)
        if shape != (wanted := tensor.transform.stored_shape(table[name].shape)):
            faults.append(f"{tensor.name} has shape {shape}, expected {wanted}")
        if dtype not in FLOATS:
            faults.append(f"{tensor.name} has dtype {dtype}, expected one of {', '.join(FLOATS)}")
    if not faults and tied_head in checkpoint:
        embedding = stored[EMBEDDING].name
        if not checkpoint.have_same_bytes(tied_head, embedding):
            faults.append(f"{tied_head} differs from {embedding}, but the config ties them")
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise CheckpointError(f"{path}: does not fit its config: {shown} (read as {detected.layout})")
