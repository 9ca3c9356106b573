"""Task "lm": logits from token ids."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import Output, State
from mamba_core.backends.mlx import model
from mamba_core.backends.mlx.ops import linear
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting


class LanguageModel(model.Model):
    def __init__(self, config, policy: Kernels, device: str):
        super().__init__(config, policy, device)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

    def __call__(
        self, input_ids: mx.array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        observe = reporting(observe)
        with self.on_device():
            hidden, state = self._run(input_ids, state, mask, segment_ids, observe)
            return Output(observe("logits", self._masked(self.head(hidden), mask)), state)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits in float32 from the backbone's output."""
        if hidden.size == 0 and model._fails_on_nothing():
            return mx.zeros((*hidden.shape[:-1], self.config.padded_vocab_size))
        return self._project(hidden).astype(mx.float32)

    def _project(self, hidden):
        kernel, embeddings = self.policy.of("linear"), self.backbone.embeddings
        # Also a head that somebody gave to a model whose embedding was its head.
        if "lm_head" in self:
            return linear.call(self.lm_head, hidden, kernel)
        if untouched(nn.Embedding, embeddings):
            return linear.linear(hidden, embeddings.weight, kernel)
        if not hasattr(embeddings, "as_linear"):
            kind = f"{type(embeddings).__module__}.{type(embeddings).__qualname__}"
            raise TypeError(f"backbone.embeddings is {kind}, without as_linear; the model's head is the embedding's")
        return embeddings.as_linear(hidden)


Model = LanguageModel
