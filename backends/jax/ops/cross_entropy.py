"""The head and the cross-entropy of a large vocabulary, with a few rows of logits in memory at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from mamba_core.backends.jax.ops.linear import product

# Logits in memory at once.
BYTES = 1 << 29
# The rows of a part are a multiple of it: products of odd sizes are slower.
ROUND = 64


@jax.custom_vjp
def linear_cross_entropy(hidden: jax.Array, weight: jax.Array, targets: jax.Array, counts: jax.Array) -> jax.Array:
    """The sum of the cross-entropies of the targets that count, () float32.

    hidden (rows, d); weight (v, d); targets (rows,) int, NaN outside the vocabulary; counts (rows,) bool. Logits are
    float32, their gradient has the dtype of hidden. The gradients are computed with the loss, from the same logits.
    """

    def add(total, part):
        losses, _ = _cross_entropy(product(part[0], weight, transposed=False), *part[1:])
        return total + losses, None

    return lax.scan(add, jnp.zeros(()), _parts(weight, hidden, targets, counts))[0]


def _forward(hidden, weight, targets, counts):
    def add(sums, part):
        hidden, *others = part
        losses, dlogits = _cross_entropy(product(hidden, weight, transposed=False), *others)
        dlogits = dlogits.astype(hidden.dtype)
        dweight = product(dlogits.T, hidden.T, transposed=False)
        return (sums[0] + losses, sums[1] + dweight), product(dlogits, weight, transposed=True).astype(hidden.dtype)

    begin = (jnp.zeros(()), jnp.zeros(weight.shape, jnp.float32))
    (total, dweight), dhidden = lax.scan(add, begin, _parts(weight, hidden, targets, counts))
    return total, (dhidden.reshape(-1, hidden.shape[1])[: len(hidden)], dweight, weight)


def _backward(saved, dtotal):
    dhidden, dweight, weight = saved
    return (dtotal * dhidden).astype(dhidden.dtype), (dtotal * dweight).astype(weight.dtype), None, None


linear_cross_entropy.defvjp(_forward, _backward)
KERNELS = {"plain": linear_cross_entropy}


def kernels(device: str, dtype=None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS)


def _parts(weight, *arrays):
    """The rows of each, some at a time: (parts, rows of a part, ...); the last part is filled up with zeros."""
    rows = len(arrays[0])
    each = -(-rows // max(1, -(-4 * rows * len(weight) // BYTES)))
    if each < rows:
        each = -(-each // ROUND) * ROUND
    filling = -rows % each
    padded = (jnp.pad(value, [(0, filling)] + [(0, 0)] * (value.ndim - 1)) for value in arrays)
    return [value.reshape(-1, each, *value.shape[1:]) for value in padded]


def _cross_entropy(logits, targets, counts):
    """The sum over the rows that count, and its gradient."""
    logits = logits - logits.max(-1, keepdims=True)
    powers = jnp.exp(logits)
    total = powers.sum(-1, keepdims=True)
    known = (targets >= 0) & (targets < logits.shape[1])
    chosen_logits = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[:, None], axis=1)
    # A row counts once, not at all, or spoils the sum.
    factor = jnp.where(counts, jnp.where(known, 1.0, jnp.nan), 0.0)[:, None]
    chosen = jnp.arange(logits.shape[1]) == targets[:, None]
    losses = jnp.where(counts[:, None], (jnp.log(total) - chosen_logits) * factor, 0.0)
    return losses.sum(), jnp.where(counts[:, None], (powers / total - chosen) * factor, 0.0)
