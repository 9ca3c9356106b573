import functools

import jax
import jax.numpy as jnp
from jax import lax

from mamba_core.backends.jax.positions import call_of
from mamba_core.kernels import choose
from mamba_core.spec import ops

check_sum = ops.public()["leaky_sum"].forward.__globals__["check_sum"]


def leaky_sum(x, decay, *, initial_state=None, return_final_state=False, mask=None, segment_ids=None, kernel="auto"):
    check_sum(x, decay, initial_state, mask, segment_ids)
    choose(kernel, KERNELS, "leaky_sum")
    y, state = sum_over(call_of(mask, segment_ids, length=x.shape[1]), x, decay, initial_state)
    return (y, state) if return_final_state else y


def sum_over(call, x, decay, state):
    if state is None:
        state = jnp.zeros((x.shape[0], x.shape[2], 2, 3), jnp.float32)
    return _sum(x, decay, state, call.mask, call.restart)


@functools.partial(jax.jit)
def _sum(x, decay, state, mask, restart):
    keep = jax.nn.sigmoid(decay)[:, None, None] ** jnp.array([[1.0], [2.0]])

    def position(state, inputs):
        x, counts, begins = inputs
        before = state if begins is None else jnp.where(begins[:, None, None, None], 0.0, state)
        after = keep * before + x[:, :, None, None] * jnp.array([1.0, 2.0, 3.0])
        state = after if counts is None else jnp.where(counts[:, None, None, None], after, state)
        y = state.sum((2, 3))
        return state, y if counts is None else jnp.where(counts[:, None], y, 0.0)

    inputs = jax.tree.map(lambda value: jnp.moveaxis(value, 1, 0), (x.astype(jnp.float32), mask, restart))
    state, y = lax.scan(position, state, inputs)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state


def leaky_sum_step(x, decay, *, state):
    y, state = leaky_sum(x[:, None], decay, initial_state=state, return_final_state=True)
    return y[:, 0], state


KERNELS = {"plain": None}


def kernels(device=None, *_):
    return dict.fromkeys(KERNELS)
