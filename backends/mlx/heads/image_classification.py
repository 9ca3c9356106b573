"""Task "image_classification": see `mamba_core.tasks.image_classification`."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import Output, State
from mamba_core.backends.mlx import images as parts
from mamba_core.backends.mlx import losses
from mamba_core.backends.mlx.heads.image_features import ImageModel
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.spec.losses import IGNORED


class ImageClassifier(ImageModel):
    def __init__(self, config, policy: Kernels, device: str):
        super().__init__(config, policy, device)
        self.head = nn.Linear(config.d_model, self.task.num_classes)

    def __call__(
        self,
        inputs: mx.array | None = None,
        state: State | None = None,
        *,
        inputs_embeds: mx.array | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Output:
        observe = reporting(observe)
        with self.on_device():
            hidden, state = self._run(inputs, inputs_embeds, state, mask, segment_ids, observe)
            read = observe("classified", parts.read(self, hidden))
            return Output(observe("logits", parts.classify(self.head, read)), state)


def loss(task, output: Output, targets: mx.array, mask=None) -> mx.array:
    """Mean cross-entropy against the classes (b,) that count."""
    return losses.cross_entropy(output.logits, targets, targets != IGNORED)


Model = ImageClassifier
