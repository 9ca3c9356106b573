"""One vector of a row's positions: the last or the first that counts, their mean, or their maximum in each channel."""

import numpy as np

from mamba_core.spec.ops.base import NodeOp, counting

POOLINGS = ("last", "mean", "max", "first")


def _shares(x: np.ndarray, pooling: str, mask) -> np.ndarray:
    """(b, l, 1) or (b, l, d): what each position adds to the vector. Of equal maxima the first one counts."""
    counts, at = counting(x.shape, mask)[..., None], np.arange(x.shape[1])[:, None]
    if pooling == "mean":
        return counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if not x.shape[1]:
        return counts
    ranks = {"last": at, "first": -at, "max": x}[pooling]
    best = np.where(counts, ranks, -np.inf).argmax(1)
    return counts & (at == best[:, None])


def _pooled(inputs, parameters, settings, carried, positions):
    """x (b, l, d) to (b, d); zero for a row of which no position counts."""
    x = inputs[0]
    shares = _shares(x, settings["pooling"], positions.mask)
    return np.where(shares > 0, x * shares, 0.0).sum(1), ()


def _pooled_vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    shares = _shares(inputs[0], settings["pooling"], positions.mask)
    return [np.broadcast_to(dy[:, None] * shares, inputs[0].shape)], {}, ()


NODES = {"pooled": NodeOp(_pooled, _pooled_vjp)}
