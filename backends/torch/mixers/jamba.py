"""The mixer of Jamba's Mamba layers: that of Mamba-1 with an RMS norm, which has weights, on each of dt, B and C."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backend import LayerState
from mamba_core.backends.torch.blocks import RMSNorm
from mamba_core.backends.torch.kernels import native_mamba_step
from mamba_core.backends.torch.mixers import s6
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call


class JambaMixer(nn.Module):
    can_compute_last_only = s6.can_compute_last_only
    captures = s6.captures

    def __init__(self, config, layer: int, options):
        super().__init__()
        s6.add_parameters(self, config, options)
        self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(size, config.norm_eps) for size in self.sizes)

    def forward(self, hidden: Tensor, state: LayerState, call: Call) -> tuple[Tensor, LayerState]:
        xz = call.observe("in_proj", s6.project(self, "in_proj", hidden))
        if self._norms_as_built() and s6.is_fused(self, xz, call):
            norms = self.dt_norm, self.B_norm, self.C_norm
            y, state = s6.fused(self, xz, state, call, norms[0].eps, torch.cat([norm.weight for norm in norms]))
            return self.out_proj(y), state
        x, z = xz.chunk(2, dim=-1)
        y, state = self._mix(call.observe("x", x), call.observe("z", z), state, call)
        return call.observe("out_proj", s6.project(self, "out_proj", y)), state

    def last_position(self, hidden: Tensor, state: LayerState, call: Call) -> tuple[Tensor, LayerState]:
        """Like `forward`, but returns only the last position's output, (b, 1, d)."""
        x, z = s6.project_for_last(self, hidden)
        y, state = self._mix(x, None, state, call)
        return s6.project(self, "out_proj", y[:, -1:] * F.silu(z)), state

    def _mix(self, x, z, state, call):
        """The mixer between in_proj and out_proj; without the gate if z is None."""
        x, conv = s6.convolve(self, x, state.conv, call)
        selection = {"dt_norm": self.dt_norm, "B_norm": self.B_norm, "C_norm": self.C_norm}
        dt, B, C = (
            call.observe(name, _normed(norm, value))
            for (name, norm), value in zip(selection.items(), s6.select(self, x, call), strict=True)
        )
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state.ssm, call)
        return y, LayerState(conv, ssm)

    def cuda_step(self, norm):
        if not self._norms_as_built():
            return "a norm of dt, B or C was changed, or they have several eps"
        norms = self.dt_norm, self.B_norm, self.C_norm
        return s6.cuda_operands(self, norm, norms[0].eps, tuple(each.weight for each in norms))

    def _norms_as_built(self) -> bool:
        norms = self.dt_norm, self.B_norm, self.C_norm
        return untouched(RMSNorm, *norms) and len({norm.eps for norm in norms}) == 1

    def width(self) -> int | None:
        """As `s6.width`."""
        return s6.width(self) if untouched(RMSNorm, *self._norms()) else None

    def native_step(self) -> native_mamba_step.Operands | str:
        """For the way native_step, or why it cannot compute this mixer."""
        norms = self._norms()
        if not untouched(RMSNorm, *norms) or len({norm.eps for norm in norms}) > 1:
            return "a norm of dt, B or C was changed"
        if norms[0].eps <= 0:
            return "the norms of dt, B and C add no eps, which says to the library that there are none"
        return s6.native_operands(self, norms[0].eps, tuple(norm.weight for norm in norms))

    def _norms(self) -> tuple[nn.Module, ...]:
        return self.dt_norm, self.B_norm, self.C_norm


def _normed(norm: nn.Module, value: Tensor) -> Tensor:
    """By a norm that somebody put here, in the dtype of the value, which it need not return."""
    normed = norm(value)
    return normed if type(norm) is RMSNorm else normed.to(value.dtype)


Mixer = JambaMixer
