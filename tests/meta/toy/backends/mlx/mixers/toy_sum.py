"""A leaky sum between two projections."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core import discovery
from mamba_core.spec.state import layer_type

ops = discovery.find("backends.mlx.ops", "leaky_sum")


class Sum(nn.Module):
    def __init__(self, config, layer, options):
        super().__init__()
        self.in_proj = nn.Linear(config.d_model, config.d_inner, bias=False)
        self.decay = mx.zeros((config.d_inner,))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def __call__(self, hidden, state, call):
        x = call.observe("in_proj", self.in_proj(hidden))
        y, leak = ops.sum_over(call, x, self.decay, state.leak)
        return call.observe("out_proj", self.out_proj(call.observe("sum", y))), layer_type(("leak",))(leak)


Mixer = Sum
