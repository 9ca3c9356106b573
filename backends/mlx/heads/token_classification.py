"""Task "token_classification": logits (b, l, o) of the labels of every position, see `mamba_core.tasks`."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import Output, State
from mamba_core.backends.mlx import losses, model
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.spec.losses import IGNORED


class TokenClassifier(model.Model):
    def __init__(self, config, policy: Kernels, device: str):
        super().__init__(config, policy, device)
        self.score = nn.Linear(config.d_model, self.task.size, bias=self.task.bias)

    def __call__(
        self,
        input_ids: mx.array | None = None,
        state: State | None = None,
        *,
        inputs_embeds: mx.array | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Output:
        observe = reporting(observe)
        with self.on_device():
            hidden, state = self._run(input_ids, inputs_embeds, state, mask, segment_ids, observe)
            return Output(observe("logits", self._masked(self._score(hidden), mask)), state)

    def _score(self, hidden):
        if hidden.size == 0 and model._fails_on_nothing():
            return mx.zeros((*hidden.shape[:-1], self.task.size))
        return self.score(hidden).astype(mx.float32)


def loss(task, output: Output, targets: mx.array, mask=None) -> mx.array:
    """Mean cross-entropy over the targets (b, l) that count."""
    counts = targets != IGNORED
    counts = counts if mask is None else counts & mask
    return losses.cross_entropy(output.logits, targets, counts, task.class_weights)


Model = TokenClassifier
