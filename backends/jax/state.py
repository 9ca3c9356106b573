"""The decode state: `mamba_core.backend.State` of JAX arrays, a pytree."""

import jax
import jax.numpy as jnp

from mamba_core.backend import State
from mamba_core.backends.jax.arrays import to_numpy
from mamba_core.call import Call
from mamba_core.spec import state as states


def init_state(config, batch: int, dtype: str, room: int = 0) -> State:
    """Before the first position: zeros, which JAX moves to where the model is.

    room: how many positions a growing state has memory for. A program that is exported for any length has memory for
    none.
    """
    room = room if isinstance(room, int) else 0
    return states.initial(
        config, batch, lambda shape, kind: jnp.zeros(shape, dtype if kind == "compute" else kind), room
    )


def room(config, state: State) -> int | None:
    """How many positions can be added before the state must grow; None where nothing grows."""
    return states.room(config, state, to_numpy)


def with_room(config, state: State, positions: int) -> State:
    """The state with room for so many more positions.

    Inside a transformation of JAX nobody knows how many are filled: there the state is left as it is.
    """
    if not states.grows(config) or any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(state)):
        return state
    return states.with_room(config, state, positions, to_numpy, _padded)


def cut(config, state: State, kept: dict) -> State:
    """The state with so many positions of each row alone; kept: layer -> (b,) NumPy."""
    return states.cut(config, state, kept, lambda rows, like: jax.device_put(rows, like.sharding), _zero_behind)


def entering(state: State, call: Call) -> tuple:
    """The layers' states that the first position sees: zero in the rows that begin another segment."""
    if call.segment_ids is None or call.segment_ids.shape[1] == 0:
        return state.layers
    first, counts = _first_counting(call.mask, call.segment_ids)
    keep = ~counts | (first == state.segment)
    return jax.tree.map(lambda value: _rows(keep, value), state.layers)


def leaving(layers: tuple, state: State, call: Call) -> State:
    """The state after the last position, with the segment that it is in."""
    if call.segment_ids is None or call.segment_ids.shape[1] == 0:
        return State(layers, state.segment)
    flipped = None if call.mask is None else call.mask[:, ::-1]
    last, counts = _first_counting(flipped, call.segment_ids[:, ::-1])
    return State(layers, jnp.where(counts, last, state.segment).astype(jnp.int32))


def _first_counting(mask, segment_ids) -> tuple[jax.Array, jax.Array]:
    """The segment of each row's first position that counts, and whether there is one."""
    if mask is None:
        return segment_ids[:, 0], jnp.ones(len(segment_ids), bool)
    first = mask.argmax(1, keepdims=True)
    return jnp.take_along_axis(segment_ids, first, axis=1)[:, 0], mask.any(1)


def _rows(keep, value):
    return jnp.where(keep.reshape(-1, *(1,) * (value.ndim - 1)), value, 0)


def _padded(value: jax.Array, axis: int, count: int) -> jax.Array:
    return jnp.pad(value, [(0, count if index == axis else 0) for index in range(value.ndim)])


def _zero_behind(value: jax.Array, axis: int, counts: jax.Array) -> jax.Array:
    stays = jnp.arange(value.shape[axis]) < counts[:, None]
    shape = [size if index in (0, axis) else 1 for index, size in enumerate(value.shape)]
    return jnp.where(stays.reshape(shape), value, 0)
