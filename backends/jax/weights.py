"""Canonical names <-> the module tree. Flax has other names for weights, and other axes for some of them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from mamba_core.backends.jax import ops
from mamba_core.backends.jax.arrays import devices, from_numpy, to_numpy
from mamba_core.backends.jax.heads import model_class
from mamba_core.backends.jax.mixers import Options
from mamba_core.kernels import Kernels
from mamba_core.spec.checks import choose_device
from mamba_core.spec.params import Values, checked, parameter_table

Model = nnx.Module


class Weight(NamedTuple):
    """What a class of modules calls its weight, and how that lies in it.

    entering: from the axes of the parameter table to the module's. leaving: back.
    """

    leaf: str
    entering: Callable = lambda value: value
    leaving: Callable = lambda value: value


def _transposed(value):
    """(out, in) <-> (in, out)."""
    return value.T


def _kernel_of_conv(value):
    """(out, in / groups, *k) -> (*k, in / groups, out)."""
    return np.moveaxis(value, (0, 1), (-1, -2))


def _weight_of_conv(value):
    """(*k, in / groups, out) -> (out, in / groups, *k)."""
    return np.moveaxis(value, (-1, -2), (0, 1))


# Of flax's classes. Another class names its leaf by an attribute `weight_leaf`. Its weight has the axes that a class of
# flax before it in the order of inheritance has, or those of the table.
WEIGHTS = {
    nnx.Linear: Weight("kernel", _transposed, _transposed),
    nnx.Conv: Weight("kernel", _kernel_of_conv, _weight_of_conv),
    nnx.Embed: Weight("embedding"),
    nnx.LayerNorm: Weight("scale"),
    nnx.RMSNorm: Weight("scale"),
}


def build(config, parameters: Iterable[tuple[str, np.ndarray]], *, dtype="float32", device=None, kernels="auto"):
    """The module is made by `nnx.eval_shape`, so that its values exist once."""
    device = choose_device(device, devices())
    # "auto" stays so: the model may be compiled for another device, or exported.
    policy = Kernels.read(kernels, ops.available_kernels(device, dtype))
    kind = model_class(config.task)
    model = nnx.eval_shape(lambda: kind(config, Options(dtype, policy, nnx.Rngs(0))))
    for parameter, value in checked(config, parameters):
        module, leaf = place(model, parameter.name)
        array = from_numpy(entering(model, parameter.name, value), dtype=parameter.dtype(dtype), device=device)
        setattr(module, leaf, nnx.Param(array))
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


def path(model: Model, name: str) -> tuple[str | int, ...]:
    """The keys under which `nnx.state` has the parameter of that canonical name."""
    *owner, leaf = _keys(name)
    return (*owner, _weight(model, name).leaf if leaf == "weight" else leaf)


def canonical(model: Model, name: str, value: jax.Array) -> np.ndarray:
    """That parameter, its gradient or a moment, with the axes of the parameter table."""
    value = to_numpy(value)
    return np.ascontiguousarray(_weight(model, name).leaving(value) if _keys(name)[-1] == "weight" else value)


def entering(model: Model, name: str, value: np.ndarray) -> np.ndarray:
    """The same, with the axes that its module has."""
    return _weight(model, name).entering(value) if _keys(name)[-1] == "weight" else value


def _keys(name: str) -> list[str | int]:
    return [int(key) if key.isdigit() else key for key in name.split(".")]


def _weight(model: Model, name: str) -> Weight:
    """The weight of the module that a canonical name means."""
    kind = type(_module(model, _keys(name)[:-1]))
    if kind in WEIGHTS:
        return WEIGHTS[kind]
    if (leaf := getattr(kind, "weight_leaf", None)) is not None:
        ancestor = next((WEIGHTS[other] for other in kind.__mro__ if other in WEIGHTS), Weight(leaf))
        return ancestor._replace(leaf=leaf)
    raise TypeError(
        f"{name.removesuffix('.weight')} is {kind.__name__}, and nobody knows which of its parameters the weight is; "
        "give the class an attribute `weight_leaf` with that name, or put the original module back"
    )


def _module(model, keys) -> nnx.Module:
    for key in keys:
        model = model[key] if isinstance(key, int) else getattr(model, key)
    return model
