"""Models by name, by config and from checkpoints: `build`, `load`, `save`, and the decode state's file."""

import os
import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mamba_core import registry, tasks
from mamba_core.backend import State
from mamba_core.backends.native import library
from mamba_core.carried import check_kind
from mamba_core.config import COMPUTE_DTYPES, BaseConfig, from_object
from mamba_core.merging import warn_of_hooks
from mamba_core.spec import state as states
from mamba_core.spec.init import initial_values
from mamba_core.tasks.base import FINAL_NORM
from mamba_core.tokenizer import source_of
from mamba_core.weights.formats import FLOATS, CheckpointError, atomic_file, atomic_folder, list_names
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import OpenedModel, open_model
from mamba_core.weights.source import TOKENIZER_FILES
from mamba_core.weights.tokens import GENERATION
from mamba_core.weights.writing import copy_companions, write_model
from mamba_core.wrappers import unwrap

LAYERS = "backbone.layers."


def build(
    config: Any = "mamba-130m",
    *,
    backend: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    kernels: str | Mapping[str, str] = "auto",
    seed: int = 0,
) -> Any:
    """A model with seeded initial values, the same bits on every backend.

    Args:
        config: a preset's name ("mamba-130m" to "mamba-2.8b"), a config, or a config object of transformers,
            mamba_ssm or mambapy, which is converted.
        backend: "torch", "mlx", "jax" or another registered one; by default the first that is installed.
        dtype: the compute dtype, "float32", "bfloat16" or "float16".
        device: one of the backend's `devices()`; its first by default.
        kernels: "auto" for the fastest kernels that run here, "plain" for the framework's own operations, or a mapping
            from ops to kernels, such as {"selective_scan": "chunked"}; see `mamba_core.kernels.Kernels`.
        seed: of the initial values.

    Returns:
        The framework's own module; see `mamba_core.backend.Backend.build` for how to call it.

    Raises:
        TypeError: config is none of these.
        ValueError: an unknown preset, backend, dtype, device, op or kernel.
        ImportError: the backend's framework is not installed.
    """
    config = from_object(config)
    _check_dtype(dtype)
    values = initial_values(config, seed)
    return _built(backend, config, values, dtype=dtype, device=device, kernels=kernels)


def load(
    source: str | Path,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    kernels: str | Mapping[str, str] = "auto",
    layout: str | None = None,
    revision: str | None = None,
    compat: str | None = None,
) -> Any:
    """A model from a checkpoint in any readable layout.

    Args:
        source: a folder, a file, or the id of a repository on the Hugging Face hub.
        dtype: the compute dtype; by default that of the checkpoint's embedding.
        layout: one of `mamba_core.weights.layouts.names()`; detected by default.
        revision: of the hub repository.
        compat: the architecture to read a checkpoint as, where a plain conversion would change its function. The error
            for such a checkpoint names it.
        backend, device, kernels: as in `build`.

    Raises:
        CheckpointError: the checkpoint is missing, broken, or not a model that this version reads.
        ValueError: an unknown layout, compat, backend, dtype, device or kernel.
        ImportError: the backend's framework is not installed.
    """
    opened = open_model(source, layout=layout, revision=revision, compat=compat)
    dtype = opened.dtype if dtype is None else dtype
    _check_dtype(dtype)
    model = _built(backend, opened.config, opened.tensors(), dtype=dtype, device=device, kernels=kernels)
    model.source = _source(opened)
    return model


