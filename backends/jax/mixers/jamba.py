"""The mixer of Jamba's Mamba layers: Mamba-1's, with RMS norms of dt, B and C that have weights."""

import jax
from flax import nnx

from mamba_core.backend import LayerState
from mamba_core.backends.jax import layers
from mamba_core.backends.jax.blocks import RMSNorm
from mamba_core.backends.jax.mixers import s6
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call


class JambaMixer(nnx.Module):
    """hidden (b, l, d) -> (b, l, d), and the state after the last position."""

    def __init__(self, config, layer: int, options):
        s6.add_parameters(self, config, options)
        sizes = {"dt": config.dt_rank_size, "B": config.d_state, "C": config.d_state}
        for name, size in sizes.items():
            setattr(self, f"{name}_norm", RMSNorm(size, config.norm_eps, options.dtype))

    def __call__(self, hidden: jax.Array, state: LayerState, call: Call) -> tuple[jax.Array, LayerState]:
        x, z = s6.project_in(self, hidden, call)
        y, state = self._mix(x, z, state, call)
        return s6.project_out(self, y, call), state

    def last_position(self, hidden: jax.Array, state: LayerState, call: Call) -> tuple[jax.Array, LayerState] | None:
        """Like a call, but returns only the last position's output, (b, 1, d); gates of others are not computed."""
        if (projected := s6.project_for_last(self, hidden)) is None:
            return None
        x, z = projected
        y, state = self._mix(x, None, state, call)
        return self.out_proj(y[:, -1:] * jax.nn.silu(z)), state

    def width(self) -> int | None:
        """As `s6.width`; a norm that was changed may look along the sequence too."""
        return s6.width(self) if untouched(RMSNorm, self.dt_norm, self.B_norm, self.C_norm) else None

    def _mix(self, x, z, state, call):
        x, conv = s6.convolve(self, x, state, call)
        dt, B, C = self._normed(*s6.select(self, x, call), call)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state, call)
        return y, LayerState(conv, ssm)

    def _normed(self, dt, B, C, call):
        """dt, B and C after their norms."""
        norms = {"dt_norm": (self.dt_norm, dt), "B_norm": (self.B_norm, B), "C_norm": (self.C_norm, C)}
        found = {name: layers.in_dtype(value.dtype, norm(value)) for name, (norm, value) in norms.items()}
        return tuple(call.observe(name, value) for name, value in found.items())


Mixer = JambaMixer
