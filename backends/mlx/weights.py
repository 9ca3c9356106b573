"""Canonical names <-> the module tree. The names are the same; a convolution's axes are not."""

from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mamba_core.backends.mlx.arrays import check_device, default_device, dtype_named, from_numpy, to_numpy
from mamba_core.backends.mlx.heads import model_class
from mamba_core.backends.mlx.model import Model
from mamba_core.backends.mlx.ops import available_kernels
from mamba_core.kernels import Kernels
from mamba_core.spec.params import Values, checked


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


def parameters(model: Model) -> Values:
    return canonical(model, tree_flatten(model.parameters(), destination={}))


def canonical(model: Model, values: Mapping[str, mx.array]) -> Values:
    """Arrays of the parameters' shapes, by name, as NumPy in the canonical layout."""
    convolutions = convolution_weights(model)

    def read(name):
        value = to_numpy(values[name])
        return swap_axes(value) if name in convolutions else value

    return Values(model.config, read)


def convolution_weights(model: Model) -> set[str]:
    """The names of the weights that MLX keeps as (out, k, in), and the canonical layout as (out, in, k)."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Conv1d)}


def swap_axes(value: np.ndarray) -> np.ndarray:
    """From either layout of a convolution's weight to the other."""
    return np.ascontiguousarray(value.swapaxes(1, 2))