def for_use(checkpoint: Any, options: Mapping[str, Any]) -> Any:
    """A model that is asked and not trained: that of a checkpoint, or the model that is given.

    options: of `load`.

    Raises:
        TypeError: options are given with a model.
        CheckpointError, ValueError, ImportError: as `load`.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        if options:
            raise TypeError(f"{', '.join(options)} given with a model; they are of a checkpoint that is loaded")
        return checkpoint
    model = load(Path(checkpoint) if isinstance(checkpoint, os.PathLike) else checkpoint, **options)
    model.eval()
    if hasattr(model, "requires_grad_"):  # PyTorch would keep what a gradient needs
        model.requires_grad_(False)
    return model


def begin(
    opened: OpenedModel,
    config: BaseConfig,
    *,
    seed: int,
    dtype: str | None = None,
    new_head: bool = False,
    **options: Any,
) -> Any:
    """A model to be trained further: of the weights of a checkpoint, and of a config that fits them.

    The config's task may be another one: what its model has beside the blocks and the checkpoint has not begins with
    initial values, of which a warning tells.

    Args:
        seed: of the initial values.
        new_head: what stands behind the last norm begins with initial values too.
        dtype, options: as in `load`.

    Raises:
        ValueError: a tensor of the blocks is missing or has another shape, or of the same task any other.
    """
    dtype = opened.dtype if dtype is None else dtype
    _check_dtype(dtype)
    stored, values = dict(opened.tensors()), dict(initial_values(config, seed))
    head = {parameter.name for parameter in tasks.of(config).after(config)} - {FINAL_NORM} if new_head else set()
    kept = {name for name in stored.keys() & values.keys() - head if stored[name].shape == values[name].shape}
    new = [name for name in values if name not in kept]
    same = opened.config.task == config.task
    if faults := [name for name in new if name.startswith(LAYERS) or (same and name not in head)]:
        raise ValueError(f"{opened.folder} does not fit the config: {list_names(faults)} missing or of other shapes")
    if new:
        warnings.warn(f"{list_names(new)} begin with initial values, not with those of {opened.folder}", stacklevel=2)
    values |= {name: stored[name] for name in kept}
    model = _built(options.pop("backend", None), config, values.items(), dtype=dtype, **options)
    model.source = _source(opened)
    return model


def save(model: Any, path: str | Path, *, layout: str = "hf", overwrite: bool = False, merge: bool = False) -> None:
    """Write a model as a folder of safetensors and config.json, which appears only when complete.

    Args:
        model: may be wrapped by torch.compile, DistributedDataParallel, AveragedModel or PEFT.
        layout: "hf" (transformers reads it) or another one of `mamba_core.weights.layouts.names()`.
        overwrite: replace an existing folder.
        merge: write layers that were changed, such as those with adapters, as the weights that compute the same;
            see `mamba_core.merging`.

    Raises:
        TypeError: this is no model of this library.
        ValueError: the model holds what the layout cannot, such as a parameter that somebody added, or an adapter
            without `merge`; or a layer cannot be merged. Also an unknown layout.
        CheckpointError: the folder exists, or cannot be written.
    """
    model = unwrap(model, "saving")
    parameters = storable(model, merge)
    with atomic_folder(path, overwrite=overwrite) as folder:
        save_into(folder, model, parameters, layout)


def save_into(folder: Path, model: Any, parameters: Mapping[str, np.ndarray], layout: str = "hf") -> None:
    """Write the files of a model with these parameters into a folder that exists."""
    write_model(folder, model.config, parameters, layout=layout, dtype=model.dtype)
    source = source_of(model)
    if source is not None and not source.is_dir():
        warnings.warn(f"{source}: gone; the model is saved without the tokenizer that was there", stacklevel=3)
        source = None
    copy_companions(source, folder, model.config, layout)


def storable(model: Any, merge: bool = False) -> Mapping[str, np.ndarray]:
    """The parameters of a model that a checkpoint can hold; merge as in `save`.

    Raises:
        ValueError: it cannot.
    """
    if model.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"the model is {model.dtype}, and a checkpoint holds float32 at most; make it float32 first")
    backend = registry.get(model.backend)
    parameters = backend.parameters(model, merge=merge)
    if not merge:
        warn_of_hooks(backend.foreign(model))
    return parameters


def save_state(state: State, path: str | Path, model: Any) -> None:
    """Write a decode state as one safetensors file, which any backend reads.

    Raises:
        TypeError: it is no State, or holds the arrays of another backend than the model's.
        ValueError: it does not fit the model's config, or the file's name does not end in .safetensors.
        CheckpointError: the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: a state is written as safetensors; give a name that ends in .safetensors")
    model = unwrap(model, "saving its state")
    backend = registry.get(model.backend)
    check_kind(state, model)
    arrays = {name: backend.to_numpy(value) for name, value in states.named(state).items()}
    if faults := _state_faults({name: (array.shape, array.dtype.name) for name, array in arrays.items()}, model.config):
        raise ValueError(f"state is not one of a model with this config: {faults}")
    with atomic_file(path, overwrite=True) as target:
        save_file(arrays, target, metadata={"mamba_core_state": model.config.fingerprint})


def load_state(path: str | Path, model: Any) -> State:
    """A decode state for this model, whichever backend wrote it.

    Raises:
        CheckpointError: the file is broken, or is the state of a model with another config.
    """
    model = unwrap(model, "loading its state")
    backend = registry.get(model.backend)
    stored = open_checkpoint(path)
    if stored.metadata.get("mamba_core_state") != model.config.fingerprint:
        raise CheckpointError(f"{path}: not the state of a model with this config")
    if faults := _state_faults({name: stored.header(name)[:2] for name in stored}, model.config):
        raise CheckpointError(f"{path}: {faults}")

    def array(name, dtype=None):
        return backend.from_numpy(np.asarray(stored[name]), dtype=dtype, device=model.device)

    def layer(index):
        own = states.fields(model.config, index)
        kind = states.layer_types(model.config)[index]
        return kind(*(array(f"layers.{index}.{f.name}", model.dtype if f.dtype == "compute" else f.dtype) for f in own))

    return State(tuple(map(layer, range(model.config.n_layer))), array("segment"))


def _source(opened: OpenedModel) -> Path | None:
    """The folder, where the model needs it: for the files of its tokenizer alone."""
    kept = any(os.path.lexists(opened.folder / name) for name in (*TOKENIZER_FILES, GENERATION))
    return opened.folder.absolute() if kept else None


def _built(backend: str | None, config: BaseConfig, values: Iterable, *, kernels, **settings) -> Any:
    model = registry.get(backend).build(config, values, kernels=kernels, **settings)
    if kernels == "auto" and model.backend in registry.PACKAGES and str(model.device).startswith("cpu"):
        library.warn_if_left_out()
    return model


def _state_faults(found: Mapping[str, tuple[tuple[int, ...], str]], config: BaseConfig) -> str:
    """What keeps arrays of these shapes and dtypes from being a state of a model with this config."""
    faults = list(islice(states.faults(config, {name: shape for name, (shape, _) in found.items()}), 8))
    if faults:
        return "; ".join(faults)
    whole = {f"layers.{layer}.{field.name}" for layer, field in states.table(config) if field.dtype == "int32"}
    for name, (_, dtype) in found.items():
        kind, dtypes = ("int32", ("int32",)) if name == "segment" or name in whole else ("float", FLOATS)
        if dtype not in dtypes:
            faults.append(f"{name} is {dtype}; expected {kind}")
    return "; ".join(faults[:8])


def _check_dtype(dtype: str) -> None:
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}")
