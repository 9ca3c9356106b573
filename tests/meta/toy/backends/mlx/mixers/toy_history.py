"""The mean of all inputs so far; their history grows."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.spec.state import layer_type


class History(nn.Module):
    def __init__(self, config, layer, options):
        super().__init__()
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def __call__(self, hidden, state, call):
        history, filled = state
        batch, length = hidden.shape[:2]
        capacity = history.shape[1]
        valid = mx.ones((batch, length), mx.bool_) if call.mask is None else call.mask
        count = filled[:, None] + mx.cumsum(valid.astype(mx.int32), axis=1)
        x = mx.where(valid[..., None], hidden.astype(mx.float32), 0.0)
        # What does not count is written behind the capacity, and dropped.
        places = mx.where(valid, count - 1, capacity)
        at = (places[..., None] == mx.arange(capacity)).astype(mx.float32)
        written = at.any(axis=1)[..., None]
        history = mx.where(written, at.swapaxes(1, 2) @ x, history.astype(mx.float32)).astype(history.dtype)
        earlier = mx.arange(capacity) < filled[:, None]
        before = mx.where(earlier[..., None], state.history.astype(mx.float32), 0.0).sum(axis=1, keepdims=True)
        y = (before + mx.cumsum(x, axis=1)) / mx.maximum(count, 1)[..., None]
        y = mx.where(valid[..., None], y, 0.0).astype(hidden.dtype)
        after = layer_type(("history", "filled"))(history, filled + valid.astype(mx.int32).sum(axis=1))
        return call.observe("out_proj", self.out_proj(call.observe("mean", y))), after


Mixer = History
