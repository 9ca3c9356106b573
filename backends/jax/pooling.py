"""One vector of a row's positions, as `mamba_core.spec.ops.pooling` has it."""

import jax
import jax.numpy as jnp


def pooled(hidden: jax.Array, pooling: str, mask: jax.Array | None = None) -> jax.Array:
    """hidden (b, l, d) to (b, d) in its dtype; zero for a row of which no position counts."""
    batch, length, width = hidden.shape
    if length == 0:
        return jnp.zeros((batch, width), hidden.dtype)
    counts = jnp.ones((batch, length), bool) if mask is None else mask
    if pooling == "mean":
        kept = jnp.where(counts[..., None], hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)), 0.0)
        return (kept.sum(1) / jnp.maximum(counts.sum(1, keepdims=True), 1)).astype(hidden.dtype)
    if pooling == "max":
        best = jnp.where(counts[..., None], hidden, -jnp.inf).argmax(1)
    else:
        at = jnp.arange(length)
        best = jnp.where(counts, at if pooling == "last" else -at, -length).argmax(1)[:, None]
    found = jnp.take_along_axis(hidden, best[:, None], axis=1)[:, 0]
    return jnp.where(counts.any(1)[:, None], found, jnp.zeros((), hidden.dtype))
