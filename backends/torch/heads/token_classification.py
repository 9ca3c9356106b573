"""Task "token_classification": logits (b, l, o) of the labels of every position, see `mamba_core.tasks`."""

from torch import Tensor, nn

from mamba_core.backend import Output, State
from mamba_core.backends.torch import losses, model
from mamba_core.backends.torch.arrays import at_least_float32
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.spec.losses import IGNORED


class TokenClassifier(model.Model):
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
        return Output(observe("logits", self._masked(at_least_float32(self.score(hidden)), mask)), state)


def loss(task, output: Output, targets: Tensor, mask=None) -> Tensor:
    """Mean cross-entropy over the targets (b, l) that count."""
    counts = targets != IGNORED
    counts = counts if mask is None else counts & mask
    return losses.cross_entropy(output.logits, targets, counts, task.class_weights)


Model = TokenClassifier
