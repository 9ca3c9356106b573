"""A feed-forward: down(silu(gate) * up), gate and up of one projection."""

import jax
from flax import nnx

from mamba_core.backends.jax import layers
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.ops.mixture_of_experts import swiglu
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call


class SwiGLU(nnx.Module):
    """hidden (b, l, d) -> (b, l, d)."""

    def __init__(self, config, layer: int, options):
        of_layers = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
        of_layers |= {"rngs": options.rngs, "use_bias": False}
        self.kernels = options.kernels
        width = config.feed_forward(layer).width
        self.gate_up_proj = nnx.Linear(config.d_model, 2 * width, **of_layers)
        self.down_proj = nnx.Linear(width, config.d_model, **of_layers)

    def __call__(self, hidden: jax.Array, call: Call) -> jax.Array:
        both = call.observe("gate_up_proj", layers.linear(self.gate_up_proj, hidden, self.kernels))
        active = call.observe("active", swiglu(both))
        return call.observe("down_proj", layers.linear(self.down_proj, active, self.kernels))

    def width(self) -> int | None:
        """Elements of its widest array, gate and up, for each position; None if a layer was replaced or changed."""
        is_built = untouched(nnx.Linear, self.gate_up_proj, self.down_proj)
        return self.gate_up_proj.kernel.shape[1] if is_built else None


Mixer = SwiGLU
