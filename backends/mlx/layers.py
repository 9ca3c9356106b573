"""The norm, the Mamba-1 mixer and the residual block, as `mlx.nn` modules with the canonical parameter names."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import LayerState
from mamba_core.backends.mlx.conv import causal_conv, causal_conv_step
from mamba_core.backends.mlx.kernels import linear
from mamba_core.backends.mlx.scan import selective_scan, selective_step
from mamba_core.observe import unobserved


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight in float32, returned in the dtype of the weight."""

    def __call__(self, x: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(x.astype(mx.float32), self.weight.astype(mx.float32), self.eps)
        return normed.astype(self.weight.dtype)


class StepProjection(nn.Module):
    """dt_proj without its bias, which the scan adds.

    Not an `nn.Linear`, so that `nn.quantize` leaves it alone: its rank is small and seldom a multiple of a group.
    """

    def __init__(self, rank: int, channels: int, kernels: str):
        super().__init__()
        self.kernels = kernels
        self.weight = mx.zeros((channels, rank))
        self.bias = mx.zeros((channels,))

    def __call__(self, dt: mx.array) -> mx.array:
        return linear.linear(dt, self.weight, self.kernels)


class MambaMixer(nn.Module):
    """The mixer of Mamba-1 (Gu and Dao 2023, figure 3)."""

    def __init__(self, config, kernels: str):
        super().__init__()
        d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
        self.dt_rank = r
        self.d_state = n
        self.kernels = kernels
        self.minimamba = config.compat == "minimamba"
        self.in_proj = nn.Linear(d, 2 * e, bias=config.bias)
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = StepProjection(r, e, kernels)
        self.A_log = mx.zeros((e, n))
        self.D = mx.ones((e,))
        self.out_proj = nn.Linear(e, d, bias=config.bias)

    def __call__(self, hidden: mx.array, state: LayerState, mask, segment_ids, observe) -> tuple[mx.array, LayerState]:
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        xz = observe("in_proj", linear.call(self.in_proj, hidden, self.kernels))
        x, z = mx.split(xz, 2, axis=-1)
        x, z = observe("x", x), observe("z", z)
        y, state = self._mix(x, None if self.minimamba else z, state, mask, segment_ids, observe)
        if self.minimamba:
            y = observe("gate", y * z)
        return observe("out_proj", linear.call(self.out_proj, y, self.kernels)), state

    def last(self, hidden: mx.array, state: LayerState, mask, segment_ids) -> tuple[mx.array, LayerState]:
        """What a call gives at the last position, (b, 1, d), and the state: of the gates no others are computed."""
        (to_x, to_z), bias = mx.split(self.in_proj.weight, 2), self.in_proj.get("bias")
        x = linear.linear(hidden, to_x, self.kernels)
        z = linear.linear(hidden[:, -1:], to_z, self.kernels)
        if bias is not None:
            for_x, for_z = mx.split(bias, 2)
            x, z = x + for_x, z + for_z
        y, state = self._mix(x, None, state, mask, segment_ids, unobserved)
        y = y[:, -1:] * (z if self.minimamba else nn.silu(z))
        return linear.call(self.out_proj, y, self.kernels), state

    def gives_last(self, hidden: mx.array) -> bool:
        """Whether `last` computes what a call would; in bfloat16 it would round before the gate."""
        ours = type(self) is MambaMixer and type(self.in_proj) is nn.Linear
        return ours and hidden.shape[1] > 1 and hidden.dtype == mx.float32

    def _mix(self, x, z, state, mask, segment_ids, observe):
        """What is between in_proj and out_proj, but the gate where z is None; (b, l, e) and the state."""
        one = x.shape[1] == 1 and mask is None
        x, conv = self._conv_one(x, state) if one else self._conv(x, state, mask, segment_ids)
        dtbc = observe("x_proj", linear.call(self.x_proj, observe("conv", x), self.kernels))
        dt, B, C = mx.split(dtbc, [self.dt_rank, self.dt_rank + self.d_state], axis=-1)
        dt, B, C = observe("dt", dt), observe("B", B), observe("C", C)
        # The bias of dt_proj enters in float32 inside the scan, before the softplus.
        delta = observe("dt_proj", self.dt_proj(dt))
        scan = (x, delta, B, C, z)
        y, ssm = self._scan_one(*scan, state) if one else self._scan(*scan, state, mask, segment_ids)
        return observe("scan", y), LayerState(conv, ssm)

    def _conv(self, x, state, mask, segment_ids):
        return causal_conv(
            x,
            self.conv1d.weight[..., 0],
            self.conv1d.get("bias"),
            activation="silu",
            initial_state=state.conv,
            return_final_state=True,
            mask=mask,
            segment_ids=segment_ids,
            kernel=self.kernels,
        )

    def _conv_one(self, x, state):
        weight, bias = self.conv1d.weight[..., 0], self.conv1d.get("bias")
        y, conv = causal_conv_step(x[:, 0], weight, bias, activation="silu", state=state.conv)
        return y[:, None], conv

    def _scan(self, x, delta, B, C, z, state, mask, segment_ids):
        return selective_scan(
            x,
            delta,
            -mx.exp(self.A_log),
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
            -mx.exp(self.A_log),
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

    def __call__(
        self, residual: mx.array, state: LayerState, mask, segment_ids, observe
    ) -> tuple[mx.array, LayerState]:
        hidden, state = self.mixer(observe("norm", self.norm(residual)), state, mask, segment_ids, observe)
        return observe("residual", residual + hidden), state

    def last(self, residual: mx.array, state: LayerState, mask, segment_ids, observe) -> tuple[mx.array, LayerState]:
        """As a call, but where that is less to compute the residual stream of the last position only, (b, 1, d)."""
        normed = self.norm(residual)
        if not (observe is unobserved and self.mixer.gives_last(normed)):
            return self(residual, state, mask, segment_ids, observe)
        hidden, state = self.mixer.last(normed, state, mask, segment_ids)
        return residual[:, -1:] + hidden, state


MIXERS = {"mamba": MambaMixer, "minimamba": MambaMixer}
