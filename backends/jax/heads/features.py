"""Task "features": input_ids to what comes before a head."""

import jax

from mamba_core.backend import Hidden, State
from mamba_core.backends.jax import model


class FeatureModel(model.Model):
    """See `mamba_core.backend.Backend.build`."""

    def __call__(
        self, input_ids: jax.Array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Hidden:
        hidden, state, call = self._run(input_ids, state, mask, segment_ids, observe)
        return Hidden(call.observe("hidden", self._masked(hidden, mask)), state)


Model = FeatureModel
