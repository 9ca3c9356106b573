"""Task "token_classification": logits (b, l, o) of the labels of every position, see `mamba_core.tasks`."""

import jax
import jax.numpy as jnp

from mamba_core.backend import Output, State
from mamba_core.backends.jax import losses, model
from mamba_core.backends.jax.layers import in_dtype, projection
from mamba_core.backends.jax.mixers import Options
from mamba_core.spec.losses import IGNORED


class TokenClassifier(model.Model):
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
        return Output(call.observe("logits", self._masked(in_dtype(jnp.float32, self.score(hidden)), mask)), state)


def loss(task, output: Output, targets: jax.Array, mask=None) -> jax.Array:
    """Mean cross-entropy over the targets (b, l) that count."""
    counts = targets != IGNORED
    counts = counts if mask is None else counts & mask
    return losses.cross_entropy(output.logits, targets, counts, task.class_weights)


Model = TokenClassifier
