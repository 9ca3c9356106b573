"""The losses of the tasks in float64, each with its gradient by hand.

Each is a mean over what counts, weighted where weights are given. Where nothing counts it is not a number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mamba_core.spec.ops.base import sigmoid, softplus

IGNORED = -100  # the label of a target that does not count, as torch and transformers have it


def cross_entropy(
    logits: Any, targets: Any, mask: Any = None, weights: Sequence[float] | None = None
) -> tuple[float, np.ndarray]:
    """Mean of -log softmax(logits)[target] over the positions that count, and its gradient in the logits.

    logits (..., v), targets and mask (...). weights (v,): of each label, in the sum and in what it is divided by.
    """
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    counts = np.ones(targets.shape, bool) if mask is None else np.asarray(mask)
    shares = counts if weights is None else counts * np.asarray(weights, np.float64)[targets]
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    gradient = np.exp(log_probabilities)
    np.put_along_axis(gradient, targets[..., None], np.take_along_axis(gradient, targets[..., None], -1) - 1.0, -1)
    loss = -chosen[counts].mean() if weights is None else -(shares * chosen).sum() / shares.sum()
    return loss, gradient * shares[..., None] / shares.sum()


def binary_cross_entropy(
    logits: Any, targets: Any, counts: Any, weights: Sequence[float] | None = None
) -> tuple[float, np.ndarray]:
    """Mean of -t log s(x) - (1 - t) log(1 - s(x)) with the logistic function s, and its gradient in the logits x.

    logits, targets (b, o), counts (b,). weights (o,): of each label, in the sum and in what it is divided by.
    """
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    shares = np.broadcast_to(
        np.asarray(counts)[:, None] * np.asarray(1.0 if weights is None else weights), logits.shape
    )
    loss = (shares * (softplus(logits) - targets * logits)).sum() / shares.sum()
    return loss, shares * (sigmoid(logits) - targets) / shares.sum()


def squared_error(values: Any, targets: Any, counts: Any) -> tuple[float, np.ndarray]:
    """Mean of (value - target)^2 over what counts, all of one shape, and its gradient in the values."""
    values, targets = np.asarray(values, np.float64), np.asarray(targets, np.float64)
    difference = np.where(counts, values - np.where(counts, targets, 0.0), 0.0)
    return (difference**2).sum() / np.sum(counts), 2 * difference / np.sum(counts)


def pinball(values: Any, targets: Any, counts: Any, quantiles: Sequence[float]) -> tuple[float, np.ndarray]:
    """Mean of max(q (t - x), (q - 1) (t - x)) over what counts and over the quantiles q, and its gradient in x.

    values (..., q), targets and counts (...). Where x is t, the gradient is that of x above t.
    """
    values, counts = np.asarray(values, np.float64), np.asarray(counts)[..., None]
    levels, number = np.asarray(quantiles, np.float64), np.sum(counts) * len(quantiles)
    below = np.where(counts, np.where(counts, np.asarray(targets, np.float64)[..., None], 0.0) - values, 0.0)
    slopes = np.where(below > 0, levels, levels - 1.0)
    return (slopes * below).sum() / number, np.where(counts, -slopes, 0.0) / number
