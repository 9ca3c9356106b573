"""Models by name, by config and from checkpoints: `build`, `load`, `save`, and the decode state's file."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mamba_core import registry
from mamba_core.backend import State
from mamba_core.config import CONFIGS, MambaConfig, preset
from mamba_core.spec.init import initial_values
from mamba_core.weights.io import CheckpointError, atomic_file, atomic_folder, open_checkpoint
from mamba_core.weights.layouts import copy_tokenizer, open_model, write_model

DTYPES = ("float32", "bfloat16", "float16")


def build(
    config: str | MambaConfig = "mamba-130m",
    *,
    backend: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    kernels: str = "auto",
    seed: int = 0,
):
    """A model with seeded initial values, the same bits on every backend.

    Args:
        config: a preset's name ("mamba-130m" to "mamba-2.8b") or a config.
        backend: "torch", "mlx", "jax" or another registered one; by default the first that is installed.
        dtype: the compute dtype, "float32", "bfloat16" or "float16".
        device: one of the backend's `devices()`; its first by default.
        kernels: "auto" for the fastest scan that runs here, or one by name.
        seed: of the initial values.

    Returns:
        The framework's own module; see `mamba_core.backend.Backend.build` for how to call it.

    Raises:
        ValueError: an unknown preset, backend, dtype, device or kernel.
        ImportError: the backend's framework is not installed.
    """
    config = preset(config) if isinstance(config, str) else config
    if type(config) not in CONFIGS.values():
        raise TypeError(f"config is {type(config).__name__}; expected a preset's name or a config such as MambaConfig")
    _check_dtype(dtype)
    values = initial_values(config, seed)
    return registry.get(backend).build(config, values, dtype=dtype, device=device, kernels=kernels)


def load(
    source: str | Path,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    kernels: str = "auto",
    revision: str | None = None,
    compat: str | None = None,
):
    """A model from a checkpoint in any readable layout, detected.

    Args:
        source: a folder, a file, or the id of a repository on the Hugging Face hub.
        dtype: the compute dtype; by default that of the checkpoint's embedding.
        revision: of the hub repository.
        compat: "minimamba" to read MiniMamba's checkpoints, with their own arithmetic.
        backend, device, kernels: as in `build`.

    Raises:
        CheckpointError: the checkpoint is missing, broken, or not a model that this version reads.
    """
    opened = open_model(source, revision=revision, compat=compat)
    dtype = opened.dtype if dtype is None else dtype
    _check_dtype(dtype)
    model = registry.get(backend).build(opened.config, opened.tensors(), dtype=dtype, device=device, kernels=kernels)
    model.source = opened.folder
    return model


def save(model, path: str | Path, *, layout: str = "hf", overwrite: bool = False) -> None:
    """Write a model as a folder of safetensors and config.json, which appears only when complete.

    Args:
        layout: "hf" (transformers reads it) or another key of `mamba_core.weights.layouts.LAYOUTS`.
        overwrite: replace an existing folder.
    """
    with atomic_folder(path, overwrite=overwrite) as folder:
        save_into(folder, model, layout)


def save_into(folder: Path, model, layout: str = "hf") -> None:
    """Write a model's files into a folder that exists."""
    parameters = registry.get(model.backend).parameters(model)
    write_model(folder, model.config, parameters, layout=layout, dtype=model.dtype)
    if (source := getattr(model, "source", None)) is not None:
        copy_tokenizer(source, folder)


def save_state(state: State, path: str | Path, model) -> None:
    """Write a decode state as one safetensors file, which any backend reads."""
    backend = registry.get(model.backend)
    arrays = {name: backend.to_numpy(value) for name, value in _named(state).items()}
    with atomic_file(path, overwrite=True) as target:
        save_file(arrays, target, metadata={"mamba_core_state": model.config.fingerprint})


def load_state(path: str | Path, model) -> State:
    """A decode state for this model, whichever backend wrote it.

    Raises:
        CheckpointError: the file is broken, or is the state of a model with another config.
    """
    backend = registry.get(model.backend)
    stored = open_checkpoint(path)
    if stored.metadata.get("mamba_core_state") != model.config.fingerprint:
        raise CheckpointError(f"{path}: not the state of a model with this config")

    def array(name, dtype=None):
        return backend.from_numpy(np.asarray(stored[name]), dtype=dtype, device=model.device)

    if "segment" not in stored or len(stored.header("segment").shape) != 1:
        raise CheckpointError(f"{path}: segment is missing, or has more than one axis")
    empty = model.init_state(stored.header("segment").shape[0])
    expected = _named(empty)
    if faults := sorted(set(expected) ^ set(stored)):
        raise CheckpointError(f"{path}: missing or unexpected: {', '.join(faults[:8])}")
    for name, like in expected.items():
        shape, dtype, _ = stored.header(name)
        kind = "int32" if name == "segment" else "float"
        if shape != tuple(like.shape) or kind not in dtype:
            raise CheckpointError(f"{path}: {name} is {dtype} {shape}; expected {kind} {tuple(like.shape)}")
    layers = [
        type(layer)(*(array(f"layers.{i}.{key}", "float32" if key == "ssm" else model.dtype) for key in layer._fields))
        for i, layer in enumerate(empty.layers)
    ]
    return State(tuple(layers), array("segment"))


def _named(state: State) -> dict:
    named = {"segment": state.segment}
    for index, layer in enumerate(state.layers):
        named |= {f"layers.{index}.{field}": value for field, value in layer._asdict().items()}
    return named


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
