"""The mixer of Mamba-1 (Gu and Dao 2023, figure 3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backend import LayerState
from mamba_core.backends.torch.mixers import s6


class MambaMixer(nn.Module):
    native_step = s6.native_operands
    cuda_step = s6.cuda_operands
    can_compute_last_only = s6.can_compute_last_only
    width = s6.width
    captures = s6.captures

    def __init__(self, config, layer: int, options):
        super().__init__()
        s6.add_parameters(self, config, options)

    def forward(self, hidden: Tensor, state: LayerState, call) -> tuple[Tensor, LayerState]:
        xz = call.observe("in_proj", s6.project(self, "in_proj", hidden))
        if s6.is_fused(self, xz, call):
            y, state = s6.fused(self, xz, state, call)
            return self.out_proj(y), state
        x, z = xz.chunk(2, dim=-1)
        y, state = self._mix(call.observe("x", x), call.observe("z", z), state, call)
        return call.observe("out_proj", s6.project(self, "out_proj", y)), state

    def last_position(self, hidden: Tensor, state: LayerState, call) -> tuple[Tensor, LayerState]:
        """Like `forward`, but returns only the last position's output, (b, 1, d)."""
        x, z = s6.project_for_last(self, hidden)
        y, state = self._mix(x, None, state, call)
        return s6.project(self, "out_proj", y[:, -1:] * F.silu(z)), state

    def _mix(self, x, z, state, call):
        """The mixer between in_proj and out_proj; without the gate if z is None."""
        x, conv = s6.convolve(self, x, state.conv, call)
        dt, B, C = s6.select(self, x, call)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state.ssm, call)
        return y, LayerState(conv, ssm)


Mixer = MambaMixer
