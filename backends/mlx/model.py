"""The language model: embedding, blocks, final norm, head. Its parameter tree has the canonical names."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mamba_core.backend import Output, State
from mamba_core.backends.mlx import state as states
from mamba_core.backends.mlx.arrays import dtype_name
from mamba_core.backends.mlx.layers import Block, RMSNorm
from mamba_core.observe import reporting, within
from mamba_core.spec.checks import check_state, check_tokens
from mamba_core.spec.params import parameter_table


class Backbone(nn.Module):
    """Token ids to the normalised residual stream."""

    def __init__(self, config, kernels: str):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.vocabulary = config.padded_vocab_size
        self.embeddings = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = [Block(config, kernels) for _ in range(config.n_layer)]
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def __call__(self, input_ids: mx.array, state: State, mask, segment_ids, observe) -> tuple[mx.array, State]:
        residual = observe("embedding", self._embed(input_ids))
        if self.residual_in_fp32:
            residual = residual.astype(mx.float32)
        layers = []
        for index, (block, carried) in enumerate(
            zip(self.layers, states.entering(state, mask, segment_ids), strict=True)
        ):
            residual, carried = block(residual, carried, mask, segment_ids, within(f"layers.{index}.", observe))
            layers.append(carried)
        hidden = observe("norm_f", self.norm_f(residual))
        return hidden, states.leaving(tuple(layers), state, mask, segment_ids)

    def _embed(self, input_ids):
        """NaN for an id outside the vocabulary: MLX does not check an index, it reads whatever memory is there."""
        # As int64: the size of the vocabulary need not fit into the dtype of the ids.
        input_ids = input_ids.astype(mx.int64)
        inside = (input_ids >= 0) & (input_ids < self.vocabulary)
        embedded = self.embeddings(mx.where(inside, input_ids, 0))
        return mx.where(inside[..., None], embedded, mx.array(mx.nan, embedded.dtype))


class LanguageModel(nn.Module):
    """See `mamba_core.backend.Backend.build`. It computes on its own device, whatever MLX's default is at the time.

    `set_dtype` keeps in float32 what the contract keeps there; `apply` does not, it has no names to tell them by.
    """

    backend = "mlx"

    def __init__(self, config, kernels: str, device: str):
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.device = device
        self.backbone = Backbone(config, kernels)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

    @property
    def dtype(self) -> str:
        # Of the norm: a quantised embedding is of packed integers.
        return dtype_name(self.backbone.norm_f.weight.dtype)

    def on_device(self):
        """A context in which operations are computed on the model's device."""
        return mx.stream(getattr(mx, self.device))

    def init_state(self, batch: int) -> State:
        with self.on_device():
            return states.init_state(self.config, batch, self.backbone.norm_f.weight.dtype)

    def __call__(
        self, input_ids: mx.array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        check_tokens(input_ids, mask, segment_ids)
        observe = reporting(observe)
        if state is None:
            state = self.init_state(input_ids.shape[0])
        check_state(self.config, input_ids.shape[0], state)
        with self.on_device():
            hidden, state = self.backbone(input_ids, state, mask, segment_ids, observe)
            logits = self.head(hidden)
            if mask is not None:
                logits = mx.where(mask[..., None], logits, 0.0)
            return Output(observe("logits", logits), state)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits in float32 from the backbone's output."""
        linear = self.backbone.embeddings.as_linear if self.config.tie_embeddings else self.lm_head
        return linear(hidden).astype(mx.float32)

    def set_dtype(self, dtype: mx.Dtype, predicate=lambda dtype: mx.issubdtype(dtype, mx.floating)) -> None:
        float32 = {name for name, parameter in parameter_table(self.config).items() if parameter.float32}
        kept = [(name, value) for name, value in tree_flatten(self.parameters()) if name in float32]
        super().set_dtype(dtype, predicate)
        self.load_weights(kept, strict=False)
