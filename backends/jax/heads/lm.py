"""Task "lm": input_ids to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backend import Output, State
from mamba_core.backends.jax import model
from mamba_core.backends.jax.mixers import Options
from mamba_core.backends.jax.ops.linear import precision, product, product_of_one
from mamba_core.backends.jax.untouched import untouched


class LanguageModel(model.Model):
    """See `mamba_core.backend.Backend.build`."""

    def __init__(self, config, options: Options):
        super().__init__(config, options)
        self.lm_head = None if config.tie_embeddings else _head(config, options)

    def __call__(
        self, input_ids: jax.Array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        hidden, state, call = self._run(input_ids, state, mask, segment_ids, observe)
        return Output(call.observe("logits", self._masked(self.head(hidden), mask)), state)

    def hidden(self, input_ids: jax.Array, mask=None) -> jax.Array:
        """The head's inputs (b, l, d), zero at masked positions, where the logits then are."""
        return self._masked(self._run(input_ids, None, mask, None, None)[0], mask)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits in float32 from the backbone's output."""
        head, embeddings = self.lm_head, self.backbone.embeddings
        if (weight := self._weight()) is None:
            return head(hidden) if head is not None else embeddings.attend(hidden).astype(jnp.float32)
        array, transposed = weight[...], head is not None
        logits = product_of_one(hidden, array, transposed=transposed, kernel=self.policy.of("block_step"))
        if logits is not None:
            return logits
        return product(hidden, array, transposed=False) if head is None else head(hidden)

    def head_weight(self) -> jax.Array | None:
        """The output projection's weight (v, d), or None if the head or the embedding was replaced."""
        if (weight := self._weight()) is None:
            return None
        return weight[...] if self.lm_head is None else weight[...].T

    def _weight(self) -> nnx.Param | None:
        """(v, d) of the embedding, or (d, v) of a head of its own; None where its module must be called."""
        if self.lm_head is not None:
            return self.lm_head.kernel if _only_multiplies(self.lm_head) else None
        embeddings = self.backbone.embeddings
        return embeddings.embedding if untouched(nnx.Embed, embeddings) else None


def _only_multiplies(head) -> bool:
    return untouched(nnx.Linear, head, preferred_element_type=jnp.float32) and head.bias is None


def _head(config, options) -> nnx.Linear:
    of_layer = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
    sizes = (config.d_model, config.padded_vocab_size)
    return nnx.Linear(*sizes, use_bias=False, preferred_element_type=jnp.float32, **of_layer, rngs=options.rngs)


Model = LanguageModel
