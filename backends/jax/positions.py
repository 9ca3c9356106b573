"""Which positions restart, and how masked rows are compacted, without a loop over the length."""

import jax
import jax.numpy as jnp
from jax import lax

from mamba_core.call import Call
from mamba_core.observe import Report, unobserved


def call_of(
    mask,
    segment_ids,
    *,
    length,
    observe: Report = unobserved,
    last: bool = False,
    in_place: bool = False,
    fresh: bool = False,
    both: bool = False,
    routers: list[jax.Array] | None = None,
) -> Call:
    """The facts of one call. `length` may be a symbol, where a program is exported for any length.

    both: of the reverse direction too.
    """
    order, inverse = (None, None) if mask is None else compaction(mask)
    return Call(
        mask=mask,
        segment_ids=segment_ids,
        restart=None if segment_ids is None else _restarts(mask, segment_ids),
        order=order,
        inverse=inverse,
        one=isinstance(length, int) and length == 1 and mask is None,
        last=last,
        observe=observe,
        in_place=in_place,
        fresh=fresh,
        routers=routers,
        reverse=_reverse(mask, segment_ids, length) if both else None,
    )


@jax.jit
def compaction(mask):
    """(order, inverse), each (b, l): order[i] is the position of the i-th that counts, then come those that do not."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def where_counting(mask: jax.Array | None, value: jax.Array | None) -> jax.Array | None:
    """(b, l, ...), zero where masked: a masked value may be NaN, and 0 * NaN is not 0."""
    if mask is None or value is None:
        return value
    return jnp.where(jnp.expand_dims(mask, range(2, value.ndim)), value, 0)


@jax.jit
def _restarts(mask, segment_ids):
    """(b, l) bool: this position counts and its segment is not that of the last one that counted."""
    valid = jnp.ones(segment_ids.shape, bool) if mask is None else mask
    index = jnp.where(valid, jnp.arange(valid.shape[1]), -1)
    index = jnp.pad(index, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = lax.cummax(index, axis=1)
    segment_before = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    return valid & (previous >= 0) & (segment_ids != segment_before)


def _reverse(mask, segment_ids, length) -> Call | None:
    """The facts of the positions in reverse order; None where all count and are of one sequence."""
    if mask is None and segment_ids is None:
        return None
    mask, segment_ids = (None if value is None else value[:, ::-1] for value in (mask, segment_ids))
    return call_of(mask, segment_ids, length=length)
