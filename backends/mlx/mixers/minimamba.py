"""The mixer of MiniMamba: Mamba-1's, but the bias of dt_proj is added twice and the gate is z without its SiLU."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import LayerState
from mamba_core.backends.mlx import layers
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.call import Call


class MiniMambaMixer(nn.Module):
    last_position = True
    width = s6.width

    def __init__(self, config, layer: int, options: Options):
        super().__init__()
        s6.add_parameters(self, config, layer, options)

    def __call__(self, hidden: mx.array, state: LayerState, call: Call) -> tuple[mx.array, LayerState]:
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        x, z = s6.project_in(self, hidden, call)
        x, conv = s6.convolve(self, x, state.conv, call)
        dt, B, C = s6.select(self, x, call)
        delta, bias = s6.step_sizes(self, dt, call)
        # The bias once more: a layer that is called has added it to delta.
        bias = layers.bias(self.dt_proj, dt) if bias is None else 2 * bias
        y, ssm = s6.recur(self, x, delta, B, C, None, bias, state.ssm, call)
        y = call.observe("gate", s6.at_positions_of(z, y) * z)
        return s6.project_out(self, y, call), LayerState(conv, ssm)


Mixer = MiniMambaMixer
