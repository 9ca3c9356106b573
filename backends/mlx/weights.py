"""Canonical names <-> the module tree. The names are the same; a convolution's axes are not."""

import functools
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mamba_core.backend import Foreign
from mamba_core.backends.mlx.arrays import (
    check_device,
    default_device,
    dtype_named,
    from_numpy,
    kind_of,
    random_key,
    set_random_key,
    to_numpy,
)
from mamba_core.backends.mlx.heads import model_class
from mamba_core.backends.mlx.layers import StepProjection
from mamba_core.backends.mlx.model import Model
from mamba_core.backends.mlx.ops import available_kernels
from mamba_core.backends.mlx.ops.causal_conv import by_module
from mamba_core.backends.mlx.positions import call_of
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.kernels import Kernels
from mamba_core.merging import check_held, merged
from mamba_core.spec.params import Values, checked, parameter_table

# Modules that may be of a subclass: their class adds nothing that the table would have to hold.
OPEN = ("", "backbone")


def build(config, parameters: Iterable[tuple[str, np.ndarray]], *, dtype="float32", device=None, kernels="auto"):
    """device: MLX's default device if None. The module's first values are lazy and never computed."""
    check_device(device)
    device = device or default_device()
    # "auto" stays "auto": inside mx.compile another kernel is the fastest.
    policy = Kernels.read(kernels, available_kernels(device, dtype_named(dtype)))
    model = model_class(config.task)(config, policy, device)
    convolutions = convolution_weights(model)
    weights = []
    for parameter, value in checked(config, parameters):
        value = swap_axes(value) if parameter.name in convolutions else value
        array = from_numpy(value, dtype=parameter.dtype(dtype), device=device)
        # A lazy cast would keep the array that it casts.
        mx.eval(array)
        weights.append((parameter.name, array))
    return model.load_weights(weights)


def parameters(model: Model, merge: bool = False) -> Values:
    found = foreign(model)
    values = canonical(model, tree_flatten(model.parameters(), destination={}))
    if merge:
        return merged(model.config, found, values.__getitem__, partial(layer, model), model.dtype)
    check_held(model.config, found)
    return values


def foreign(model: Model) -> Foreign:
    """All arrays of the model count, and of its layers the numbers that they were made with, such as an epsilon."""
    changed: dict[str, str] = {}
    hooked: dict[str, str] = {}
    for path, (kind, arrays, settings, children) in _built(model.config).items():
        if any(path.startswith(f"{parent}.") for parent in changed):
            continue
        module = _at(model, path)
        if not _is_of(kind, module, path):
            changed[path] = kind_of(module)
            continue
        found = _arrays(module)
        missing, added = arrays.keys() - found.keys(), found.keys() - arrays.keys()
        other = [name for name in arrays.keys() & found.keys() if arrays[name] != found[name]]
        if missing or other or (added and "weight" in arrays):
            names = ", ".join(sorted({*missing, *other, *added}))
            changed[path] = f"{kind.__name__} with {names} added, missing or of another shape"
        elif (numbers := _numbers(module) if "weight" in arrays else settings) != settings:
            differ = ", ".join(f"{name} {value}" for name, value in numbers.items() if settings.get(name) != value)
            changed[path] = f"{kind.__name__} with {differ}"
        elif type(module).__call__ is not kind.__call__ or not untouched(kind):
            hooked[path] = f"{kind_of(module)} with another __call__"
        if "weight" not in arrays:
            for name, child in module.items():  # without arrays, whose names would tell
                if isinstance(child, nn.Module) and name not in children and not tree_flatten(child.parameters()):
                    changed[f"{path}.{name}" if path else name] = kind_of(child)
    table = parameter_table(model.config)
    names = (name for name, _ in tree_flatten(model.parameters()))
    inside = tuple(f"{path}." for path in changed)
    return Foreign(tuple(name for name in names if name not in table and not name.startswith(inside)), changed, hooked)


def layer(model: Model, path: str, inputs: np.ndarray) -> np.ndarray:
    module, shape = _at(model, path), parameter_table(model.config)[f"{path}.weight"].shape
    modules = module.modules() if isinstance(module, nn.Module) else []
    trained = [inner for inner in modules if inner.training]
    integers = np.issubdtype(inputs.dtype, np.integer)
    with model.on_device():
        x = from_numpy(inputs) if integers else from_numpy(inputs, dtype=model.dtype)
        try:
            for inner in trained:
                inner._set_training_mode(False)
            if len(shape) == 3:
                state = mx.zeros((len(x), shape[2] - 1, x.shape[2]), x.dtype)
                y, _ = by_module(module, x, state, call_of(None, None, length=x.shape[1]), name=path)
            else:
                y = module(x)
            return to_numpy(y.astype(mx.float32))
        finally:
            for inner in trained:
                inner._set_training_mode(True)


def _is_of(kind: type, module, path: str) -> bool:
    """Whether a module is of the class that was built there."""
    # Adapters are fused into an nn.Linear.
    alike = (kind, nn.Linear) if kind is StepProjection else (kind,)
    return type(module) in alike or (path in OPEN and isinstance(module, kind))


class _Built(NamedTuple):
    """What stands at a path of a model as it was built.

    kind: its class. arrays: name -> shape, of its own. numbers: name -> value, of its settings. children: the names of
    the modules in it.
    """

    kind: type
    arrays: dict[str, tuple[int, ...]]
    numbers: dict[str, float]
    children: frozenset[str]


@functools.lru_cache(maxsize=8)
def _built(config) -> dict[str, _Built]:
    """Path -> what stands there, of every module of a new model, the outer ones first.

    The model's values are lazy and never computed.
    """
    key = random_key()
    model = model_class(config.task)(config, Kernels(), default_device())
    set_random_key(key)
    modules = model.named_modules()[::-1]
    modules.sort(key=lambda item: item[0].count(".") + bool(item[0]))
    return {
        path: _Built(type(module), _arrays(module), _numbers(module), frozenset(module.children()))
        for path, module in modules
    }


def _arrays(module) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in module.items() if isinstance(value, mx.array) and name[0] != "_"}


def _numbers(module) -> dict[str, float]:
    return {name: value for name, value in vars(module).items() if type(value) in (int, float)}


def _at(model: Model, path: str):
    """What stands at a path; None where nothing does."""
    found = model
    for name in path.split(".") if path else []:
        if isinstance(found, list):
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = getattr(found, name, None)
    return found


def canonical(model: Model, values: Mapping[str, mx.array]) -> Values:
    """Arrays of the parameters' shapes, by name, as NumPy in the canonical layout."""
    convolutions = convolution_weights(model)

    def read(name):
        value = to_numpy(values[name])
        return swap_axes(value) if name in convolutions else value

    return Values(model.config, read)


def convolution_weights(model: Model) -> set[str]:
    """The names of the table's weights that MLX keeps as (out, k, in), and the canonical layout as (out, in, k)."""
    found = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    return found & parameter_table(model.config).keys()


def swap_axes(value: np.ndarray) -> np.ndarray:
    """From either layout of a convolution's weight to the other."""
    return np.ascontiguousarray(value.swapaxes(1, 2))
