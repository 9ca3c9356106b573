"""A mixer of any kind for each direction, and the mean or the sum of the two."""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core import architectures
from mamba_core.backends.jax.mixers import mixer_class
from mamba_core.backends.jax.mixers.bimamba import flip
from mamba_core.call import Call
from mamba_core.spec import state as states


class BidirectionalMixer(nnx.Module):
    def __init__(self, config, layer: int, options):
        inner = config.inner_config
        kind = mixer_class(architectures.of(inner).blocks(inner)[layer].mixer)
        self.factor, self.inner_config, self.layer = config.merge_factor, inner, layer
        self.forwards, self.backwards = kind(inner, layer, options), kind(inner, layer, options)

    def __call__(self, hidden: jax.Array, state, call: Call) -> tuple[jax.Array, tuple]:
        """hidden (b, l, d) to (b, l, d)."""
        call, zeros = call._replace(last=False), self._zeros(hidden)
        y, _ = self.forwards(hidden, zeros, call.within("forwards."))
        y_b, _ = self.backwards(flip(hidden), zeros, _reversed(call))
        return call.observe("merged", (y + flip(y_b)) * self.factor), state

    def _zeros(self, hidden: jax.Array):
        """The state that each direction begins with."""
        fields = states.fields(self.inner_config, self.layer)
        kind = states.layer_types(self.inner_config)[self.layer]
        return kind(*(_zeros(field.stored_shape(len(hidden)), field.dtype, hidden) for field in fields))


def _zeros(shape: tuple[int, ...], dtype: str, hidden: jax.Array) -> jax.Array:
    return jnp.zeros(shape, hidden.dtype if dtype == "compute" else dtype)


def _reversed(call: Call) -> Call:
    """That of the flipped sequence, which reports its nodes as the positions lie."""
    turned = call._replace(last=False) if call.reverse is None else call.reverse
    if not call.observed:
        return turned
    observe = call.within("backwards.").observe
    return turned._replace(observe=lambda name, value: (observe(name, flip(value)), value)[1])


Mixer = BidirectionalMixer
