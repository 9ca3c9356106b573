"""One vector of a row's positions, as `mamba_core.spec.ops.pooling` has it."""

import mlx.core as mx


def pooled(hidden: mx.array, pooling: str, mask: mx.array | None = None) -> mx.array:
    """hidden (b, l, d) to (b, d) in its dtype; zero for a row of which no position counts."""
    batch, length, width = hidden.shape
    if length == 0:
        return mx.zeros((batch, width), hidden.dtype)
    counts = mx.ones((batch, length), mx.bool_) if mask is None else mask
    if pooling == "mean":
        kept = mx.where(counts[..., None], hidden.astype(mx.float32), 0.0)
        return (kept.sum(1) / mx.maximum(counts.sum(1, keepdims=True), 1)).astype(hidden.dtype)
    if pooling == "max":
        best = mx.stop_gradient(mx.where(counts[..., None], hidden, mx.array(-mx.inf, hidden.dtype)).argmax(1))
    else:
        at = mx.arange(length)
        best = mx.where(counts, at if pooling == "last" else -at, -length).argmax(1)[:, None]
        best = mx.broadcast_to(best, (batch, width))
    found = mx.take_along_axis(hidden, best[:, None], axis=1)[:, 0]
    return mx.where(counts.any(1)[:, None], found, mx.zeros((), hidden.dtype))
