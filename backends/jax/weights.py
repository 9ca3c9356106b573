"""Canonical names <-> the module tree. Flax has other names for weights, and other axes for some of them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba_core.backend import Foreign
from mamba_core.backends.jax import layers, ops
from mamba_core.backends.jax.arrays import devices, from_numpy, to_numpy
from mamba_core.backends.jax.heads import model_class
from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.ops import causal_conv
from mamba_core.backends.jax.untouched import untouched
from mamba_core.kernels import Kernels
from mamba_core.merging import check_held, merged
from mamba_core.spec.checks import choose_device
from mamba_core.spec.params import Values, checked, parameter_table
from mamba_core.tasks.base import EMBEDDING

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


# What a module may be given without computing another function of the same weights, but for its rounding.
ROUNDING = {"dtype", "param_dtype", "precision", "preferred_element_type", "kernels"}

Path = tuple[str | int, ...]


class Built(NamedTuple):
    """What a model consists of as built.

    modules: by path, an owner before what it owns, without values. layers: the paths of those that have a "weight".
    names: path -> canonical name of each parameter.
    """

    modules: Mapping[Path, nnx.Module]
    layers: frozenset[Path]
    names: Mapping[Path, str]


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
    # Layers that draw random numbers have been made without values too.
    nnx.reseed(model, default=0)
    return model


def parameters(model: Model, merge: bool = False) -> Values:
    found, values = foreign(model), dict(nnx.to_flat_state(nnx.state(model)))

    def read(name):
        return canonical(model, name, values[path(model, name)][...])

    if merge:
        return merged(model.config, found, read, functools.partial(layer, model), model.dtype)
    check_held(model.config, found)
    return Values(model.config, read)


def foreign(model: Model) -> Foreign:
    """All variables count, but for the states of random numbers."""
    built, held = _built(model.config, model.dtype, model.policy), _held(model)
    own, wanted = (_by_layer(paths, built.layers) for paths in (held, built.names))
    changed: dict[Path, str] = {}
    hooked: dict[Path, str] = {}
    for keys, original in built.modules.items():
        if _inside(keys, changed):
            continue
        module, is_layer = at(model, keys, None), keys in built.layers
        kind = "nothing" if module is None else type(module).__name__
        # The model's own class and the backbone's may be subclasses.
        if not (isinstance(module, type(original)) if len(keys) < 2 else type(module) is type(original)):
            changed[keys] = kind
            continue
        if len(keys) > 1 and (name := _set_otherwise(module, original, is_layer)):
            changed[keys] = f"{kind} with another {name}"
        if is_layer:
            for word, names in (("with", own[keys] - wanted[keys]), ("without", wanted[keys] - own[keys])):
                if names:
                    changed[keys] = f"{kind} {word} {', '.join(sorted(names))}"
            if keys not in changed and not untouched(type(original), module, **_given(original)):
                hooked[keys] = kind
        else:
            if type(module).__call__ is not type(original).__call__ or not untouched(type(module), module):
                hooked[keys] = f"{kind} with another call"
            for name, value in vars(original).items():  # such as a feed-forward in a block that was built without
                if value is None and (other := getattr(module, name, None)) is not None:
                    changed[(*keys, name)] = type(other).__name__
    for keys in set(built.names).difference(held):
        if not _inside(keys, changed):
            changed[keys] = "nothing"
    names = [_dotted(keys) for keys in held if keys not in built.names and not _inside(keys, changed)]
    found, others = ({_dotted(keys): kind for keys, kind in each.items()} for each in (changed, hooked))
    return Foreign(tuple(names), found, others)


def layer(model: Model, path: str, inputs: np.ndarray) -> np.ndarray:
    """Of a copy, whose random numbers are not those of the model."""
    weight, module = parameter_table(model.config)[f"{path}.weight"], at(model, _keys(path))
    if weight.name == EMBEDDING and getattr(model, "lm_head", True) is None and layers.attends(module):
        raise ValueError(f"{path} is {type(module).__name__} with an `attend` of its own, which no rows can hold")
    if isinstance(module, nnx.Module):
        _check_read(model, path, module)
        module = nnx.clone(module)
        module.eval()
    dtype = "int32" if inputs.dtype.kind in "iu" else model.dtype
    given = from_numpy(inputs, dtype=dtype, device=model.device)
    if len(weight.shape) != 3:
        return to_numpy(module(given).astype(jnp.float32))
    taps = weight.shape[2]
    try:
        causal_conv.check_taps(module, taps, path)
        given = jnp.pad(given, ((0, 0), (taps - 1, 0), (0, 0)))
        return to_numpy(causal_conv.valid(module, given, taps, path).astype(jnp.float32))
    except TypeError as fault:
        raise ValueError(f"{path} cannot be merged: {fault}") from None


def table_paths(model: Model) -> dict[Path, str]:
    """Path -> canonical name of the parameters that stand in modules of the classes that were built."""
    built = _built(model.config, model.dtype, model.policy)
    owners = {keys: type(original) for keys, original in built.modules.items()}
    return {keys: name for keys, name in built.names.items() if type(at(model, keys[:-1], None)) is owners[keys[:-1]]}


def named(model: Model, state: nnx.State) -> dict[str, jax.Array]:
    """The arrays of the parameters' state, or of one like it such as gradients, by canonical name."""
    values = dict(nnx.to_flat_state(state))
    return {name: values[path(model, name)][...] for name in parameter_table(model.config)}


