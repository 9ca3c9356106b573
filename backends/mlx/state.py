"""The decode state: `mamba_core.backend.State` of MLX arrays, which MLX's functions take as a tree."""

import mlx.core as mx

from mamba_core.backend import LayerState, State
from mamba_core.call import Call


def init_state(config, batch: int, dtype: mx.Dtype) -> State:
    """Before the first position: zeros."""
    conv = mx.zeros((batch, config.d_conv - 1, config.d_inner), dtype)
    ssm = mx.zeros((batch, config.d_inner, config.d_state), mx.float32)
    segment = mx.zeros((batch,), mx.int32)
    return State((LayerState(conv, ssm),) * config.n_layer, segment)


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
