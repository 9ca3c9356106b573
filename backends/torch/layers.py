"""The norm, the Mamba-1 mixer and the residual block, as `torch.nn` modules with the canonical parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backend import LayerState
from mamba_core.backends.torch.conv import causal_conv, causal_conv_step
from mamba_core.backends.torch.kernels import fused_conv, fused_mixer, fused_norm, linear, native_norm
from mamba_core.backends.torch.kernels.fused import linear_dtype
from mamba_core.backends.torch.kernels.operator import KINDS
from mamba_core.backends.torch.kernels.step import as_built
from mamba_core.backends.torch.positions import restarts
from mamba_core.backends.torch.scan import kernel_for, selective_scan, selective_step
from mamba_core.observe import unobserved

# Scan kernels with which the kernels in Triton are used too, where they run: on a GPU, or interpreted on a CPU.
FUSING = ("cuda", "native")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32, returned in the dtype of the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * scale * self.weight.float()).to(self.weight.dtype)

    def fuses(self, residual: Tensor, kernels: str) -> bool:
        """Whether `add` computes here what the norm does of such a residual stream."""
        if not as_built(RMSNorm, self):
            return False
        return native_norm.runs(kernels, residual, self.weight) or (
            fused_norm.reason(residual.device, residual.dtype, len(self.weight)) is None
            and kernel_for(kernels, residual.device, self.weight.dtype) in FUSING
        )

    def add(self, residual: Tensor, hidden: Tensor | None, kernels: str) -> tuple[Tensor, Tensor]:
        """The norm of residual + hidden, in the dtype in which a linear is computed, and that sum."""
        if native_norm.runs(kernels, residual, self.weight):
            return native_norm.add_norm(residual, hidden, self.weight, self.eps)
        return fused_norm.add_norm(residual, hidden, self.weight, self.eps, linear_dtype(self.weight))


class MambaMixer(nn.Module):
    """The mixer of Mamba-1 (Gu and Dao 2023, figure 3)."""

    def __init__(self, config, kernels: str):
        super().__init__()
        d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
        self.sizes = (r, n, n)
        self.kernels = kernels
        self.minimamba = config.compat == "minimamba"
        self.in_proj = nn.Linear(d, 2 * e, bias=config.bias)
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e)
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = nn.Linear(e, d, bias=config.bias)

    def forward(self, hidden: Tensor, state: LayerState, mask, segment_ids, observe) -> tuple[Tensor, LayerState]:
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        xz = observe("in_proj", linear.call(self.in_proj, hidden, self.kernels))
        if mask is None and observe is unobserved and self._fuses(xz):
            y, conv, ssm = self._inner(xz, state, restarts(mask, segment_ids))
            return self.out_proj(y), LayerState(conv, ssm)
        x, z = xz.chunk(2, dim=-1)
        x, z = observe("x", x), observe("z", z)
        y, state = self._mix(x, None if self.minimamba else z, state, mask, segment_ids, observe)
        if self.minimamba:
            y = observe("gate", y * z)
        return observe("out_proj", linear.call(self.out_proj, y, self.kernels)), state

    def last(self, hidden: Tensor, state: LayerState, mask, segment_ids) -> tuple[Tensor, LayerState]:
        """What `forward` gives at the last position, (b, 1, d), and the state: of the gates no others are computed."""
        (to_x, to_z), bias = self.in_proj.weight.chunk(2), self.in_proj.bias
        for_x, for_z = (None, None) if bias is None else bias.chunk(2)
        x = linear.linear(hidden, to_x, for_x, kernels=self.kernels)
        z = linear.linear(hidden[:, -1:], to_z, for_z, kernels=self.kernels)
        y, state = self._mix(x, None, state, mask, segment_ids, unobserved)
        y = y[:, -1:] * (z if self.minimamba else F.silu(z))
        return linear.call(self.out_proj, y, self.kernels), state

    def gives_last(self, hidden: Tensor) -> bool:
        """Whether `last` computes here what `forward` would; in bfloat16 it would round before the gate."""
        return (
            hidden.shape[1] > 1
            and hidden.is_cpu
            and hidden.dtype is torch.float32
            and as_built(MambaMixer, self)
            and as_built(nn.Linear, self.in_proj, self.out_proj)
            and type(self.in_proj.weight) in KINDS
        )

    def _mix(self, x, z, state, mask, segment_ids, observe):
        """What is between in_proj and out_proj, but the gate where z is None; (b, l, e) and the state."""
        one = x.shape[1] == 1 and mask is None
        x, conv = self._conv_one(x, state) if one else self._conv(x, state, mask, segment_ids)
        dtbc = observe("x_proj", linear.call(self.x_proj, observe("conv", x), self.kernels))
        dt, B, C = dtbc.split(self.sizes, dim=-1)
        dt, B, C = observe("dt", dt), observe("B", B), observe("C", C)
        # The bias of dt_proj enters in float32 inside the scan, before the softplus.
        delta = observe("dt_proj", linear.linear(dt, self.dt_proj.weight, kernels=self.kernels))
        scan = (x, delta, B, C, z)
        y, ssm = self._scan_one(*scan, state) if one else self._scan(*scan, state, mask, segment_ids)
        return observe("scan", y), LayerState(conv, ssm)

    def _fuses(self, xz) -> bool:
        """Whether one operator computes here what is between in_proj and out_proj."""
        if self.minimamba or fused_conv.reason(xz.device, xz.dtype, self.conv1d.weight.shape[-1]) is not None:
            return False
        return (
            kernel_for(self.kernels, xz.device, xz.dtype, self.A_log.shape[1]) in FUSING
            and as_built(nn.Linear, self.x_proj, self.dt_proj)
            and as_built(nn.Conv1d, self.conv1d)
        )

    def _inner(self, xz, state, restart):
        return fused_mixer.inner(
            xz,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            -torch.exp(self.A_log),
            self.D,
            state.conv,
            state.ssm,
            restart,
        )

    def _conv(self, x, state, mask, segment_ids):
        return causal_conv(
            x,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            activation="silu",
            initial_state=state.conv,
            return_final_state=True,
            mask=mask,
            segment_ids=segment_ids,
            kernel=self.kernels,
        )

    def _conv_one(self, x, state):
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        y, conv = causal_conv_step(x[:, 0], weight, bias, activation="silu", state=state.conv)
        return y[:, None], conv

    def _scan(self, x, delta, B, C, z, state, mask, segment_ids):
        return selective_scan(
            x,
            delta,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z=z,
            delta_bias=self._delta_bias(),
            delta_softplus=True,
            initial_state=state.ssm,
            return_final_state=True,
            mask=mask,
            segment_ids=segment_ids,
            kernel=self.kernels,
        )

    def _scan_one(self, x, delta, B, C, z, state):
        y, ssm = selective_step(
            x[:, 0],
            delta[:, 0],
            -torch.exp(self.A_log),
            B[:, 0],
            C[:, 0],
            self.D,
            z=None if z is None else z[:, 0],
            delta_bias=self._delta_bias(),
            delta_softplus=True,
            state=state.ssm,
        )
        return y[:, None], ssm

    def _delta_bias(self):
        """MiniMamba adds it twice."""
        return 2 * self.dt_proj.bias if self.minimamba else self.dt_proj.bias


class Block(nn.Module):
    """residual + mixer(norm(residual))."""

    def __init__(self, config, kernels: str):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[config.architecture](config, kernels)

    def forward(self, residual: Tensor, state: LayerState, mask, segment_ids, observe) -> tuple[Tensor, LayerState]:
        hidden, state = self.mixer(observe("norm", self.norm(residual)), state, mask, segment_ids, observe)
        return observe("residual", residual + hidden), state

    def fuses(self, residual: Tensor) -> bool:
        """Whether `add` computes here what the block does, beginning with such a residual stream."""
        return as_built(Block, self) and self.norm.fuses(residual, self.mixer.kernels)

    def add(self, residual: Tensor, hidden: Tensor | None, state: LayerState, mask, segment_ids, last: bool = False):
        """The block after residual + hidden: that sum, what is to be added to it next, and the state.

        last: where that is less to compute, the first two are of the last position only, (b, 1, d).
        """
        normed, residual = self.norm.add(residual, hidden, self.mixer.kernels)
        if last and self.mixer.gives_last(normed):
            hidden, state = self.mixer.last(normed, state, mask, segment_ids)
            return residual[:, -1:], hidden, state
        hidden, state = self.mixer(normed, state, mask, segment_ids, unobserved)
        return residual, hidden, state


MIXERS = {"mamba": MambaMixer, "minimamba": MambaMixer}
