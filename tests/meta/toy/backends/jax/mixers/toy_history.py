"""The mean of all inputs so far; their history grows."""

import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax.ops.linear import precision
from mamba_core.spec.state import layer_type


class History(nnx.Module):
    def __init__(self, config, layer, options):
        settings = {"dtype": options.dtype, "param_dtype": options.dtype, "rngs": options.rngs, "use_bias": False}
        settings["precision"] = precision(options.dtype)
        self.out_proj = nnx.Linear(config.d_model, config.d_model, **settings)

    def __call__(self, hidden, state, call):
        history, filled = state
        batch, length = hidden.shape[:2]
        capacity = history.shape[1]
        valid = jnp.ones((batch, length), bool) if call.mask is None else call.mask
        count = filled[:, None] + jnp.cumsum(valid, axis=1)
        x = jnp.where(valid[..., None], hidden.astype(jnp.float32), 0.0)
        # What does not count is written behind the capacity, and dropped.
        places = jnp.where(valid, count - 1, capacity)
        history = history.at[jnp.arange(batch)[:, None], places].set(x.astype(history.dtype), mode="drop")
        earlier = jnp.arange(capacity) < filled[:, None]
        before = jnp.where(earlier[..., None], state.history.astype(jnp.float32), 0.0).sum(1, keepdims=True)
        y = (before + jnp.cumsum(x, axis=1)) / jnp.maximum(count, 1)[..., None]
        y = jnp.where(valid[..., None], y, 0.0).astype(hidden.dtype)
        after = layer_type(("history", "filled"))(history, (filled + valid.sum(1)).astype(jnp.int32))
        return call.observe("out_proj", self.out_proj(call.observe("mean", y))), after


Mixer = History
