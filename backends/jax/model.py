"""The models: embedding, blocks, final norm, head, as the task has them. `weights` has the canonical names."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mamba_core.backend import Hidden, Output, State
from mamba_core.backends.jax import state as states
from mamba_core.backends.jax.kernels import step
from mamba_core.backends.jax.layers import Block, RMSNorm, precision, through
from mamba_core.backends.jax.scan import kernel_for
from mamba_core.observe import reporting, unobserved
from mamba_core.spec.checks import check_inputs, check_state


class Backbone(nnx.Module):
    """Token ids to the normalised residual stream; for task "layers" embeddings to the residual stream itself."""

    def __init__(self, config, dtype: str, kernels: str, rngs: nnx.Rngs):
        self.residual_in_fp32 = config.residual_in_fp32
        self.remat = False
        self.dtype = dtype
        whole = config.task != "layers"
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embeddings = nnx.Embed(config.padded_vocab_size, config.d_model, **options) if whole else None
        self.layers = nnx.List([Block(config, dtype, kernels, rngs) for _ in range(config.n_layer)])
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, dtype) if whole else None

    def __call__(
        self, inputs: jax.Array, state: State, mask, segment_ids, observe, last: bool = False
    ) -> tuple[jax.Array, State]:
        """last: only the last position's hidden state is asked for, and (b, 1, d) will do."""
        residual = inputs if self.embeddings is None else observe("embedding", self._embed(inputs))
        residual = residual.astype(jnp.float32 if self.residual_in_fp32 else self.dtype)
        one = residual.shape[1] == 1 and mask is None and segment_ids is None and observe is unobserved
        stepped = step.blocks(self.layers, residual, state.layers) if one else None
        if stepped is None:
            entering = states.entering(state, mask, segment_ids)
            stepped = through(self.layers, residual, entering, mask, segment_ids, observe, self.remat, last)
        residual, layers = stepped
        hidden = residual.astype(self.dtype) if self.norm_f is None else observe("norm_f", self.norm_f(residual))
        return hidden, states.leaving(layers, state, mask, segment_ids)

    def _embed(self, input_ids):
        """NaN for an id outside the vocabulary: indexing would take negative ids from the end."""
        known = (input_ids >= 0) & (input_ids < self.embeddings.num_embeddings)
        return jnp.where(known[..., None], self._rows(input_ids), jnp.nan)

    def _rows(self, input_ids):
        embeddings = self.embeddings
        dtypes = {str(value) for value in (self.dtype, embeddings.dtype, embeddings.embedding[...].dtype)}
        if type(embeddings) is not nnx.Embed or dtypes != {"bfloat16"}:
            return embeddings(input_ids)
        # Tied to the ids, because in a loop over tokens XLA would make the whole table float32 first to look them up.
        input_ids, table = lax.optimization_barrier((input_ids, embeddings.embedding[...]))
        return jnp.take(table, input_ids, axis=0)


class Model(nnx.Module):
    """What the tasks share. Fast under `nnx.jit`; without it, it runs operation by operation."""

    backend = "jax"

    def __init__(self, config, dtype: str, kernels: str, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.chosen_kernels = kernels
        self.backbone = Backbone(config, dtype, kernels, rngs)

    @property
    def device(self) -> str:
        return next(iter(self.backbone.layers[0].norm.scale[...].devices())).platform

    @property
    def remat(self) -> bool:
        return self.backbone.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        self.backbone.remat = value

    @property
    def kernels(self) -> str:
        return kernel_for(self.chosen_kernels, self.device, self.dtype)

    def init_state(self, batch: int) -> State:
        return states.init_state(self.config, batch, self.dtype)

    def _run(self, inputs, state, mask, segment_ids, observe) -> tuple[jax.Array, State]:
        """What comes before the head, and the state after it."""
        check_inputs(self.config, inputs, mask, segment_ids)
        if state is None:
            state = self.init_state(inputs.shape[0])
        check_state(self.config, inputs.shape[0], state)
        return self.backbone(inputs, state, mask, segment_ids, observe)

    def _masked(self, values, mask):
        if mask is not None:
            values = jnp.where(mask[..., None], values, 0.0)
        return values


class LanguageModel(Model):
    """Task "lm": see `mamba_core.backend.Backend.build`."""

    def __init__(self, config, dtype: str, kernels: str, rngs: nnx.Rngs):
        super().__init__(config, dtype, kernels, rngs)
        self.lm_head = None if config.tie_embeddings else _head(config, dtype, rngs)

    def __call__(
        self, input_ids: jax.Array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        observe = reporting(observe)
        hidden, state = self._run(input_ids, state, mask, segment_ids, observe)
        return Output(observe("logits", self._masked(self.head(hidden), mask)), state)

    def hidden(self, input_ids: jax.Array, mask=None) -> jax.Array:
        """What the head is given, zero at masked positions, where the logits then are."""
        hidden, _ = self._run(input_ids, None, mask, None, unobserved)
        return self._masked(hidden, mask)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits in float32 from the backbone's output."""
        tied = self.lm_head is None
        if tied or step.is_linear(self.lm_head):
            weight = self.backbone.embeddings.embedding[...] if tied else self.lm_head.kernel[...]
            if (logits := step.head(self.chosen_kernels, hidden, weight, transposed=not tied)) is not None:
                return logits
        return step.product(hidden, weight, transposed=False) if tied else self.lm_head(hidden)

    def head_weight(self) -> jax.Array | None:
        """(v, d), whose product with the backbone's output the logits are; None if nobody knows what they are."""
        if self.lm_head is None:
            return self.backbone.embeddings.embedding[...]
        return self.lm_head.kernel[...].T if step.is_linear(self.lm_head) else None


class FeatureModel(Model):
    """Tasks "features", from input_ids, and "layers", from inputs_embeds: see `mamba_core.backend.Backend.build`."""

    def __call__(
        self, inputs: jax.Array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Hidden:
        observe = reporting(observe)
        hidden, state = self._run(inputs, state, mask, segment_ids, observe)
        return Hidden(observe("hidden", self._masked(hidden, mask)), state)


MODELS = {"lm": LanguageModel, "features": FeatureModel, "layers": FeatureModel}


def _head(config, dtype, rngs) -> nnx.Linear:
    options = {"dtype": dtype, "param_dtype": dtype, "precision": precision(dtype), "rngs": rngs}
    sizes = (config.d_model, config.padded_vocab_size)
    return nnx.Linear(*sizes, use_bias=False, preferred_element_type=jnp.float32, **options)
