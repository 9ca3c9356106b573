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
