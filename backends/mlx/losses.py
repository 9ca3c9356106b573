"""The losses of labelled tasks, as `mamba_core.spec.losses` has them; the language model's are its own."""

import mlx.core as mx
import mlx.nn as nn


def cross_entropy(logits: mx.array, targets: mx.array, counts: mx.array, weights=None) -> mx.array:
    """logits (..., o) float32, targets (...) int, counts (...) bool."""
    targets = mx.where(counts, targets, 0)
    chosen = mx.take_along_axis(nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
    shares = counts.astype(logits.dtype)
    shares = shares if weights is None else shares * mx.array(weights, logits.dtype)[targets]
    return -(shares * chosen).sum() / shares.sum()


def binary_cross_entropy(logits: mx.array, targets: mx.array, counts: mx.array, weights=None) -> mx.array:
    """logits, targets (b, o), counts (b,) bool."""
    shares = mx.broadcast_to(counts[:, None].astype(logits.dtype), logits.shape)
    shares = shares if weights is None else shares * mx.array(weights, logits.dtype)
    return (shares * (mx.logaddexp(logits, 0.0) - targets * logits)).sum() / shares.sum()


def squared_error(values: mx.array, targets: mx.array, counts: mx.array) -> mx.array:
    """All of one shape."""
    difference = mx.where(counts, values - mx.where(counts, targets, 0.0), 0.0)
    return mx.square(difference).sum() / counts.sum()


def pinball(values: mx.array, targets: mx.array, counts: mx.array, quantiles) -> mx.array:
    """values (..., q), targets and counts (...)."""
    counts, levels = counts[..., None], mx.array(quantiles, values.dtype)
    below = mx.where(counts, mx.where(counts, targets[..., None], 0.0) - values, 0.0)
    return (mx.where(below > 0, levels, levels - 1) * below).sum() / (counts.sum() * len(quantiles))


def balance_loss(routers: list[mx.array], top_k: int, mask: mx.array | None = None) -> mx.array:
    """Of the logits (b, l, experts) of each router: `spec.ops.mixture_of_experts.balance_loss`. mask: (b, l) bool."""
    logits = mx.stack(routers).astype(mx.float32)
    experts = logits.shape[-1]
    order = mx.argsort(-mx.stop_gradient(logits), axis=-1)[..., :top_k]
    chosen = (order[..., None] == mx.arange(experts)).astype(mx.float32).sum(axis=-2)
    counts = (
        mx.ones((*logits.shape[:-1], 1)) if mask is None else mx.broadcast_to(mask[..., None], (*logits.shape[:-1], 1))
    )
    total = mx.maximum(counts.astype(mx.float32).sum(), 1)
    softmax = mx.softmax(logits, axis=-1)
    used, mean = (mx.where(counts > 0, value, 0.0).sum(axis=(0, 1, 2)) / total for value in (chosen, softmax))
    return experts * (used * mean).sum()
