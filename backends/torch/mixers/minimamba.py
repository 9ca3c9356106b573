"""The mixer of MiniMamba: a gate without SiLU, and the bias of dt_proj added twice."""

from torch import Tensor, nn

from mamba_core.backend import LayerState
from mamba_core.backends.torch import layers
from mamba_core.backends.torch.mixers import s6


class MiniMambaMixer(nn.Module):
    can_compute_last_only = s6.can_compute_last_only
    width = s6.width
    captures = s6.captures

    def __init__(self, config, layer: int, options):
        super().__init__()
        s6.add_parameters(self, config, options)

    def forward(self, hidden: Tensor, state: LayerState, call) -> tuple[Tensor, LayerState]:
        x, z = call.observe("in_proj", s6.project(self, "in_proj", hidden)).chunk(2, dim=-1)
        x, z = call.observe("x", x), call.observe("z", z)
        y, state = self._mix(x, state, call)
        y = call.observe("gate", y * z)
        return call.observe("out_proj", s6.project(self, "out_proj", y)), state

    def last_position(self, hidden: Tensor, state: LayerState, call) -> tuple[Tensor, LayerState]:
        """Like `forward`, but returns only the last position's output, (b, 1, d)."""
        x, z = s6.project_for_last(self, hidden)
        y, state = self._mix(x, state, call)
        return s6.project(self, "out_proj", y[:, -1:] * z), state

    def _mix(self, x, state, call):
        """The mixer between in_proj and the gate."""
        x, conv = s6.convolve(self, x, state.conv, call)
        dt, B, C = s6.select(self, x, call)
        delta, bias = s6.step_sizes(self, dt, call)
        again = layers.bias(self.dt_proj, dt)
        bias = again if bias is None else bias + again
        y, ssm = s6.recur(self, x, delta, B, C, None, bias, state.ssm, call)
        return y, LayerState(conv, ssm)


Mixer = MiniMambaMixer
