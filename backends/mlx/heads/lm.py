"""Task "lm": logits from token ids."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backend import Output, State
from mamba_core.backends.mlx import layers, model
from mamba_core.backends.mlx.ops import linear
from mamba_core.backends.mlx.ops.cross_entropy import cross_entropy
from mamba_core.backends.mlx.stack import recomputed
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting
from mamba_core.spec.checks import check_targets
from mamba_core.wrappers import checked_output


class LanguageModel(model.Model):
    def __init__(self, config, policy: Kernels, device: str):
        super().__init__(config, policy, device)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

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
            return Output(observe("logits", self._masked(self.head(hidden), mask)), state)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits in float32 from the backbone's output."""
        if hidden.size == 0 and model._fails_on_nothing():
            return mx.zeros((*hidden.shape[:-1], self.config.padded_vocab_size))
        return self._project(hidden).astype(mx.float32)

    def _project(self, hidden):
        kernel = self.policy.of("linear")
        # Also a head that somebody gave to a model whose embedding was its head.
        head = self.get("lm_head", vars(self).get("lm_head"))
        if head is not None:
            return layers.linear(head, hidden, kernel)
        if not self.config.tie_embeddings:
            raise TypeError("lm_head is missing, and the model's config does not tie it to the embedding")
        embeddings = self.inner_backbone("the head, which is the embedding,").embeddings
        if untouched(nn.Embedding, embeddings) and untouched(nn.Embedding, method="as_linear"):
            return linear.linear(hidden, embeddings.weight, kernel)
        if _projects(embeddings):
            return embeddings.as_linear(hidden)
        rows = embeddings(mx.arange(self.config.padded_vocab_size))
        return linear.linear(hidden, rows.astype(hidden.dtype), kernel)


def loss_of_inputs(model, tokens, mask=None) -> mx.array:
    """Mean cross-entropy of tokens[:, 1:] given tokens[:, :-1] over the targets that count; tokens (b, l+1)."""
    losses = _losses(model, tokens, mask)
    if mask is None:
        return losses.mean()
    counts = mask[:, 1:]
    return mx.where(counts, losses, 0.0).sum() / counts.sum()


def summed_loss_of_inputs(model, tokens, counts) -> mx.array:
    """The sum of those cross-entropies over the targets that count; tokens (b, l+1), counts (b, l)."""
    return mx.where(counts, _losses(model, tokens), 0.0).sum()


def _losses(model, tokens, mask=None):
    """(b, l), of tokens[:, 1:]."""
    check_targets(tokens)
    given = {} if mask is None else {"mask": mask[:, :-1]}
    logits = checked_output(model, model(tokens[:, :-1], **given)).logits
    return _cross_entropy(model, logits, tokens[:, 1:])


def _cross_entropy(model, logits, targets):
    """(b, l). Its gradient takes several arrays as large as the logits, unless the model computes again."""

    def run(logits):
        return (cross_entropy(logits, targets, kernel=model.policy.of("cross_entropy")),)

    if not model.remat:
        return run(logits)[0]
    return recomputed(run, model.policy, model.compute_dtype, (logits,))[0]


def _projects(embeddings) -> bool:
    """Whether whoever wrote what the embedding gives for ids also wrote its `as_linear`.

    Else its rows are asked for: a class that changes them alone has inherited another embedding's `as_linear`.
    """
    kind = type(embeddings)
    call, project = (
        next((base for base in kind.__mro__ if name in vars(base)), object) for name in ("__call__", "as_linear")
    )
    if project is object or not issubclass(project, call):
        return False
    return untouched(kind) or not untouched(kind, method="as_linear")


Model = LanguageModel
