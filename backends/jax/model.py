"""The language model: embedding, blocks, final norm, head. `weights` maps its parameters to the canonical names."""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backend import Output, State
from mamba_core.backends.jax import state as states
from mamba_core.backends.jax.layers import Block, RMSNorm, precision
from mamba_core.observe import reporting, within
from mamba_core.spec.checks import check_state, check_tokens


class Backbone(nnx.Module):
    """Token ids to the normalised residual stream."""

    def __init__(self, config, dtype: str, kernels: str, rngs: nnx.Rngs):
        self.residual_in_fp32 = config.residual_in_fp32
        self.embeddings = nnx.Embed(config.padded_vocab_size, config.d_model, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, dtype, kernels, rngs) for _ in range(config.n_layer)])
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, dtype)

    def __call__(self, input_ids: jax.Array, state: State, mask, segment_ids, observe) -> tuple[jax.Array, State]:
        # Indexing would take negative ids from the end.
        known = (input_ids >= 0) & (input_ids < self.embeddings.num_embeddings)
        residual = observe("embedding", jnp.where(known[..., None], self.embeddings(input_ids), jnp.nan))
        if self.residual_in_fp32:
            residual = residual.astype(jnp.float32)
        layers = []
        for index, (block, carried) in enumerate(
            zip(self.layers, states.entering(state, mask, segment_ids), strict=True)
        ):
            residual, carried = block(residual, carried, mask, segment_ids, within(f"layers.{index}.", observe))
            layers.append(carried)
        hidden = observe("norm_f", self.norm_f(residual))
        return hidden, states.leaving(tuple(layers), state, mask, segment_ids)


class LanguageModel(nnx.Module):
    """See `mamba_core.backend.Backend.build`. Fast under `nnx.jit`; without it, it runs operation by operation."""

    backend = "jax"

    def __init__(self, config, dtype: str, kernels: str, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.kernels = kernels
        self.backbone = Backbone(config, dtype, kernels, rngs)
        self.lm_head = None if config.tie_embeddings else _head(config, dtype, rngs)

    @property
    def device(self) -> str:
        return next(iter(self.backbone.embeddings.embedding[...].devices())).platform

    def init_state(self, batch: int) -> State:
        return states.init_state(self.config, batch, self.dtype)

    def __call__(
        self, input_ids: jax.Array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        check_tokens(input_ids, mask, segment_ids)
        observe = reporting(observe)
        if state is None:
            state = self.init_state(input_ids.shape[0])
        check_state(self.config, input_ids.shape[0], state)
        hidden, state = self.backbone(input_ids, state, mask, segment_ids, observe)
        logits = self.head(hidden)
        if mask is not None:
            logits = jnp.where(mask[..., None], logits, 0.0)
        return Output(observe("logits", logits), state)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits in float32 from the backbone's output."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        weight = self.backbone.embeddings.embedding[...].T
        return jnp.matmul(hidden, weight, precision=precision(self.dtype), preferred_element_type=jnp.float32)


def _head(config, dtype, rngs) -> nnx.Linear:
    options = {"dtype": dtype, "param_dtype": dtype, "precision": precision(dtype), "rngs": rngs}
    sizes = (config.d_model, config.padded_vocab_size)
    return nnx.Linear(*sizes, use_bias=False, preferred_element_type=jnp.float32, **options)
