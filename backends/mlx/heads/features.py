"""Task "features": the normalised residual stream from token ids."""

import mlx.core as mx

from mamba_core.backend import Hidden, State
from mamba_core.backends.mlx import model
from mamba_core.backends.mlx.pooling import pooled
from mamba_core.observe import reporting


class FeatureModel(model.Model):
    """The backbone's output, from input_ids or, for task "layers", from inputs_embeds."""

    def __call__(
        self,
        inputs: mx.array | None = None,
        state: State | None = None,
        *,
        inputs_embeds: mx.array | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Hidden:
        observe = reporting(observe)
        with self.on_device():
            hidden, state = self._run(inputs, inputs_embeds, state, mask, segment_ids, observe)
            if self.task.pools:
                return Hidden(observe("hidden", pooled(hidden, self.task.pooling, mask)), state)
            return Hidden(observe("hidden", self._masked(hidden, mask)), state)


Model = FeatureModel
