"""Modules inside of compiled programs, which are functions: what a call changes in a module must leave them.

Parameters only enter. What else a module holds, such as the count of its random draws or a running mean, enters and
leaves.
"""

import functools
import operator
from collections.abc import Callable

import jax
from flax import nnx

# What a class says to the ways, and what makes a module: no part of what it computes.
SAID = {"native_step", "width", "__init__"}


def divided(module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, parameters, other variables)."""
    return nnx.split(module, nnx.Param, ...)


def whole(graph: nnx.GraphDef, *states: nnx.State) -> nnx.Module:
    """The module of these, which may change its variables and leaves those that are given as they are."""
    return nnx.merge(graph, *states, copy=True)


def after_call(module, graph: nnx.GraphDef, parameters: nnx.State) -> nnx.State:
    """The other variables of a module that was made `whole` of these and then called.

    Raises:
        TypeError: the call has changed a parameter or an attribute, which do not leave a program.
    """
    graph_after, parameters_after, others = divided(module)
    if graph_after != graph:
        attributes = [name for name, value in graph_after.attributes if (name, value) not in graph.attributes]
        names = ", ".join(dict.fromkeys(name for name in attributes if not str(name).startswith("_")))
        raise TypeError(
            f"a call of {type(module).__name__} changes attributes of its modules: {names or 'what they hold'}; "
            "in a compiled program only an nnx.Variable that was there before can change"
        )
    before, after = (nnx.to_flat_state(state) for state in (parameters, parameters_after))
    for (path, one), (_, other) in zip(before, after, strict=True):
        if one.get_raw_value() is not other.get_raw_value():
            raise TypeError(
                f"a call of {type(module).__name__} changes the nnx.Param {'.'.join(map(str, path))}; "
                "give what a call changes another type, such as nnx.BatchStat"
            )
    return others


def put_back(module, others: nnx.State) -> None:
    """Give a module the values of its other variables."""
    if jax.tree.leaves(others):
        nnx.update(module, others)


def methods(kind: type) -> tuple:
    """The functions of a class that compute, as they are now."""
    return _reading(kind)(kind)


def methods_in(graph: nnx.GraphDef) -> tuple:
    """Those of all classes in a graph: what is compiled for the graph holds as long as they stay."""
    kinds = dict.fromkeys(getattr(node, "type", None) for node in graph.nodes)
    return tuple(methods(kind) for kind in kinds if kind is not None and issubclass(kind, nnx.Module))


@functools.cache
def method_names(kind: type) -> tuple[str, ...]:
    """Of the methods that the class and its bases before `nnx.Module` define."""
    bases = (base for base in kind.__mro__ if base not in nnx.Module.__mro__)
    defined = (name for base in bases for name, value in vars(base).items() if callable(value) and name not in SAID)
    return tuple(dict.fromkeys(("__call__", *defined)))


@functools.cache
def _reading(kind: type) -> Callable[[type], tuple]:
    # One name twice, because a single one gives no tuple.
    return operator.attrgetter(*method_names(kind), "__call__")
