"""Task "layers": the residual stream from embeddings, without an embedding and a final norm."""

import mlx.core as mx

from mamba_core.backend import Hidden, State
from mamba_core.backends.mlx import model


class LayerModel(model.Model):
    def __call__(
        self, inputs: mx.array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Hidden:
        return self._hidden(inputs, state, mask, segment_ids, observe)


Model = LayerModel
