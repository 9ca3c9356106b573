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


def balance_loss(routers: list[jax.Array], top_k: int, mask: jax.Array | None = None) -> jax.Array:
    """Of the logits (b, l, experts) of each router: `spec.ops.mixture_of_experts.balance_loss`. mask: (b, l) bool."""
    logits = jnp.stack(routers).astype(jnp.promote_types(routers[0].dtype, jnp.float32))
    experts = logits.shape[-1]
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, top_k)[1], experts).sum(-2)
    counts = (
        jnp.ones_like(logits[..., :1], bool)
        if mask is None
        else jnp.broadcast_to(mask[..., None], (*logits.shape[:-1], 1))
    )
    total = jnp.maximum(counts.sum(), 1)
    used, mean = (jnp.where(counts, value, 0.0).sum((0, 1, 2)) / total for value in (chosen, jax.nn.softmax(logits)))
    return experts * (used * mean).sum()
