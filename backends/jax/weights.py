"""Canonical names <-> the module tree. Flax calls the weights otherwise, and keeps its kernels transposed."""

from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx

from mamba_core.backends.jax.arrays import devices, from_numpy, to_numpy
from mamba_core.backends.jax.layers import RMSNorm
from mamba_core.backends.jax.model import MODELS, Model
from mamba_core.backends.jax.scan import kernel_for
from mamba_core.spec.checks import choose_device
from mamba_core.spec.params import Values, checked, parameter_table


def build(config, parameters: Iterable[tuple[str, np.ndarray]], *, dtype="float32", device=None, kernels="auto"):
    """The module is made by `nnx.eval_shape`, so that its values exist once."""
    device = choose_device(device, devices())
    kernel_for(kernels, device, dtype)  # "auto" stays so: the model may be compiled for another device, or exported
    model = nnx.eval_shape(lambda: MODELS[config.task](config, dtype, kernels, nnx.Rngs(0)))
    for parameter, value in checked(config, parameters):
        *owner, leaf = path(model, parameter.name)
        value = transposed(model, parameter.name, value)
        array = from_numpy(value, dtype=parameter.dtype(dtype), device=device)
        setattr(_module(model, owner), leaf, nnx.Param(array))
    return model


def parameters(model: Model) -> Values:
    values = named(model, nnx.state(model, nnx.Param))
    return Values(model.config, lambda name: canonical(model, name, values[name]))


def named(model: Model, state: nnx.State) -> dict[str, jax.Array]:
    """The arrays of the parameters' state, or of one like it such as gradients, by canonical name."""
    values = dict(nnx.to_flat_state(state))
    return {name: values[path(model, name)][...] for name in parameter_table(model.config)}


def variable(model: Model, name: str) -> nnx.Variable:
    """The parameter of that canonical name, whose value may be changed in place."""
    return getattr(*place(model, name))


def place(model: Model, name: str) -> tuple[nnx.Module, str]:
    """The module that has that parameter, and under what name."""
    *owner, leaf = path(model, name)
    return _module(model, owner), leaf


def canonical(model: Model, name: str, value: jax.Array) -> np.ndarray:
    """That parameter, its gradient or a moment, with the axes of the parameter table."""
    return np.ascontiguousarray(transposed(model, name, to_numpy(value)))


def transposed(model: Model, name: str, value):
    """From the table's axes to flax's, or back: a kernel has those of the weight in reverse, (in, out) or (k, 1, e)."""
    return value.T if path(model, name)[-1] == "kernel" else value


def path(model: Model, name: str) -> tuple[str | int, ...]:
    """The keys under which `nnx.state` has the parameter of that canonical name."""
    *owner, leaf = (int(key) if key.isdigit() else key for key in name.split("."))
    if leaf == "weight":
        leaf = _WEIGHTS[type(_module(model, owner))]
    return (*owner, leaf)


_WEIGHTS = {nnx.Linear: "kernel", nnx.Conv: "kernel", nnx.Embed: "embedding", RMSNorm: "scale"}


def _module(model, keys) -> nnx.Module:
    for key in keys:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model
