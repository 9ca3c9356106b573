"""The mixer of Mamba-2 (Dao and Gu 2024, figure 6)."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import LayerState
from mamba_core.backends.mlx import layers
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.backends.mlx.ops import ssd
from mamba_core.backends.mlx.ops.rms_norm import rms_norm
from mamba_core.backends.mlx.ops.ssd_step import one_position
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call


class GatedRMSNorm(nn.Module):
    """The norm of groups of channels, with the gate before or after it, in float32 and the dtype of the weight."""

    def __init__(self, dims: int, groups: int, eps: float, norm_before_gate: bool, options: Options):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate
        self.kernel = options.kernels.of("rms_norm")

    def __call__(self, y: mx.array, z: mx.array) -> mx.array:
        gate = nn.silu(z.astype(mx.float32))
        y = y.astype(mx.float32)
        y = y if self.norm_before_gate else y * gate
        grouped = y.reshape(*y.shape[:-1], self.groups, y.shape[-1] // self.groups)
        normed = rms_norm(grouped, None, self.eps, kernel=self.kernel).reshape(y.shape)
        normed = normed * self.weight.astype(mx.float32)
        return (normed * gate if self.norm_before_gate else normed).astype(self.weight.dtype)


class Mamba2Mixer(nn.Module):
    last_position = True
    recurrence = "ssd"

    def __init__(self, config, layer: int, options: Options):
        super().__init__()
        e, h, filters, k = config.d_scanned, config.nheads, config.conv_dim, config.d_conv
        self.layer = layer
        self.kernels = options.kernels
        self.groups, self.headdim, self.dt_limit = config.ngroups, config.headdim, config.dt_limit
        self.sizes = (config.d_gated, config.d_gated, e, filters, h)
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=config.bias)
        self.conv1d = nn.Conv1d(filters, filters, k, groups=filters, padding=k - 1, bias=config.conv_bias)
        self.dt_bias, self.A_log = mx.zeros((h,)), mx.zeros((h,))
        self.D = mx.ones((e if config.D_has_hdim else h,))
        if config.rmsnorm:
            self.norm = GatedRMSNorm(e, config.ngroups, config.norm_eps, config.norm_before_gate, options)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=config.bias)

    def __call__(self, hidden: mx.array, state: LayerState, call: Call) -> tuple[mx.array, LayerState]:
        """hidden (b, l, d) -> (b, l, d) and the state after the last position."""
        if self._is_built_inside() and s6.is_last_only(self, hidden, call):
            return self._last_position(hidden, state, call)
        kernel = self.kernels.of("linear")
        projected = call.observe("in_proj", layers.linear(self.in_proj, hidden, kernel))
        gate, gated, z, xBC, dt = _split(projected, self.sizes)
        if self.sizes[0]:
            gate, gated = call.observe("gate", gate), call.observe("gated", gated)
        z, xBC, dt = (call.observe(name, value) for name, value in {"z": z, "xBC": xBC, "dt": dt}.items())
        y, state = self._mix(xBC, dt, None if "norm" in self else z, state, call)
        if "norm" in self:
            y = call.observe("gated_norm", self.norm(y, z).astype(y.dtype))
        return self._project_out(y, gate, gated, call), state

    def _last_position(self, hidden, state, call):
        """The last position's output only, (b, 1, d); gates of others are not computed."""
        gates = sum(self.sizes[:3])
        gate, gated, z = _split(s6.project_rows(self, hidden[:, -1:], slice(gates)), self.sizes[:3])
        xBC, dt = _split(s6.project_rows(self, hidden, slice(gates, None)), self.sizes[3:])
        y, state = self._mix(xBC, dt, None, state, call)
        y = self.norm(y[:, -1:], z) if "norm" in self else y[:, -1:] * nn.silu(z)
        return self._project_out(y, gate, gated, call), state

    def _mix(self, xBC, dt, z, state, call):
        """The convolution and the recurrence; without the gate where z is None."""
        mixed, conv = s6.convolve(self, xBC, state.conv, call)
        of_groups = (mixed.shape[-1] - self.sizes[2]) // 2
        named = zip(("x", "B", "C"), _split(mixed, (self.sizes[2], of_groups, of_groups)), strict=True)
        x, B, C = (call.observe(name, value) for name, value in named)
        y, ssm = self._recur(x, dt, B, C, z, state.ssm, call)
        return y, LayerState(conv, ssm)

    def _recur(self, x, dt, B, C, z, state, call):
        """The recurrence, (b, l, e), with its gate if z is there, and its state."""
        heads = dt.shape[-1]
        x, z = (None if value is None else value.reshape(*value.shape[:2], heads, self.headdim) for value in (x, z))
        B, C = (value.reshape(*value.shape[:2], self.groups, value.shape[2] // self.groups) for value in (B, C))
        A, D = -mx.exp(self.A_log), self.D
        D = D if D is None or D.shape == A.shape else D.reshape(heads, -1)
        options = {"dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.dt_limit}
        if call.one:
            x, dt, B, C, z = (None if value is None else value[:, 0] for value in (x, dt, B, C, z))
            options |= {"state": state, "kernel": self.kernels.of("ssd_step")}
            y, state = one_position(x, dt, A, B, C, D, z=z, **options)
            y = y[:, None]
        else:
            options |= {"initial_state": state, "kernel": self.kernels.of("ssd")}
            y, state = ssd.recur(call, x, dt, A, B, C, D, z=z, **options)
        return call.observe("ssd", y.reshape(*y.shape[:2], heads * self.headdim)), state

    def _project_out(self, y, gate, gated, call):
        """The output (b, l, d), of y and of the channels beside it."""
        if self.sizes[0]:
            beside = call.observe("beside", call.observe("gate_silu", nn.silu(gate)) * gated)
            y = call.observe("joined", mx.concatenate((beside, y), axis=-1))
        return s6.project_out(self, y, call)

    def width(self) -> int | None:
        """Elements of its widest array, in_proj's output, for each position; None if a layer was replaced."""
        linears = (self.in_proj, self.out_proj)
        known = all(any(untouched(kind, layer) for kind in s6.LINEAR) for layer in linears)
        return sum(self.sizes) if known and self._is_built_inside() else None

    def _is_built_inside(self) -> bool:
        """Whether the layers between in_proj and out_proj are as they were built."""
        return layers.is_convolution(self.conv1d) and ("norm" not in self or untouched(GatedRMSNorm, self.norm))


Mixer = Mamba2Mixer


def _split(value: mx.array, sizes: tuple[int, ...]) -> list[mx.array]:
    """Along the last axis."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    return mx.split(value, ends, axis=-1)
