"""FalconMamba's mixer: Mamba-1's, with RMS norms without weight of dt, B and C."""

import jax
from flax import nnx

from mamba_core.backend import LayerState
from mamba_core.backends.jax.kernels.native_step import MixerStep
from mamba_core.backends.jax.mixers import s6
from mamba_core.call import Call


class FalconMambaMixer(nnx.Module):
    """hidden (b, l, d) -> (b, l, d), and the state after the last position."""

    width = s6.width

    def __init__(self, config, layer: int, options):
        s6.add_parameters(self, config, options)
        self.eps = config.mixer_rms_eps

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

    def native_step(self) -> MixerStep | str:
        return s6.native_operands(self, self.eps)

    def _mix(self, x, z, state, call):
        x, conv = s6.convolve(self, x, state, call)
        dt, B, C = s6.norm_selection(*s6.select(self, x, call), self.eps, call)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state, call)
        return y, LayerState(conv, ssm)


Mixer = FalconMambaMixer
