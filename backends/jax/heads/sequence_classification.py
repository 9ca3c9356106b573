"""Task "sequence_classification": logits (b, o) of a row's labels, see `mamba_core.tasks`."""

import jax
import jax.numpy as jnp

from mamba_core.backend import Output, State
from mamba_core.backends.jax import losses, model
from mamba_core.backends.jax.layers import in_dtype, projection
from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.pooling import pooled
from mamba_core.spec.losses import IGNORED


class SequenceClassifier(model.Model):
    def __init__(self, config, options: Options):
        super().__init__(config, options)
        self.score = projection(config.d_model, self.task.size, self.task.bias, options)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        state: State | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Output:
        hidden, state, call = self._run(input_ids, inputs_embeds, state, mask, segment_ids, observe)
        hidden = call.observe("pooled", pooled(hidden, self.task.pooling, mask))
        return Output(call.observe("logits", in_dtype(jnp.float32, self.score(hidden))), state)


def loss(task, output: Output, targets: jax.Array, mask=None) -> jax.Array:
    """The task's loss of these targets, over the rows of which a position counts."""
    logits = output.logits
    rows = jnp.ones(len(targets), bool) if mask is None else mask.any(1)
    if task.problem_type == "single_label":
        return losses.cross_entropy(logits, targets, rows & (targets != IGNORED), task.class_weights)
    if task.problem_type == "multi_label":
        return losses.binary_cross_entropy(logits, targets, rows, task.class_weights)
    return losses.squared_error(logits, targets, jnp.broadcast_to(rows[:, None], logits.shape))


Model = SequenceClassifier
