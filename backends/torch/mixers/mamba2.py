"""The mixer of Mamba-2 (Dao and Gu 2024, figure 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backend import LayerState
from mamba_core.backends.torch import layers
from mamba_core.backends.torch.kernels import native_ssd_step, triton_ssd_step
from mamba_core.backends.torch.mixers import s6
from mamba_core.backends.torch.ops import gated_norm, ssd
from mamba_core.backends.torch.quantization import stored_weight
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call
from mamba_core.kernels import Kernels, choose


class GatedRMSNorm(nn.Module):
    """The norm of groups of channels, with the gate before or after it, in float32 and the dtype of the weight."""

    def __init__(self, size: int, groups: int, eps: float, norm_before_gate: bool, kernels: Kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.groups, self.eps, self.norm_before_gate, self.kernels = groups, eps, norm_before_gate, kernels

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        settings = self.groups, self.eps, self.norm_before_gate
        return gated_norm.gated_norm(y, z, self.weight, *settings, self.kernels.of("gated_norm"))


class Mamba2Mixer(nn.Module):
    def __init__(self, config, layer: int, options):
        super().__init__()
        e, h, filters, k = config.d_scanned, config.nheads, config.conv_dim, config.d_conv
        of_groups = config.ngroups * config.d_state
        self.kernels = options.kernels
        self.groups, self.headdim, self.dt_limit = config.ngroups, config.headdim, config.dt_limit
        self.sizes = (config.d_gated, config.d_gated, e, filters, h)
        self.conv_sizes = (e, of_groups, of_groups)
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=config.bias)
        self.conv1d = nn.Conv1d(filters, filters, k, groups=filters, padding=k - 1, bias=config.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(e if config.D_has_hdim else h))
        of_norm = (e, config.ngroups, config.norm_eps, config.norm_before_gate, options.kernels)
        self.norm = GatedRMSNorm(*of_norm) if config.rmsnorm else None
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=config.bias)

    def forward(self, hidden: Tensor, state: LayerState, call: Call) -> tuple[Tensor, LayerState]:
        projected = call.observe("in_proj", s6.project(self, "in_proj", hidden))
        gate, gated, z, xBC, dt = projected.split(self.sizes, dim=-1)
        if self.sizes[0]:
            gate, gated = call.observe("gate", gate), call.observe("gated", gated)
        z, xBC, dt = (call.observe(name, value) for name, value in {"z": z, "xBC": xBC, "dt": dt}.items())
        y, state = self._mix(xBC, dt, None if self.norm is not None else z, state, call)
        if self.norm is not None:
            y = call.observe("gated_norm", self.norm(y, z).to(y.dtype))
        return self._project_out(y, gate, gated, call), state

    def can_compute_last_only(self, hidden: Tensor) -> bool:
        return s6.can_compute_last_only(self, hidden) and self._is_built_inside()

    def last_position(self, hidden: Tensor, state: LayerState, call: Call) -> tuple[Tensor, LayerState]:
        """Like `forward`, but returns only the last position's output, (b, 1, d)."""
        gates = sum(self.sizes[:3])
        gate, gated, z = s6.project_rows(self, hidden[:, -1:], slice(gates)).split(self.sizes[:3], dim=-1)
        xBC, dt = s6.project_rows(self, hidden, slice(gates, None)).split(self.sizes[3:], dim=-1)
        y, state = self._mix(xBC, dt, None, state, call)
        y = y[:, -1:] * F.silu(z) if self.norm is None else self.norm(y[:, -1:], z)
        return self._project_out(y, gate, gated, call), state

    def _mix(self, xBC, dt, z, state, call):
        """The convolution and the recurrence; without the gate if z is None."""
        mixed, conv = s6.convolve(self, xBC, state.conv, call)
        named = zip(("x", "B", "C"), mixed.split(self.conv_sizes, dim=-1), strict=True)
        x, B, C = (call.observe(name, value) for name, value in named)
        y, ssm = self._recur(x, dt, B, C, z, state.ssm, call)
        return y, LayerState(conv, ssm)

    def _recur(self, x, dt, B, C, z, state, call):
        """The recurrence, (b, l, e), with its gate if z is there, and its state."""
        x, z = (None if value is None else value.unflatten(-1, (dt.shape[-1], self.headdim)) for value in (x, z))
        B, C = (value.unflatten(-1, (self.groups, value.shape[-1] // self.groups)) for value in (B, C))
        A, D = -torch.exp(self.A_log), self.D
        D = D if D is None or len(D) == len(A) else D.unflatten(0, (-1, self.headdim))
        options = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}
        if call.one:
            one = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
            y, state = ssd.ssd_step(*one, z=None if z is None else z[:, 0], **options, state=state)
            return call.observe("ssd", y[:, None].flatten(2)), state
        options |= {"initial_state": state, "kernel": self.kernels.of("ssd")}
        y, state = ssd.recur(call, x, dt, A, B, C, D, z=z, **options)
        return call.observe("ssd", y.flatten(2)), state

    def _project_out(self, y, gate, gated, call):
        """The output (b, l, d), of y and of the channels beside it."""
        if self.sizes[0]:
            beside = call.observe("beside", call.observe("gate_silu", F.silu(gate)) * gated)
            y = call.observe("joined", torch.cat((beside, y), dim=-1))
        return call.observe("out_proj", s6.project(self, "out_proj", y))

    def width(self) -> int | None:
        """Elements of its widest array, in_proj's output, for each position; None if a layer was changed."""
        built = s6.is_ours(self.in_proj) and s6.is_ours(self.out_proj)
        return sum(self.sizes) if built and self._is_built_inside() else None

    def captures(self) -> bool:
        """Whether a training step may be captured: not with the plain kernel, which takes position after position."""
        weight = self.conv1d.weight
        kernels = ssd.kernels(weight.device, weight.dtype)
        return choose(self.kernels.of("ssd"), kernels, "ssd", "torch", weight.device) != choose("plain", kernels)

    def native_step(self) -> native_ssd_step.Operands | str:
        """For the way native_step, or why it cannot compute this mixer."""
        in_proj, conv, out_proj, norm = self.in_proj, self.conv1d, self.out_proj, self.norm
        if not (untouched(nn.Linear, in_proj, out_proj) and self._is_built_inside()):
            return "a layer of the mixer was changed"
        if (why := self._not_read()) is not None:
            return why
        gated = (None, 0.0, False) if norm is None else (norm.weight, norm.eps, norm.norm_before_gate)
        return native_ssd_step.Operands(
            *(in_proj.weight, in_proj.bias, conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, gated[0]),
            *(out_proj.weight, out_proj.bias, self.headdim, self.groups, self.dt_limit, *gated[1:]),
        )

    def cuda_step(self, norm: nn.Module) -> triton_ssd_step.Layer | str:
        """For the way cuda_step, with the norm before the mixer, or why it cannot compute this mixer."""
        in_proj, conv, out_proj, gated = self.in_proj, self.conv1d, self.out_proj, self.norm
        if not (s6.is_ours(in_proj) and s6.is_ours(out_proj) and self._is_built_inside()):
            return "a layer of the mixer was changed"
        if (why := self._not_read()) is not None:
            return why
        layer = triton_ssd_step.Layer(
            *(norm.weight, norm.eps, stored_weight(in_proj), in_proj.bias, conv.weight[:, 0], conv.bias),
            *(self.dt_bias, self.A_log, self.D, None if gated is None else gated.weight),
            *(stored_weight(out_proj), out_proj.bias, self.headdim, self.groups, self.dt_limit),
            *((0.0, False) if gated is None else (gated.eps, gated.norm_before_gate)),
        )
        return layer if (why := layer.reason()) is None else why

    def _not_read(self) -> str | None:
        """Why no kernel of a whole block reads this mixer's parameters and settings; None if one may."""
        norm = self.norm
        if norm is not None and (norm.groups != self.groups or norm.weight is None):
            return "its norm has no weight, or other groups than its recurrence"
        if self.dt_bias is None or self.A_log is None or self.D is None:
            return "dt_bias, A_log or D was removed"
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            return f"dt_limit is {self.dt_limit}"
        return None

    def _is_built_inside(self) -> bool:
        """Whether the layers between in_proj and out_proj are as they were built."""
        return layers.is_convolution(self.conv1d) and (self.norm is None or untouched(GatedRMSNorm, self.norm))


Mixer = Mamba2Mixer