def place(model: Model, name: str) -> tuple[nnx.Module, str]:
    """The module that has that parameter, and under what name."""
    *owner, leaf = path(model, name)
    return at(model, owner), leaf


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


def at(model: Any, keys: Path, *default: Any) -> Any:
    """What stands at a path inside of the model, or the default where there is none."""
    for key in keys:
        try:
            model = model[key] if isinstance(key, int) or isinstance(model, Mapping) else getattr(model, key)
        except (AttributeError, IndexError, KeyError, TypeError):
            if not default:
                raise
            return default[0]
    return model


def _keys(name: str) -> list[str | int]:
    return [int(key) if key.isdigit() else key for key in name.split(".")]


def _weight(model: Model, name: str) -> Weight:
    """The weight of the module that a canonical name means."""
    kind = type(at(model, _keys(name)[:-1]))
    if kind in WEIGHTS:
        return WEIGHTS[kind]
    if (leaf := getattr(kind, "weight_leaf", None)) is not None:
        ancestor = next((WEIGHTS[other] for other in kind.__mro__ if other in WEIGHTS), Weight(leaf))
        return ancestor._replace(leaf=leaf)
    raise TypeError(
        f"{name.removesuffix('.weight')} is {kind.__name__}, and nobody knows which of its parameters the weight is; "
        "give the class an attribute `weight_leaf` with that name, or put the original module back"
    )


@functools.lru_cache(maxsize=8)
def _built(config, dtype: str, policy) -> Built:
    kind = model_class(config.task)
    model = nnx.eval_shape(lambda: kind(config, Options(dtype, policy, nnx.Rngs(0))))
    found = (item for item in nnx.iter_modules(model) if not isinstance(item[1], nnx.List))
    modules = dict(sorted(found, key=lambda item: len(item[0])))
    names = {path(model, name): name for name in parameter_table(config)}
    layers = frozenset(keys[:-1] for keys, name in names.items() if name.endswith(".weight"))
    return Built(modules, layers, names)


def _held(model) -> list[Path]:
    """The paths of the variables, but for the states of random numbers."""
    return [keys for keys, value in nnx.to_flat_state(nnx.state(model)) if not isinstance(value, nnx.RngState)]


def _check_read(model, path, module) -> None:
    """Refuses a layer of the class that was built with other variables, which are read from outside of its call."""
    keys, built = tuple(_keys(path)), _built(model.config, model.dtype, model.policy)
    original = built.modules[keys]
    if type(module) is type(original) and untouched(type(original), original, **_given(original)):
        expected = _by_layer(built.names, built.layers)[keys]
        if more := {_dotted(each) for each in _held(module)} - expected:
            raise ValueError(
                f"{path} holds {', '.join(sorted(more))}, which the call of {type(module).__name__} does not read; "
                "merge them by what put them there"
            )


def _by_layer(paths, layers) -> dict[Path, set[str]]:
    """Layer -> the paths of what is inside of it, from there."""
    found: dict[Path, set[str]] = {keys: set() for keys in layers}
    for keys in paths:
        for depth in range(1, len(keys)):
            if keys[:depth] in found:
                found[keys[:depth]].add(_dotted(keys[depth:]))
    return found


def _inside(keys, owners) -> bool:
    return any(keys[: len(owner)] == owner for owner in owners)


def _set_otherwise(module, original, is_layer) -> str | None:
    """The name of a setting that makes a module compute another function."""
    for name, value in vars(original).items():
        if name in ROUNDING or name.startswith("_") or isinstance(value, (nnx.Pytree, nnx.Variable)):
            continue
        if value is None and not is_layer:
            continue
        found = vars(module).get(name, value)
        if not (found is value or isinstance(found, nnx.Variable) or (type(found) is type(value) and found == value)):
            return name
    return None


def _given(original) -> dict[str, Any]:
    """The settings of a layer as built that `untouched` must be told."""
    kind = getattr(original, "preferred_element_type", None)
    return {} if kind is None else {"preferred_element_type": kind}


def _dotted(keys) -> str:
    return ".".join(map(str, keys))
