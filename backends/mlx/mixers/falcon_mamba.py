"""FalconMamba's mixer: Mamba-1's, with RMS norms without weight of dt, B and C."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import LayerState
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.call import Call


class FalconMambaMixer(nn.Module):
    last_position = True
    width = s6.width

    def __init__(self, config, layer: int, options: Options):
        super().__init__()
        s6.add_parameters(self, config, layer, options)
        self.eps = config.mixer_rms_eps

    def __call__(self, hidden: mx.array, state: LayerState, call: Call) -> tuple[mx.array, LayerState]:
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        x, z = s6.project_in(self, hidden, call)
        x, conv = s6.convolve(self, x, state.conv, call)
        dt, B, C = s6.norm_selection(self, *s6.select(self, x, call), self.eps, call)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state.ssm, call)
        return s6.project_out(self, y, call), LayerState(conv, ssm)


Mixer = FalconMambaMixer
