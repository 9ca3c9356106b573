"""Models by name, by config and from checkpoints: `build`, `load`, `save`, and the decode state's file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mamba_core import registry
from mamba_core.backend import State
from mamba_core.config import COMPUTE_DTYPES, CONFIGS, MambaConfig, preset
from mamba_core.spec.init import initial_values
from mamba_core.weights.io import CheckpointError, atomic_file, atomic_folder, open_checkpoint
from mamba_core.weights.layouts import FLOATS, copy_tokenizer, open_model, write_model


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
    layout: str | None = None,
    revision: str | None = None,
    compat: str | None = None,
):
    """A model from a checkpoint in any readable layout.

    Args:
        source: a folder, a file, or the id of a repository on the Hugging Face hub.
        dtype: the compute dtype; by default that of the checkpoint's embedding.
        layout: a key of `mamba_core.weights.layouts.LAYOUTS`; detected by default.
        revision: of the hub repository.
        compat: "minimamba" to read MiniMamba's checkpoints, with their own arithmetic.
        backend, device, kernels: as in `build`.

    Raises:
        CheckpointError: the checkpoint is missing, broken, or not a model that this version reads.
        ValueError: an unknown layout, compat, backend, dtype, device or kernel.
        ImportError: the backend's framework is not installed.
    """
    opened = open_model(source, layout=layout, revision=revision, compat=compat)
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
    """Write a decode state as one safetensors file, which any backend reads.

    Raises:
        TypeError: it is no State, or holds the arrays of another backend than the model's.
        ValueError: it does not fit the model's config, or the file's name does not end in .safetensors.
        CheckpointError: the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: a state is written as safetensors; give a name that ends in .safetensors")
    backend, empty = registry.get(model.backend), model.init_state(1)
    _check_kind(state, empty, model.backend)
    arrays = {name: backend.to_numpy(value) for name, value in _named(state).items()}
    if faults := _state_faults({name: (array.shape, array.dtype.name) for name, array in arrays.items()}, empty):
        raise ValueError(f"state is not one of a model with this config: {faults}")
    with atomic_file(path, overwrite=True) as target:
        save_file(arrays, target, metadata={"mamba_core_state": model.config.fingerprint})


def load_state(path: str | Path, model) -> State:
    """A decode state for this model, whichever backend wrote it.

    Raises:
        CheckpointError: the file is broken, or is the state of a model with another config.
    """
    backend, empty = registry.get(model.backend), model.init_state(1)
    stored = open_checkpoint(path)
    if stored.metadata.get("mamba_core_state") != model.config.fingerprint:
        raise CheckpointError(f"{path}: not the state of a model with this config")
    if faults := _state_faults({name: stored.header(name)[:2] for name in stored}, empty):
        raise CheckpointError(f"{path}: {faults}")

    def array(name, dtype=None):
        return backend.from_numpy(np.asarray(stored[name]), dtype=dtype, device=model.device)

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


def _check_kind(state, empty: State, backend: str) -> None:
    if not isinstance(state, State):
        raise TypeError(f"state is {type(state).__name__}; expected a State, such as that of model(input_ids)")
    own = type(empty.segment)
    for name, value in _named(state).items():
        if not isinstance(value, own):
            given = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"state has {given} for {name}; expected arrays of the model's backend, {backend!r}")


def _state_faults(found: Mapping[str, tuple[tuple[int, ...], str]], empty: State) -> str:
    """What keeps arrays of these shapes and dtypes from being a state of the model whose empty one is given."""
    likes = _named(empty)
    if names := sorted(set(likes) ^ set(found)):
        return f"missing or unexpected: {', '.join(names[:8])}"
    batch = found["segment"][0][:1] or (1,)
    faults = []
    for name, like in likes.items():
        shape = (*batch, *like.shape[1:])
        kind, dtypes = ("int32", ("int32",)) if name == "segment" else ("float", FLOATS)
        if found[name][0] != shape or found[name][1] not in dtypes:
            faults.append(f"{name} is {found[name][1]} {found[name][0]}; expected {kind} {shape}")
    return "; ".join(faults[:8])


def _check_dtype(dtype: str) -> None:
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}")
