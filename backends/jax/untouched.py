"""Whether modules are as this library or flax made them: the one test, which every way asks."""

import functools
import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax.ops.linear import precision

# Kinds of flax's layers whose weights are read -> the name of the weight.
WEIGHTS = {nnx.Linear: "kernel", nnx.Conv: "kernel", nnx.Embed: "embedding"}
# Settings that a call does not depend on, and the dtype, which is compared with the weight's.
UNUSED = {"dtype", "param_dtype", "use_bias"}


def untouched(kind: type, *modules: nnx.Module, **settings) -> bool:
    """Whether nobody has replaced, subclassed or changed a module, so that its weights are all that must be read.

    It is of exactly that class and has no variables but parameters. A layer of flax has the settings that this library
    gives it.

    settings: those of a layer that are neither flax's defaults nor `_settings`.
    """
    for module in modules:
        if type(module) is not kind or not _has_only_parameters(module) or not _is_set(kind, module, settings):
            return False
    return True


def _has_only_parameters(module):
    return not any(_is_other_variable(type(value)) for value in vars(module).values())


# Every token asks it of every module.
@functools.cache
def _is_other_variable(kind: type) -> bool:
    return issubclass(kind, nnx.Variable) and not issubclass(kind, nnx.Param)


def _is_set(kind, layer, given) -> bool:
    """Whether a layer of flax has its settings; True of any other module."""
    if (weight := WEIGHTS.get(kind)) is None:
        return True
    values = vars(layer)
    array = values[weight][...]
    expected = _settings(kind, array.shape[-1], array.dtype)
    for name, value in (expected | given if given else expected).items():
        found = values.get(name, value)
        # An array, such as a mask, is not compared.
        if found is not value and not (type(found) is type(value) and found == value):
            return False
    return values["dtype"] is not None and _dtype(values["dtype"]) == array.dtype


_dtype = functools.cache(jnp.dtype)


# Every token asks it of every layer.
@functools.cache
def _settings(kind: type, features: int, dtype: Any) -> dict[str, Any]:
    """Name -> value of what a layer's call depends on, where its weight has so many output features and that dtype."""
    defaults = {name: each.default for name, each in inspect.signature(kind.__init__).parameters.items()}
    found = {
        name: value
        for name, value in defaults.items()
        if value is not inspect.Parameter.empty and name not in UNUSED and not name.endswith(("_init", "_metadata"))
    }
    if kind is not nnx.Embed:
        found["precision"] = precision(str(dtype))
    if kind is nnx.Conv:
        found |= {"padding": "CAUSAL", "feature_group_count": features}
    return found
