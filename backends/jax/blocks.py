"""The norm and the residual block, as `flax.nnx` modules with flax's own parameter names."""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax.layers import in_dtype
from mamba_core.backends.jax.mixers import Options, mixer_class
from mamba_core.backends.jax.ops.rms_norm import rms_norm
from mamba_core.call import Call


class RMSNorm(nnx.Module):
    """The norm in float32, returned in `dtype`; `nnx.RMSNorm` would first round x to it."""

    weight_leaf = "scale"

    def __init__(self, size: int, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps, self.dtype)


class Block(nnx.Module):
    """residual + mixer(norm(residual)), and with a feed-forward then residual + feed_forward(norm2(residual))."""

    def __init__(self, config, layer: int, mixer: str, feed_forward: str | None, options: Options):
        def part(kind):
            return mixer_class(kind)(config, layer, options)

        def norm():
            return RMSNorm(config.d_model, config.norm_eps, options.dtype)

        self.dtype = options.dtype
        self.norm, self.mixer = norm(), part(mixer)
        self.norm2, self.feed_forward = (None, None) if feed_forward is None else (norm(), part(feed_forward))

    def __call__(self, residual: jax.Array, state, call: Call):
        hidden, state = self.mixer(call.observe("norm", self.normed(self.norm, residual)), state, call)
        if self.feed_forward is None:
            return call.observe("residual", residual + hidden), state
        residual = call.observe("mixed", residual + hidden)
        hidden = self.feed_forward(call.observe("norm2", self.normed(self.norm2, residual)), call)
        return call.observe("residual", residual + hidden), state

    def normed(self, norm, residual: jax.Array) -> jax.Array:
        """The residual stream after a norm, in the compute dtype, which a norm of others need not give."""
        return in_dtype(self.dtype, norm(residual))
