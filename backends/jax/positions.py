"""Which positions restart, and how masked rows are compacted, without a loop over the length."""

import jax.numpy as jnp
from jax import lax


def restarts(mask, segment_ids):
    """(b, l) bool: this position counts and its segment is not that of the last one that counted. None: nowhere."""
    if segment_ids is None:
        return None
    valid = jnp.ones(segment_ids.shape, bool) if mask is None else mask
    index = jnp.where(valid, jnp.arange(valid.shape[1]), -1)
    index = jnp.pad(index, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = lax.cummax(index, axis=1)
    segment_before = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    return valid & (previous >= 0) & (segment_ids != segment_before)


def compaction(mask):
    """(order, inverse), each (b, l): order[i] is the position of the i-th that counts, then come those that do not."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)
