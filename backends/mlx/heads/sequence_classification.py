"""Task "sequence_classification": logits (b, o) of a row's labels, see `mamba_core.tasks`."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import Output, State
from mamba_core.backends.mlx import losses, model
from mamba_core.backends.mlx.pooling import pooled
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.spec.losses import IGNORED


class SequenceClassifier(model.Model):
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
            hidden = observe("pooled", pooled(hidden, self.task.pooling, mask))
            return Output(observe("logits", self.score(hidden).astype(mx.float32)), state)


def loss(task, output: Output, targets: mx.array, mask=None) -> mx.array:
    """The task's loss of these targets, over the rows of which a position counts."""
    logits = output.logits
    rows = mx.ones(len(targets), mx.bool_) if mask is None else mask.any(1)
    if task.problem_type == "single_label":
        return losses.cross_entropy(logits, targets, rows & (targets != IGNORED), task.class_weights)
    if task.problem_type == "multi_label":
        return losses.binary_cross_entropy(logits, targets, rows, task.class_weights)
    return losses.squared_error(logits, targets, mx.broadcast_to(rows[:, None], logits.shape))


Model = SequenceClassifier
