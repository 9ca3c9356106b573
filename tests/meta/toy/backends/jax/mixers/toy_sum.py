"""A leaky sum between two projections."""

import jax.numpy as jnp
from flax import nnx

from mamba_core import discovery
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.spec.state import layer_type

ops = discovery.find("backends.jax.ops", "leaky_sum")


class Sum(nnx.Module):
    def __init__(self, config, layer, options):
        settings = {"dtype": options.dtype, "param_dtype": options.dtype, "rngs": options.rngs, "use_bias": False}
        settings["precision"] = precision(options.dtype)
        self.in_proj = nnx.Linear(config.d_model, config.d_inner, **settings)
        self.decay = nnx.Param(jnp.zeros(config.d_inner))
        self.out_proj = nnx.Linear(config.d_inner, config.d_model, **settings)

    def __call__(self, hidden, state, call):
        x = call.observe("in_proj", self.in_proj(hidden))
        y, leak = ops.sum_over(call, x, self.decay[...], state.leak)
        return call.observe("out_proj", self.out_proj(call.observe("sum", y))), layer_type(("leak",))(leak)


Mixer = Sum
