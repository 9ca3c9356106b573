"""The decode state: `mamba_core.backend.State` of JAX arrays, a pytree."""

import jax
import jax.numpy as jnp

from mamba_core.backend import LayerState, State
from mamba_core.call import Call


def init_state(config, batch: int, dtype: str) -> State:
    """The state before the first position: zeros, which JAX moves to where the model is."""
    conv = jnp.zeros((batch, config.d_conv - 1, config.d_inner), dtype)
    ssm = jnp.zeros((batch, config.d_inner, config.d_state), jnp.float32)
    return State((LayerState(conv, ssm),) * config.n_layer, jnp.zeros(batch, jnp.int32))


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
