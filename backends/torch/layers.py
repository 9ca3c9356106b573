"""The norm, the Mamba-1 mixer and the residual block, as `torch.nn` modules with the canonical parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backend import LayerState
from mamba_core.backends.torch.conv import causal_conv, causal_conv_step
from mamba_core.backends.torch.scan import selective_scan, selective_step


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
        xz = observe("in_proj", self.in_proj(hidden))
        x, z = xz.chunk(2, dim=-1)
        x, z = observe("x", x), observe("z", z)
        one = hidden.shape[1] == 1 and mask is None
        x, conv = self._conv_one(x, state) if one else self._conv(x, state, mask, segment_ids)
        dtbc = observe("x_proj", self.x_proj(observe("conv", x)))
        dt, B, C = dtbc.split(self.sizes, dim=-1)
        dt, B, C = observe("dt", dt), observe("B", B), observe("C", C)
        # The bias of dt_proj enters in float32 inside the scan, before the softplus.
        delta = observe("dt_proj", F.linear(dt, self.dt_proj.weight))
        scan = (x, delta, B, C, None if self.minimamba else z)
        y, ssm = self._scan_one(*scan, state) if one else self._scan(*scan, state, mask, segment_ids)
        y = observe("scan", y)
        if self.minimamba:
            y = observe("gate", y * z)
        return observe("out_proj", self.out_proj(y)), LayerState(conv, ssm)

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


MIXERS = {"mamba": MambaMixer}
