"""Task "sequence_classification": logits (b, o) of a row's labels, see `mamba_core.tasks`."""

from torch import Tensor, nn

from mamba_core.backend import Output, State
from mamba_core.backends.torch import losses, model
from mamba_core.backends.torch.arrays import at_least_float32
from mamba_core.backends.torch.pooling import pooled
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.spec.losses import IGNORED


class SequenceClassifier(model.Model):
    def __init__(self, config, policy: Kernels):
        super().__init__(config, policy)
        self.score = nn.Linear(config.d_model, self.task.size, bias=self.task.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        state: State | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask=None,
        segment_ids=None,
        observe=None,
    ) -> Output:
        observe = reporting(observe)
        hidden, state = self._run(input_ids, inputs_embeds, state, mask, segment_ids, observe)
        hidden = observe("pooled", pooled(hidden, self.task.pooling, mask))
        return Output(observe("logits", at_least_float32(self.score(hidden))), state)


def loss(task, output: Output, targets: Tensor, mask=None) -> Tensor:
    """The task's loss of these targets, over the rows of which a position counts."""
    logits = output.logits
    rows = targets.new_ones(len(targets), dtype=bool) if mask is None else mask.any(1)
    if task.problem_type == "single_label":
        return losses.cross_entropy(logits, targets, rows & (targets != IGNORED), task.class_weights)
    if task.problem_type == "multi_label":
        return losses.binary_cross_entropy(logits, targets, rows, task.class_weights)
    return losses.squared_error(logits, targets, rows[:, None].expand_as(logits))


def captures(model, batch: dict[str, Tensor]) -> bool:
    """Whether no number comes from the host, as the weights of classes do, and no row is padded."""
    return set(batch) == {"inputs", "targets"} and model.task.class_weights is None


Model = SequenceClassifier
