"""Task "features": input_ids to what comes before a head."""

import jax

from mamba_core.backend import Hidden, State
from mamba_core.backends.jax import model
from mamba_core.backends.jax.pooling import pooled


class FeatureModel(model.Model):
    """The backbone's output, from input_ids or, for task "layers", from inputs_embeds."""

    def __call__(
        self,
        inputs: jax.Array | None = None,
        state: State | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Hidden:
        hidden, state, call = self._run(inputs, inputs_embeds, state, mask, segment_ids, observe)
        if self.task.pools:
            return Hidden(call.observe("hidden", pooled(hidden, self.task.pooling, mask)), state)
        return Hidden(call.observe("hidden", self._masked(hidden, mask)), state)


Model = FeatureModel
