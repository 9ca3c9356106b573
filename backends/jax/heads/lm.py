"""Task "lm": input_ids to logits."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mamba_core.backend import Output, State
from mamba_core.backends.jax import model
from mamba_core.backends.jax.layers import attends, in_dtype
from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.ops.cross_entropy import linear_cross_entropy
from mamba_core.backends.jax.ops.linear import precision, product, product_of_one
from mamba_core.backends.jax.untouched import untouched
from mamba_core.spec.checks import check_targets
from mamba_core.wrappers import checked_output


class LanguageModel(model.Model):
    """See `mamba_core.backend.Backend.build`."""

    def __init__(self, config, options: Options):
        super().__init__(config, options)
        # As data, so that a head may be added to a model whose embedding is its head.
        self.lm_head = nnx.data(None if config.tie_embeddings else _head(config, options))

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
        return Output(call.observe("logits", self._masked(self.head(hidden), mask)), state)

    def hidden(self, input_ids: jax.Array, mask=None) -> jax.Array:
        """The head's inputs (b, l, d), zero at masked positions, where the logits then are."""
        return self._masked(self._run(input_ids, None, None, mask, None, None)[0], mask)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits in float32 from the backbone's output."""
        weight, transposed = self._weight(), self.lm_head is not None
        if weight is None:
            logits = self.lm_head(hidden) if transposed else self._embeddings().attend(hidden)
            return in_dtype(jnp.float32, logits)
        logits = product_of_one(hidden, weight, transposed=transposed, kernel=self.policy.of("block_step"))
        if logits is not None:
            return logits
        return self.lm_head(hidden) if transposed else product(hidden, weight, transposed=False)

    def head_weight(self) -> jax.Array | None:
        """The output projection's weight (v, d), or None where the head must be called."""
        if (weight := self._weight()) is None:
            return None
        return weight if self.lm_head is None else weight.T

    def _weight(self) -> jax.Array | None:
        """(v, d) of the embedding, or (d, v) of a head of its own; None where its module must be called.

        An embedding that was changed is asked for the rows of all ids, unless it brings an `attend` of its own.
        """
        if self.lm_head is not None:
            return self.lm_head.kernel[...] if _only_multiplies(self.lm_head) else None
        embeddings = self._embeddings()
        if untouched(nnx.Embed, embeddings):
            return embeddings.embedding[...]
        if attends(embeddings):
            return None
        return in_dtype(self.dtype, embeddings(jnp.arange(self.config.padded_vocab_size)))

    def _embeddings(self):
        """What the head is tied to."""
        if (found := getattr(self.backbone, "embeddings", None)) is None:
            raise TypeError(
                f"the backbone is {type(self.backbone).__name__} without `embeddings`, to which the head is tied; "
                "give the model an lm_head"
            )
        return found


def loss_of_inputs(model, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy of tokens[:, 1:] given tokens[:, :-1] over the targets that count; tokens (b, l+1)."""
    check_targets(tokens)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    counts = jnp.ones(targets.shape, bool)
    if mask is not None:
        mask, counts = mask[:, :-1], mask[:, 1:]
    return _cross_entropy(model, tokens, targets, counts, mask) / counts.sum()


def summed_loss_of_inputs(model, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """The sum of those cross-entropies over the targets that count; tokens (b, l+1), counts (b, l)."""
    check_targets(tokens)
    return _cross_entropy(model, tokens[:, :-1], tokens[:, 1:], counts, None)


def _cross_entropy(model, tokens, targets, counts, mask):
    """The sum over the targets that count."""
    if not model.is_built or (weight := model.head_weight()) is None:
        output = model(tokens, **({} if mask is None else {"mask": mask}))
        logits = checked_output(model, output).logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum(where=counts)
    hidden = model.hidden(tokens, mask)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return linear_cross_entropy(hidden, weight, targets.ravel(), counts.ravel())


def _only_multiplies(head) -> bool:
    return untouched(nnx.Linear, head, preferred_element_type=jnp.float32) and head.bias is None


def _head(config, options) -> nnx.Linear:
    of_layer = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
    sizes = (config.d_model, config.padded_vocab_size)
    return nnx.Linear(*sizes, use_bias=False, preferred_element_type=jnp.float32, **of_layer, rngs=options.rngs)


Model = LanguageModel
