"""Whether modules are as this library or flax made them: the one test, which every way asks."""

import functools
import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.programs import method_names, methods

# Kinds of flax's layers whose weights are read -> the name of the weight.
WEIGHTS = {nnx.Linear: "kernel", nnx.Conv: "kernel", nnx.Embed: "embedding"}
# Settings that a call does not depend on, and the dtype, which is compared with the weight's.
UNUSED = {"dtype", "param_dtype", "use_bias"}


def untouched(kind: type, *modules: nnx.Module, **settings) -> bool:
    """Whether nobody has replaced, subclassed, patched or changed a module, so that its weights are all that is read.

    It is of exactly that class, whose methods are its own, and has no variables but parameters. A layer of flax has
    the attributes and the settings that this library gives it.

    settings: those of a layer that are neither flax's defaults nor `_settings`.
    """
    if not _are_own(kind, methods(kind)):
        return False
    is_built = _is_layer if kind in WEIGHTS else _has_only_parameters
    return all(type(module) is kind and is_built(kind, module, settings) for module in modules)


# Every token asks it of every module, and what follows too.
@functools.lru_cache(maxsize=1024)
def _are_own(kind: type, functions: tuple) -> bool:
    """Whether the methods are those that the class bodies define."""
    return all(_is_own(kind, name, function) for name, function in zip(method_names(kind), functions, strict=False))


def _is_own(kind, name, function):
    code, owner = getattr(function, "__code__", None), next((base for base in kind.__mro__ if name in vars(base)), None)
    if code is None or owner is None:
        return False
    defined_in = function.__globals__["__name__"]
    return (code.co_qualname, defined_in) == (f"{owner.__qualname__}.{name}", owner.__module__)


def _has_only_parameters(kind, module, _):
    attributes = vars(module)
    if not _named(kind).isdisjoint(attributes):  # a method of this one module
        return False
    return not any(_is_other_variable(type(value)) for value in attributes.values())


@functools.cache
def _named(kind: type) -> frozenset[str]:
    return frozenset(method_names(kind))


@functools.cache
def _is_other_variable(kind: type) -> bool:
    return issubclass(kind, nnx.Variable) and kind is not nnx.Param


def _is_layer(kind, layer, given) -> bool:
    """Whether a layer of flax has its attributes and settings."""
    values = vars(layer)
    if values.keys() != _attributes(kind) or type(values.get("bias")) not in (nnx.Param, type(None)):
        return False
    if type(variable := values[WEIGHTS[kind]]) is not nnx.Param:
        return False
    array = variable.get_raw_value()  # reading a variable takes as long as all of this
    if not hasattr(array, "dtype"):
        return False
    expected = _settings(kind, array.shape[-1], array.dtype)
    for name, value in (expected | given if given else expected).items():
        found = values[name]
        # An array, such as a mask, is not compared.
        if found is not value and not (type(found) is type(value) and found == value):
            return False
    return values["dtype"] is not None and _dtype(values["dtype"]) == array.dtype


_dtype = functools.cache(jnp.dtype)


@functools.cache
def _attributes(kind: type) -> frozenset[str]:
    """The names of what flax gives a layer. Adapters give it more, also where they work from outside."""
    sizes = (1, 1, 1) if kind is nnx.Conv else (1, 1)
    return frozenset(vars(nnx.eval_shape(lambda: kind(*sizes, rngs=nnx.Rngs(0)))))


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
