"""The decode state: `mamba_core.backend.State` of MLX arrays, which MLX's functions take as a tree."""

import mlx.core as mx

from mamba_core.backend import State
from mamba_core.backends.mlx.arrays import dtype_named, from_numpy, to_numpy
from mamba_core.backends.mlx.kernels.native_tensors import are_traced
from mamba_core.call import Call
from mamba_core.spec import state as states


def init_state(config, batch: int, dtype: mx.Dtype, room: int = 0) -> State:
    """Before the first position: zeros. room: how many positions a growing state has memory for."""
    return states.initial(
        config, batch, lambda shape, kind: mx.zeros(shape, dtype if kind == "compute" else dtype_named(kind)), room
    )


def room(config, state: State) -> int | None:
    """How many positions can be added before the state must grow; None where nothing grows."""
    return states.room(config, state, to_numpy)


def with_room(config, state: State, positions: int) -> State:
    """The state with room for so many more positions.

    Inside a transformation of MLX nobody knows how many are filled: there the state is left as it is.
    """
    if not states.grows(config) or are_traced(states.named(state)):
        return state
    return states.with_room(config, state, positions, to_numpy, _padded)


def cut(config, state: State, kept: dict) -> State:
    """The state with so many positions of each row alone; kept: layer -> (b,) NumPy."""
    return states.cut(config, state, kept, lambda rows, _: from_numpy(rows), _zero_behind)


def entering(state: State, call: Call) -> tuple:
    """The states of the layers that the first position sees: zero in rows that begin another segment."""
    mask, segment_ids = call.mask, call.segment_ids
    if segment_ids is None or segment_ids.shape[1] == 0:
        return state.layers
    first, counts = _first_counting(mask, segment_ids)
    keep = ~counts | (first == state.segment)
    return tuple(type(layer)(*(_rows(keep, value) for value in layer)) for layer in state.layers)


def leaving(layers: tuple, state: State, call: Call) -> State:
    """The state after the last position, with that position's segment."""
    mask, segment_ids = call.mask, call.segment_ids
    if segment_ids is None or segment_ids.shape[1] == 0:
        return State(layers, state.segment)
    flipped = None if mask is None else mask[:, ::-1]
    last, counts = _first_counting(flipped, segment_ids[:, ::-1])
    return State(layers, mx.where(counts, last, state.segment).astype(mx.int32))


def _first_counting(mask, segment_ids) -> tuple[mx.array, mx.array]:
    """The segment of each row's first position that counts, and whether there is one."""
    if mask is None:
        return segment_ids[:, 0], mx.ones((len(segment_ids),), mx.bool_)
    first = mx.argmax(mask, axis=1, keepdims=True)
    return mx.take_along_axis(segment_ids, first, axis=1)[:, 0], mask.any(axis=1)


def _rows(keep, value):
    return mx.where(keep.reshape(-1, *(1,) * (value.ndim - 1)), value, mx.zeros((), value.dtype))


def _padded(value: mx.array, axis: int, count: int) -> mx.array:
    return mx.pad(value, [(0, count if index == axis else 0) for index in range(value.ndim)])


def _zero_behind(value: mx.array, axis: int, counts: mx.array) -> mx.array:
    stays = mx.arange(value.shape[axis]) < counts[:, None]
    shape = [size if index in (0, axis) else 1 for index, size in enumerate(value.shape)]
    return mx.where(stays.reshape(shape), value, mx.array(0, value.dtype))
