"""The decode state as a table: what each layer carries, as data that every backend, the reference and the files read.

A field that grows is an array with a capacity: it has room for more positions than are filled. A layer with such a
field has the field "filled", (b,) int32, which counts the positions of each row that are there. The capacity is doubled
where the room runs out, so that shapes change seldom.
"""

import functools
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mamba_core.backend import LayerState, State

FILLED = "filled"
# Before the names of the fields, in the name of the type that `layer_type` makes of them.
PREFIX = "Layer"
# The least capacity that is made.
LEAST_CAPACITY = 16


class Field(NamedTuple):
    """One array of a layer's state.

    name: of the field.
    axes: the letter of each axis after the batch (`spec.dims`).
    shape: their sizes; that of a growing axis is 0.
    dtype: "compute" for the model's, else a dtype's name.
    grows: which axis of the stored array, the batch being axis 0, has a capacity; None where the shape is fixed.
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    dtype: str = "compute"
    grows: int | None = None

    def stored_shape(self, batch: int, capacity: int = 0) -> tuple[int, ...]:
        """With the batch, and the capacity in the place of the growing axis."""
        shape = (batch, *self.shape)
        return shape if self.grows is None else (*shape[: self.grows], capacity, *shape[self.grows + 1 :])


def fields(config, layer: int) -> tuple[Field, ...]:
    """What a layer carries: () for one that carries nothing."""
    return config.facts.fields[layer]


def table(config) -> Iterator[tuple[int, Field]]:
    """(layer, field) for every array of the state but the segment."""
    for layer in range(config.n_layer):
        for field in fields(config, layer):
            yield layer, field


def grows(config) -> bool:
    """Whether any field has a capacity."""
    return config.facts.grows


def layer_types(config) -> tuple:
    """The NamedTuple of what each layer carries."""
    return config.facts.types


@functools.cache
def layer_type(names: tuple[str, ...]) -> Any:
    """The NamedTuple of a layer with these fields.

    Raises:
        ValueError: a name has two underscores in a row, which separate the names.
    """
    if names == LayerState._fields:
        return LayerState
    if any("__" in name for name in names):
        raise ValueError(f"fields are {', '.join(names)}; expected names without two underscores in a row")
    kind = namedtuple("__".join((PREFIX, *names)), names)  # type: ignore[misc]
    # Pickle finds a class by its module's attribute; `__getattr__` below makes it anew in another process.
    kind.__module__ = __name__
    return kind


def __getattr__(name: str) -> type:
    prefix, *names = name.split("__")
    if prefix != PREFIX or not all(part.isidentifier() for part in names):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return layer_type(tuple(names))


def initial(config, batch: int, zeros: Callable[[tuple[int, ...], str], Any], room: int = 0) -> State:
    """The state before the first position: zeros.

    Args:
        zeros: (shape, dtype) -> an array of zeros; the dtype is "compute" or a name.
        room: positions that growing fields have room for.
    """
    # A program that is exported for any length has no number for `room`.
    capacity = capacity_for(room) if grows(config) else 0
    layers = tuple(
        kind(*(zeros(field.stored_shape(batch, capacity), field.dtype) for field in fields(config, layer)))
        for layer, kind in enumerate(layer_types(config))
    )
    return State(layers, zeros((batch,), "int32"))


def capacity_for(positions: int) -> int:
    """The capacity that is made for so many positions: a power of two, so that few shapes are compiled."""
    return max(LEAST_CAPACITY, 1 << max(0, positions - 1).bit_length())


def named(state: State) -> dict[str, Any]:
    """Every array by name: "segment", and "layers.0.conv" and so on."""
    found = {"segment": state.segment}
    for index, layer in enumerate(state.layers):
        found |= {f"layers.{index}.{field}": value for field, value in zip(layer._fields, layer, strict=True)}
    return found


def capacities(config, state: State) -> dict[int, int]:
    """Layer -> positions that its growing fields have memory for, the least of them; only of layers that have some."""
    found: dict[int, int] = {}
    for layer, field, axis in _growing(config):
        found[layer] = min(found.get(layer, math.inf), getattr(state.layers[layer], field.name).shape[axis])
    return found


def capacity(config, state: State) -> int:
    """Positions that the growing fields have memory for, the least of them; 0 where nothing grows."""
    return min(capacities(config, state).values(), default=0)


def filled(config, state: State, to_numpy: Callable[[Any], Any]) -> dict[int, Any]:
    """Layer -> positions of each row that are there, (b,) NumPy; only of layers where something grows."""
    return {layer: to_numpy(getattr(state.layers[layer], FILLED)) for layer in capacities(config, state)}


def room(config, state: State, to_numpy: Callable[[Any], Any]) -> int | None:
    """Positions that can be added before the capacity must grow; None where nothing grows.

    Raises:
        ValueError: positions were computed that the state had no room for.
    """
    if not grows(config):
        return None
    most = max(int(count.max()) for count in filled(config, state, to_numpy).values())
    if (left := capacity(config, state) - most) < 0:
        raise ValueError(
            f"the state has lost {-left} positions, for which a compiled call had no room; start from a state with "
            "more room, of `model.init_state(batch, room)` or `mamba_core.grown`, or call the model uncompiled"
        )
    return left


def with_room(config, state: State, positions: int, to_numpy: Callable[[Any], Any], pad: Callable) -> State:
    """The state with room for so many more positions; the arguments are those of `room` and `grown`."""
    left = room(config, state, to_numpy)
    if left is None or left >= positions:
        return state
    return grown(config, state, capacity_for(capacity(config, state) + positions - left), pad)


def grown(config, state: State, capacity: int, pad: Callable[[Any, int, int], Any]) -> State:
    """The same state with at least that capacity.

    Args:
        pad: (array, axis, count) -> the array with so many zeros behind the axis.
    """
    layers = list(state.layers)
    for layer, field, axis in _growing(config):
        value = getattr(layers[layer], field.name)
        if (missing := capacity - value.shape[axis]) > 0:
            layers[layer] = layers[layer]._replace(**{field.name: pad(value, axis, missing)})
    return state._replace(layers=tuple(layers))


def kept(config, state: State, counts: Any, to_numpy: Callable[[Any], Any]) -> dict[int, Any]:
    """Layer -> the positions of each row that stay without so many of the last, (b,) int32 NumPy.

    Raises:
        ValueError: a row has fewer, or those that stay had no room.
    """
    found = {}
    for layer, own in filled(config, state, to_numpy).items():
        rest, most = own.astype(np.int64) - counts, capacities(config, state)[layer]
        for row in np.flatnonzero((rest < 0) | (rest > most)).tolist():
            raise ValueError(
                f"row {row} has {own[row]} positions in layer {layer}, and {counts[row]} were to be taken back"
                + (f"; expected {own[row]} at most: what was before its last sequence is gone" if rest[row] < 0 else "")
                + (f"; expected {own[row] - most} at least, which found no room" if rest[row] > most else "")
            )
        found[layer] = rest.astype(np.int32)
    return found


def cut(config, state: State, kept: dict[int, Any], like: Callable[[Any, Any], Any], zero: Callable) -> State:
    """The state with so many positions of each row alone.

    Args:
        kept: of the function of that name.
        like: (NumPy array, array of the backend) -> the first as an array where the second is.
        zero: (array, axis, counts (b,) as the backend's) -> the array with zeros behind so many along the axis.
    """
    layers = list(state.layers)
    counts = {layer: like(rows, getattr(layers[layer], FILLED)) for layer, rows in kept.items()}
    for layer, field, axis in _growing(config):
        value = zero(getattr(layers[layer], field.name), axis, counts[layer])
        layers[layer] = layers[layer]._replace(**{field.name: value, FILLED: counts[layer]})
    return state._replace(layers=tuple(layers))


def faults(config, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """What keeps arrays of these shapes, by the names of `named`, from being a state of the config; lazily."""
    expected = {"segment": None} | {f"layers.{layer}.{field.name}": field for layer, field in table(config)}
    if names := sorted(set(expected) ^ set(shapes)):
        yield f"missing or unexpected: {', '.join(names[:8])}"
        return
    batch = shapes["segment"][:1] or (1,)
    for name, field in expected.items():
        wanted = batch if field is None else field.stored_shape(batch[0])
        found = shapes[name]
        if field is not None and field.grows is not None and len(found) == len(wanted):
            wanted = field.stored_shape(batch[0], found[field.grows])
        if tuple(found) != tuple(wanted):
            yield f"{name} has shape {tuple(found)}; expected {tuple(wanted)}"


def _growing(config) -> Iterator[tuple[int, Field, int]]:
    """(layer, field, its growing axis)."""
    for layer, field in table(config):
        if field.grows is not None:
            yield layer, field, field.grows
