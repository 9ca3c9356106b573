"""The short causal convolution as k shifted multiply-adds, which XLA fuses into one pass over the input."""

import functools

import jax
import jax.numpy as jnp

from mamba_core.backends.jax.positions import compaction, restarts
from mamba_core.spec.checks import check_conv, check_conv_step


def causal_conv(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
):
    check_conv(x, weight, bias, activation, initial_state, mask, segment_ids)
    batch, _, channels = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, weight.shape[1] - 1, channels), x.dtype)
    y, state = _causal_conv(x, weight, bias, initial_state, mask, segment_ids, activation=activation)
    return (y, state) if return_final_state else y


def causal_conv_step(x, weight, bias=None, *, activation=None, state):
    check_conv_step(x, weight, bias, activation, state)
    window = jnp.concatenate([state.astype(x.dtype), x[:, None]], axis=1)
    y = _filter(window, weight, bias, None, activation)
    return y[:, 0].astype(x.dtype), window[:, 1:]


@functools.partial(jax.jit, static_argnames="activation")
def _causal_conv(x, weight, bias, state, mask, segment_ids, *, activation):
    length, carried = x.shape[1], state.shape[1]
    restart = restarts(mask, segment_ids)
    if mask is None:
        end = jnp.full(x.shape[:1], length)
    else:
        order, inverse = compaction(mask)
        end = mask.sum(1)
        x = jnp.take_along_axis(jnp.where(mask[..., None], x, 0), order[..., None], axis=1)
        restart = None if restart is None else jnp.take_along_axis(restart, order, axis=1)
    inputs = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    run = None if restart is None else jnp.pad(jnp.cumsum(restart, axis=1), ((0, 0), (carried, 0)))

    y = _filter(inputs, weight, bias, run, activation).astype(x.dtype)
    if mask is not None:
        y = jnp.where(mask[..., None], jnp.take_along_axis(y, inverse[..., None], axis=1), 0)

    last = end[:, None] + jnp.arange(carried)
    state = jnp.take_along_axis(inputs, last[..., None], axis=1)
    if run is not None:
        in_last_run = jnp.take_along_axis(run, last, axis=1) == restart.sum(1, keepdims=True)
        state = jnp.where(in_last_run[..., None], state, 0)
    return y, state


@functools.partial(jax.checkpoint, static_argnums=4)
def _filter(inputs, weight, bias, run, activation):
    """Over inputs (b, k-1+l, e) in float32; `run` (b, k-1+l) counts the restarts up to each. Keeps only its inputs."""
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    width = weight.shape[1]
    length = inputs.shape[1] - width + 1
    y = 0 if bias is None else bias.astype(dtype)
    for tap in range(width):
        value = inputs[:, tap : tap + length].astype(dtype)
        if run is not None:
            value = jnp.where((run[:, tap : tap + length] == run[:, width - 1 :])[..., None], value, 0)
        y = y + weight[:, tap].astype(dtype) * value
    return jax.nn.silu(y) if activation == "silu" else y
