"""Task "features": see `mamba_core.backend.Backend.build`."""

from torch import Tensor

from mamba_core.backend import Hidden, State
from mamba_core.backends.torch import model
from mamba_core.backends.torch.pooling import pooled
from mamba_core.observe import reporting


class FeatureModel(model.Model):
    """The backbone's output, from input_ids or, for task "layers", from inputs_embeds."""

    def forward(
        self,
        inputs: Tensor | None = None,
        state: State | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Hidden:
        observe = reporting(observe)
        hidden, state = self._run(inputs, inputs_embeds, state, mask, segment_ids, observe)
        if self.task.pools:
            return Hidden(observe("hidden", pooled(hidden, self.task.pooling, mask)), state)
        return Hidden(observe("hidden", self._masked(hidden, mask)), state)


Model = FeatureModel
