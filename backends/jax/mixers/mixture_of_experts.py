"""A mixture of experts as a feed-forward: a router, and experts that each are a SwiGLU."""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax import layers
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.ops.mixture_of_experts import mix
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call


class Experts(nnx.Module):
    """All experts. gate_up_proj: (experts, 2 i, d), the gate's rows before the others. down_proj: (experts, d, i)."""

    def __init__(self, sizes, d_model: int, options):
        self.top_k, self.kernels = sizes.top_k, options.kernels
        self.gate_up_proj = nnx.Param(jnp.zeros((sizes.experts, 2 * sizes.width, d_model), options.dtype))
        self.down_proj = nnx.Param(jnp.zeros((sizes.experts, d_model, sizes.width), options.dtype))

    def __call__(self, hidden: jax.Array, logits: jax.Array, call: Call) -> jax.Array:
        """hidden (b, l, d), logits (b, l, experts) -> (b, l, d)."""
        weights = (self.gate_up_proj[...], self.down_proj[...])
        how = {"top_k": self.top_k, "kernel": self.kernels.of("mixture_of_experts")}
        return mix(call, hidden, logits, *weights, **how)


class MixtureOfExperts(nnx.Module):
    """hidden (b, l, d) -> (b, l, d)."""

    def __init__(self, config, layer: int, options):
        sizes = config.feed_forward(layer)
        of_layer = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
        self.router = nnx.Linear(config.d_model, sizes.experts, use_bias=False, rngs=options.rngs, **of_layer)
        self.experts = Experts(sizes, config.d_model, options)

    def __call__(self, hidden: jax.Array, call: Call) -> jax.Array:
        logits = call.observe("router", layers.linear(self.router, hidden))
        if call.routers is not None:
            call.routers.append(logits)
        return call.observe("experts", layers.in_dtype(hidden.dtype, self.experts(hidden, logits, call)))

    def width(self) -> int | None:
        """Elements of its widest array for each position, its outputs by each expert; None if a layer was changed.

        What is inside of the experts is computed for few positions at once anyway.
        """
        is_built = untouched(nnx.Linear, self.router) and untouched(Experts, self.experts)
        return self.experts.top_k * self.router.kernel.shape[0] if is_built else None


Mixer = MixtureOfExperts
