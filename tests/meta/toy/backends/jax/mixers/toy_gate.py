"""A feed-forward: down(silu(up(x)))."""

import jax
from flax import nnx

from mamba_core.backends.jax.ops.linear import precision


class Gate(nnx.Module):
    def __init__(self, config, layer, options):
        settings = {"dtype": options.dtype, "param_dtype": options.dtype, "rngs": options.rngs, "use_bias": False}
        settings["precision"] = precision(options.dtype)
        self.up = nnx.Linear(config.d_model, 3 * config.d_model, **settings)
        self.down = nnx.Linear(3 * config.d_model, config.d_model, **settings)

    def __call__(self, hidden, call):
        active = call.observe("active", jax.nn.silu(call.observe("up", self.up(hidden))))
        return call.observe("down", self.down(active))


Mixer = Gate
