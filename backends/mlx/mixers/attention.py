"""Attention of grouped heads with a cache (Vaswani et al. 2017, section 3.2), where asked for behind a convolution."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx import layers
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.backends.mlx.ops import attention
from mamba_core.call import Call
from mamba_core.spec.ops.attention import KeyValueCache


class AttentionMixer(nn.Module):
    def __init__(self, config, layer: int, options: Options):
        super().__init__()
        sizes = config.attention(layer)
        wide, rows = sizes.heads * sizes.head_dim, sizes.projected
        self.layer = layer
        self.kernels = options.kernels
        self.sizes = sizes
        self.in_proj = nn.Linear(config.d_model, rows, bias=sizes.bias)
        if sizes.d_conv:
            self.conv1d = nn.Conv1d(rows, rows, sizes.d_conv, groups=rows, padding=sizes.d_conv - 1)
        self.out_proj = nn.Linear(wide, config.d_model, bias=sizes.out_bias)

    def __call__(self, hidden: mx.array, state: tuple, call: Call) -> tuple[mx.array, tuple]:
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        linear, after = self.kernels.of("linear"), {}
        projected = call.observe("in_proj", layers.linear(self.in_proj, hidden, linear))
        if self.sizes.d_conv:
            projected, after["conv"] = s6.convolve(self, projected, state.conv, call, activation=None)
        cache = KeyValueCache(state.keys, state.values, state.filled)
        how = {"scale": self.sizes.scale, "rotary": self.sizes.rotary, "kernel": self.kernels.of("attention")}
        y, cache = attention.attend(call, *self._heads(projected, call), cache, **how)
        y = call.observe("attention", y.reshape(*y.shape[:2], self.sizes.parts[0][1]))
        return s6.project_out(self, y, call), state._replace(**after, **cache._asdict())

    def _heads(self, projected, call):
        """q (b, l, h, p), k and v (b, l, g, p)."""
        size, at, found = self.sizes.head_dim, 0, []
        for name, width in self.sizes.parts:
            value = call.observe(name, projected[..., at : at + width])
            found.append(value.reshape(*value.shape[:2], width // size, size))
            at += width
        return found


Mixer = AttentionMixer
