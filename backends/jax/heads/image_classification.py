"""Task "image_classification": see `mamba_core.tasks.image_classification`."""

import jax
from flax import nnx

from mamba_core.backend import Output, State
from mamba_core.backends.jax import images as parts
from mamba_core.backends.jax import losses
from mamba_core.backends.jax.heads.image_features import ImageModel
from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.spec.losses import IGNORED


class ImageClassifier(ImageModel):
    def __init__(self, config, options: Options):
        super().__init__(config, options)
        of_layer = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
        self.head = nnx.Linear(config.d_model, self.task.num_classes, **of_layer, rngs=options.rngs)

    def __call__(
        self,
        inputs: jax.Array | None = None,
        state: State | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Output:
        hidden, state, call = self._run(inputs, inputs_embeds, state, mask, segment_ids, observe)
        read = call.observe("classified", parts.read(self, hidden))
        return Output(call.observe("logits", parts.classify(self.head, read)), state)


def loss(task, output: Output, targets: jax.Array, mask=None) -> jax.Array:
    """Mean cross-entropy against the classes (b,) that count."""
    return losses.cross_entropy(output.logits, targets, targets != IGNORED)


Model = ImageClassifier
