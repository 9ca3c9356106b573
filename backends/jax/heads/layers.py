"""Task "layers": inputs_embeds to the residual stream after the last block."""

import jax

from mamba_core.backend import Hidden, State
from mamba_core.backends.jax import model


class LayersModel(model.Model):
    """See `mamba_core.backend.Backend.build`."""

    def __call__(
        self, inputs_embeds: jax.Array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Hidden:
        hidden, state, call = self._run(inputs_embeds, state, mask, segment_ids, observe)
        return Hidden(call.observe("hidden", self._masked(hidden, mask)), state)


Model = LayersModel
