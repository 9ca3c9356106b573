"""Jamba's mixer (Lieber et al. 2024, section 3): Mamba-1's, with RMS norms of dt, B and C that have weights."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import LayerState
from mamba_core.backends.mlx.blocks import RMSNorm
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call


class JambaMixer(nn.Module):
    last_position = True

    def __init__(self, config, layer: int, options: Options):
        super().__init__()
        s6.add_parameters(self, config, layer, options)
        self.dt_norm = RMSNorm(config.dt_rank_size, config.norm_eps, options)
        self.B_norm = RMSNorm(config.d_state, config.norm_eps, options)
        self.C_norm = RMSNorm(config.d_state, config.norm_eps, options)

    def __call__(self, hidden: mx.array, state: LayerState, call: Call) -> tuple[mx.array, LayerState]:
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        x, z = s6.project_in(self, hidden, call)
        x, conv = s6.convolve(self, x, state.conv, call)
        dt, B, C = s6.select(self, x, call)
        dt, B, C = (
            call.observe(name, self[name](value)) for name, value in {"dt_norm": dt, "B_norm": B, "C_norm": C}.items()
        )
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state.ssm, call)
        return s6.project_out(self, y, call), LayerState(conv, ssm)

    def width(self) -> int | None:
        """As `s6.width`; another norm may look along the sequence."""
        return s6.width(self) if untouched(RMSNorm, self.dt_norm, self.B_norm, self.C_norm) else None


Mixer = JambaMixer
