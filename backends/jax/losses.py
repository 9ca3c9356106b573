"""The losses of labelled tasks, as `mamba_core.spec.losses` has them; the language model's are its own."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, counts: jax.Array, weights=None) -> jax.Array:
    """logits (..., o) float32, targets (...) int, counts (...) bool."""
    targets = jnp.where(counts, targets, 0)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    shares = counts.astype(logits.dtype)
    shares = shares if weights is None else shares * jnp.asarray(weights, logits.dtype)[targets]
    return -(shares * chosen).sum() / shares.sum()


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, counts: jax.Array, weights=None) -> jax.Array:
    """logits, targets (b, o), counts (b,) bool."""
    shares = jnp.broadcast_to(counts[:, None].astype(logits.dtype), logits.shape)
    shares = shares if weights is None else shares * jnp.asarray(weights, logits.dtype)
    return (shares * (jax.nn.softplus(logits) - targets * logits)).sum() / shares.sum()


def squared_error(values: jax.Array, targets: jax.Array, counts: jax.Array) -> jax.Array:
    """All of one shape."""
    difference = jnp.where(counts, values - jnp.where(counts, targets, 0.0), 0.0)
    return jnp.square(difference).sum() / counts.sum()


def pinball(values: jax.Array, targets: jax.Array, counts: jax.Array, quantiles) -> jax.Array:
    """values (..., q), targets and counts (...)."""
    counts, levels = counts[..., None], jnp.asarray(quantiles, values.dtype)
    below = jnp.where(counts, jnp.where(counts, targets[..., None], 0.0) - values, 0.0)
    return (jnp.where(below > 0, levels, levels - 1) * below).sum() / (counts.sum() * len(quantiles))
