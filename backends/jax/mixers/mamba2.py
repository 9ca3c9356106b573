"""The mixer of Mamba-2 (Dao and Gu 2024, figure 6)."""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backend import LayerState
from mamba_core.backends.jax import layers
from mamba_core.backends.jax.kernels import native_ssd_step
from mamba_core.backends.jax.kernels.native_step import MixerStep
from mamba_core.backends.jax.mixers import s6
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.ops.rms_norm import rms_norm
from mamba_core.backends.jax.ops.ssd import recur, ssd_step
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call

# Names of the native library's block step -> paths in the mixer.
NATIVE_STEP = {
    "in_proj.weight": ("in_proj", "kernel"),
    "in_proj.bias": ("in_proj", "bias"),
    "conv.weight": ("conv1d", "kernel"),
    "conv.bias": ("conv1d", "bias"),
    "dt_bias": ("dt_bias",),
    "A_log": ("A_log",),
    "D": ("D",),
    "gated_norm": ("norm", "scale"),
    "out_proj.weight": ("out_proj", "kernel"),
    "out_proj.bias": ("out_proj", "bias"),
}


class GatedRMSNorm(nnx.Module):
    """The norm of groups of channels, with the gate before or after it, in float32, returned in `dtype`."""

    weight_leaf = "scale"

    def __init__(self, size: int, groups: int, eps: float, norm_before_gate: bool, dtype: str):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.groups, self.eps, self.norm_before_gate, self.dtype = groups, eps, norm_before_gate, dtype

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        gate = jax.nn.silu(z.astype(jnp.float32))
        y = y.astype(jnp.float32)
        y = y if self.norm_before_gate else y * gate
        grouped = y.reshape(*y.shape[:-1], self.groups, y.shape[-1] // self.groups)
        normed = rms_norm(grouped, None, self.eps, jnp.float32).reshape(y.shape)
        normed = normed * self.scale[...].astype(jnp.float32)
        return (normed * gate if self.norm_before_gate else normed).astype(self.dtype)


class Mamba2Mixer(nnx.Module):
    """hidden (b, l, d) -> (b, l, d), and the state after the last position."""

    def __init__(self, config, layer: int, options):
        e, h, filters, k = config.d_scanned, config.nheads, config.conv_dim, config.d_conv
        self.kernels = options.kernels
        self.groups, self.headdim, self.dt_limit = config.ngroups, config.headdim, config.dt_limit
        self.sizes = (config.d_gated, config.d_gated, e, filters, h)
        of_layers = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
        of_layers |= {"rngs": options.rngs}
        self.in_proj = nnx.Linear(config.d_model, sum(self.sizes), use_bias=config.bias, **of_layers)
        how = {"padding": "CAUSAL", "feature_group_count": filters, "use_bias": config.conv_bias}
        self.conv1d = nnx.Conv(filters, filters, k, **how, **of_layers)
        self.dt_bias, self.A_log = nnx.Param(jnp.zeros(h)), nnx.Param(jnp.zeros(h))
        self.D = nnx.Param(jnp.ones(e if config.D_has_hdim else h))
        norm = (e, config.ngroups, config.norm_eps, config.norm_before_gate, options.dtype)
        self.norm = GatedRMSNorm(*norm) if config.rmsnorm else None
        self.out_proj = nnx.Linear(config.d_inner, config.d_model, use_bias=config.bias, **of_layers)

    def __call__(self, hidden: jax.Array, state: LayerState, call: Call) -> tuple[jax.Array, LayerState]:
        projected = call.observe("in_proj", layers.linear(self.in_proj, hidden))
        gate, gated, z, xBC, dt = _split(projected, self.sizes)
        if self.sizes[0]:
            gate, gated = call.observe("gate", gate), call.observe("gated", gated)
        z, xBC, dt = (call.observe(name, value) for name, value in {"z": z, "xBC": xBC, "dt": dt}.items())
        y, state = self._mix(xBC, dt, None if self.norm is not None else z, state, call)
        if self.norm is not None:
            y = call.observe("gated_norm", layers.in_dtype(y.dtype, self.norm(y, z)))
        return self._project_out(y, gate, gated, call), state

    def last_position(self, hidden: jax.Array, state: LayerState, call: Call) -> tuple[jax.Array, LayerState] | None:
        """Like a call, but returns only the last position's output, (b, 1, d); gates of others are not computed."""
        if not (s6.can_compute_last_only(self, hidden) and self._is_built()):
            return None
        gates = sum(self.sizes[:3])
        gate, gated, z = _split(s6.project_columns(self, hidden[:, -1:], slice(gates)), self.sizes[:3])
        xBC, dt = _split(s6.project_columns(self, hidden, slice(gates, None)), self.sizes[3:])
        y, state = self._mix(xBC, dt, None, state, call)
        y = y[:, -1:] * jax.nn.silu(z) if self.norm is None else self.norm(y[:, -1:], z)
        return self._project_out(y, gate, gated, call), state

    def _mix(self, xBC, dt, z, state, call):
        """The convolution and the recurrence; without the gate where z is None."""
        mixed, conv = s6.convolve(self, xBC, state, call)
        of_groups = (mixed.shape[-1] - self.sizes[2]) // 2
        named = zip(("x", "B", "C"), _split(mixed, (self.sizes[2], of_groups, of_groups)), strict=True)
        x, B, C = (call.observe(name, value) for name, value in named)
        y, ssm = self._recur(x, dt, B, C, z, state, call)
        return y, LayerState(conv, ssm)

    def _recur(self, x, dt, B, C, z, state, call):
        """(y (b, l, e) of the recurrence, gated where there is a z; its state)."""
        heads, groups = dt.shape[-1], self.groups
        x, z = (None if value is None else value.reshape(*value.shape[:2], heads, self.headdim) for value in (x, z))
        B, C = (value.reshape(*value.shape[:2], groups, value.shape[2] // groups) for value in (B, C))
        A, D = -jnp.exp(self.A_log[...]), None if self.D is None else self.D[...]
        D = D if D is None or D.shape == A.shape else D.reshape(heads, -1)
        options = {"dt_bias": self.dt_bias[...], "dt_softplus": True, "dt_limit": self.dt_limit}
        if call.one:
            x, dt, B, C, z = (None if value is None else value[:, 0] for value in (x, dt, B, C, z))
            y, after = ssd_step(x, dt, A, B, C, D, z=z, **options, state=state.ssm)
            y = y[:, None]
        else:
            options |= {"initial_state": state.ssm, "kernel": self.kernels.of("ssd")}
            y, after = recur(call, x, dt, A, B, C, D, z=z, **options)
        return call.observe("ssd", y.reshape(*y.shape[:2], heads * self.headdim)), after

    def _project_out(self, y, gate, gated, call):
        """The output (b, l, d), of y and of the channels beside it."""
        if self.sizes[0]:
            beside = call.observe("beside", call.observe("gate_silu", jax.nn.silu(gate)) * gated)
            y = call.observe("joined", jnp.concatenate((beside, y), axis=-1))
        return s6.project_out(self, y, call)

    def width(self) -> int | None:
        """Elements of its widest array, in_proj's output, for each position; None if a layer was changed."""
        return sum(self.sizes) if self._is_built() else None

    def native_step(self) -> MixerStep | str:
        """For the way of that name."""
        norm, (least, most) = self.norm, self.dt_limit
        if not (self._is_built() and untouched(type(self), self)):
            return "the mixer, or a layer of it, was replaced or changed"
        if not 0 <= least <= most:
            return f"dt_limit is {self.dt_limit}"
        settings = (("g", self.groups), ("least", least), ("most", most))
        if norm is not None:
            if norm.groups != self.groups or jnp.dtype(norm.dtype) != norm.scale.dtype:
                return "its norm was given another dtype, or other groups than those of the recurrence"
            settings += (("gated_eps", norm.eps), ("norm_before_gate", norm.norm_before_gate))
        return MixerStep(native_ssd_step.KIND, NATIVE_STEP, settings)

    def _is_built(self) -> bool:
        """Whether all layers are as they were built."""
        is_built = untouched(nnx.Linear, self.in_proj, self.out_proj) and layers.is_convolution(self.conv1d)
        return is_built and (self.norm is None or untouched(GatedRMSNorm, self.norm))


Mixer = Mamba2Mixer


def _split(value: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """Along the last axis."""
    found, start = [], 0
    for size in sizes:
        found.append(value[..., start : start + size])
        start += size
    return found
