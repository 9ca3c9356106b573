"""MiniMamba's mixer: Mamba-1's with the bias of dt_proj added twice, and a gate without SiLU."""

import jax
from flax import nnx

from mamba_core.backend import LayerState
from mamba_core.backends.jax import layers
from mamba_core.backends.jax.mixers import s6
from mamba_core.call import Call


class MiniMambaMixer(nnx.Module):
    """hidden (b, l, d) -> (b, l, d), and the state after the last position."""

    width = s6.width

    def __init__(self, config, layer: int, options):
        s6.add_parameters(self, config, options)

    def __call__(self, hidden: jax.Array, state: LayerState, call: Call) -> tuple[jax.Array, LayerState]:
        x, z = s6.project_in(self, hidden, call)
        y, state = self._mix(x, state, call)
        return s6.project_out(self, call.observe("gate", y * z), call), state

    def last_position(self, hidden: jax.Array, state: LayerState, call: Call) -> tuple[jax.Array, LayerState] | None:
        """Like a call, but returns only the last position's output, (b, 1, d); gates of others are not computed."""
        if (projected := s6.project_for_last(self, hidden)) is None:
            return None
        x, z = projected
        y, state = self._mix(x, state, call)
        return self.out_proj(y[:, -1:] * z), state

    def _mix(self, x, state, call):
        x, conv = s6.convolve(self, x, state, call)
        dt, B, C = s6.select(self, x, call)
        delta, bias = s6.step_sizes(self, dt, call)
        # The bias once more: a layer that is called has added it to delta.
        bias = layers.bias(self.dt_proj, dt) if bias is None else 2 * bias
        y, ssm = s6.recur(self, x, delta, B, C, None, bias, state, call)
        return y, LayerState(conv, ssm)


Mixer = MiniMambaMixer
