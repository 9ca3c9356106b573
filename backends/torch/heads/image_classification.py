"""Task "image_classification": see `mamba_core.tasks.image_classification`."""

from torch import Tensor, nn

from mamba_core.backend import Output, State
from mamba_core.backends.torch import images as parts
from mamba_core.backends.torch import losses
from mamba_core.backends.torch.heads.image_features import ImageModel
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.spec.images import grid
from mamba_core.spec.losses import IGNORED


class ImageClassifier(ImageModel):
    def __init__(self, config, policy: Kernels):
        super().__init__(config, policy)
        self.head = nn.Linear(config.d_model, self.task.num_classes)

    def forward(
        self,
        inputs: Tensor | None = None,
        state: State | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Output:
        observe = reporting(observe)
        hidden, state = self._run(inputs, inputs_embeds, state, mask, segment_ids, observe)
        read = observe("classified", parts.read(self, hidden))
        return Output(observe("logits", parts.classify(self.head, read)), state)


def loss(task, output: Output, targets: Tensor, mask=None) -> Tensor:
    """Mean cross-entropy against the classes (b,) that count."""
    return losses.cross_entropy(output.logits, targets, targets != IGNORED)


def captures(model, batch: dict[str, Tensor]) -> bool:
    """Whether no number comes from the host, as the matrix does that interpolates the positions of another size."""
    task = model.task
    return set(batch) == {"inputs", "targets"} and grid(batch["inputs"].shape[2:], task.patch, task.steps) == task.grid


Model = ImageClassifier
