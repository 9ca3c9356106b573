"""A feed-forward: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx import layers
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.backends.mlx.ops.mixture_of_experts import swiglu
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call


class SwiGLU(nn.Module):
    def __init__(self, config, layer: int, options: Options):
        super().__init__()
        size = config.feed_forward(layer).width
        self.kernels = options.kernels
        self.inner = size
        self.gate_up_proj = nn.Linear(config.d_model, 2 * size, bias=False)
        self.down_proj = nn.Linear(size, config.d_model, bias=False)

    def __call__(self, hidden: mx.array, call: Call) -> mx.array:
        """hidden (b, l, d) -> (b, l, d)."""
        kernel = self.kernels.of("linear")
        projected = call.observe("gate_up_proj", layers.linear(self.gate_up_proj, hidden, kernel))
        active = call.observe("active", swiglu(projected))
        return call.observe("down_proj", layers.linear(self.down_proj, active, kernel))

    def width(self) -> int | None:
        """Elements of its widest array for each position; None if a layer was replaced."""
        known = all(any(untouched(kind, layer) for kind in s6.LINEAR) for layer in (self.gate_up_proj, self.down_proj))
        return 2 * self.inner if known else None


Mixer = SwiGLU
