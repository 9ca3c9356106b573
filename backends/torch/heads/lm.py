"""Task "lm": see `mamba_core.backend.Backend.build`."""

import torch
from torch import Tensor, nn

from mamba_core.backend import Output, State
from mamba_core.backends.torch import model
from mamba_core.backends.torch.arrays import at_least_float32, dtype_of
from mamba_core.backends.torch.kernels.triton_loss import IGNORED
from mamba_core.backends.torch.ops import linear
from mamba_core.backends.torch.ops.cross_entropy import cross_entropy, fuses_head, linear_cross_entropy
from mamba_core.backends.torch.untouched import untouched
from mamba_core.kernels import Kernels
from mamba_core.observe import reporting, unobserved
from mamba_core.spec.checks import check_targets
from mamba_core.tasks.base import EMBEDDING
from mamba_core.tasks.lm import HEAD
from mamba_core.wrappers import checked_output


class LanguageModel(model.Model):
    def __init__(self, config, policy: Kernels):
        super().__init__(config, policy)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

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
        return Output(observe("logits", self._masked(self.head(hidden), mask)), state)

    def hidden(self, input_ids: Tensor, mask=None) -> Tensor:
        """The input of the head, zero at masked positions."""
        hidden, _ = self._run(input_ids, None, None, mask, None, unobserved)
        return self._masked(hidden, mask)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, at least in float32, from the backbone's output."""
        if (weight := self.head_weight()) is None:
            return at_least_float32(self.lm_head(hidden))
        return linear.head(hidden, weight, self.policy)

    def head_weight(self) -> Tensor | None:
        """The output projection's weight, or None where a head is to be called."""
        if self.lm_head is not None:
            return self.lm_head.weight if untouched(nn.Linear, self.lm_head) and self.lm_head.bias is None else None
        embeddings = self.inner.embeddings
        if untouched(nn.Embedding, embeddings) and embeddings.max_norm is None:
            return embeddings.weight
        # What the embedding gives is what acts: it is asked for every row.
        rows = embeddings(torch.arange(self.config.padded_vocab_size, device=self.device)[None])
        return rows[0].to(dtype_of(self.dtype))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """A tied model takes a head that is its embedding, as others keep it, and no other."""
        head = state_dict.get(prefix + HEAD)
        if head is not None and self.lm_head is None and self.config.tie_embeddings:
            embedding = state_dict.setdefault(prefix + EMBEDDING, head)
            del state_dict[prefix + HEAD]
            if not _are_equal(head, embedding):
                errors.append(
                    f"{prefix}{HEAD} differs from {prefix}{EMBEDDING}, but the config ties them; expected equal ones, "
                    "or a model with tie_embeddings=False"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)


def loss_of_inputs(model, tokens, mask=None) -> Tensor:
    """Mean cross-entropy of tokens[:, 1:] given tokens[:, :-1] over the targets that count; tokens (b, l+1)."""
    check_targets(tokens)
    tokens, targets = tokens[:, :-1], tokens[:, 1:].long()
    if mask is not None:
        mask, targets = mask[:, :-1], targets.masked_fill(~mask[:, 1:], IGNORED)
    return _cross_entropy(model, tokens, targets, mask, "mean")


def summed_loss_of_inputs(model, tokens, counts) -> Tensor:
    """The sum of those cross-entropies over the targets that count; tokens (b, l+1), counts (b, l)."""
    check_targets(tokens)
    targets = tokens[:, 1:].long().masked_fill(~counts, IGNORED)
    return _cross_entropy(model, tokens[:, :-1], targets, None, "sum")


def _cross_entropy(model, tokens, targets, mask, reduction):
    weight = model.head_weight() if model.is_untouched() else None
    if weight is not None and fuses_head(model.policy.of("cross_entropy"), weight):
        return linear_cross_entropy(model.hidden(tokens, mask), weight, targets, reduction)
    given = {} if mask is None else {"mask": mask}
    return cross_entropy(checked_output(model, model(tokens, **given)).logits, targets, reduction)


def _are_equal(head: Tensor, embedding: Tensor) -> bool:
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        return False
    return head.is_meta or embedding.is_meta or torch.equal(head.to(embedding.device), embedding)


Model = LanguageModel
