"""Attention as a mixer: q, k and v of one projection, where asked for through a short convolution."""

import jax
from flax import nnx

from mamba_core.backends.jax import layers
from mamba_core.backends.jax.ops.attention import attend
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.call import Call


class AttentionMixer(nnx.Module):
    """hidden (b, l, d) -> (b, l, d), and the keys and values after the last position."""

    def __init__(self, config, layer: int, options):
        self.kernels, self.sizes = options.kernels, config.attention(layer)
        of_layers = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
        of_layers |= {"rngs": options.rngs}
        width, wide = self.sizes.projected, self.sizes.heads * self.sizes.head_dim
        self.in_proj = nnx.Linear(config.d_model, width, use_bias=self.sizes.bias, **of_layers)
        filters = {"padding": "CAUSAL", "feature_group_count": width}
        self.conv1d = nnx.Conv(width, width, self.sizes.d_conv, **filters, **of_layers) if self.sizes.d_conv else None
        self.out_proj = nnx.Linear(wide, config.d_model, use_bias=self.sizes.out_bias, **of_layers)

    def __call__(self, hidden: jax.Array, state, call: Call):
        qkv = call.observe("in_proj", layers.linear(self.in_proj, hidden, self.kernels))
        if self.conv1d is not None:
            kernel = self.kernels.of("causal_conv")
            qkv, conv = layers.convolution(self.conv1d, qkv, state.conv, call, kernel, "mixer.conv1d", activation=None)
            qkv, state = call.observe("conv", qkv), state._replace(conv=conv)
        y, state = self._attend(*self._parts(qkv, call), state, call)
        return call.observe("out_proj", layers.linear(self.out_proj, y, self.kernels)), state

    def _parts(self, qkv, call):
        """q, k and v, (b, l, heads, p) each."""
        at = 0
        for name, size in self.sizes.parts:
            part = call.observe(name, qkv[..., at : at + size])
            yield part.reshape(*part.shape[:2], size // self.sizes.head_dim, self.sizes.head_dim)
            at += size

    def _attend(self, q, k, v, state, call):
        """(y (b, l, h p), the state after it)."""
        cache = (state.keys, state.values, state.filled)
        how = {"scale": self.sizes.scale, "rotary": self.sizes.rotary, "kernel": self.kernels.of("attention")}
        y, cache = attend(call, q, k, v, cache, **how)
        y = y.reshape(*y.shape[:2], self.sizes.heads * self.sizes.head_dim)
        return call.observe("attention", y), state._replace(**cache._asdict())


Mixer = AttentionMixer
