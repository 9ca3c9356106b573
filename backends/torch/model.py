"""The language model: embedding, blocks, final norm, head. Its `state_dict` has the canonical names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backend import Output, State
from mamba_core.backends.torch import state as states
from mamba_core.backends.torch.layers import Block, RMSNorm
from mamba_core.observe import reporting, within
from mamba_core.spec.checks import check_state, check_tokens
from mamba_core.spec.params import parameter_table


class Backbone(nn.Module):
    """Token ids to the normalised residual stream."""

    def __init__(self, config, kernels: str):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embeddings = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, input_ids: Tensor, state: State, mask, segment_ids, observe) -> tuple[Tensor, State]:
        residual = observe("embedding", self._embed(input_ids))
        if self.residual_in_fp32:
            residual = residual.float()
        layers = []
        for index, (block, carried) in enumerate(
            zip(self.layers, states.entering(state, mask, segment_ids), strict=True)
        ):
            residual, carried = block(residual, carried, mask, segment_ids, within(f"layers.{index}.", observe))
            layers.append(carried)
        hidden = observe("norm_f", self.norm_f(residual))
        return hidden, states.leaving(tuple(layers), state, mask, segment_ids)

    def _embed(self, input_ids):
        """An id outside the vocabulary raises on a CPU and gives NaN elsewhere, where it would end the CUDA context."""
        input_ids = input_ids.long()
        if input_ids.device.type == "cpu":
            return self.embeddings(input_ids)
        inside = (input_ids >= 0) & (input_ids < self.embeddings.num_embeddings)
        embedded = self.embeddings(torch.where(inside, input_ids, 0))
        return torch.where(inside[..., None], embedded, torch.nan)


class LanguageModel(nn.Module):
    """See `mamba_core.backend.Backend.build`. `.to(torch.bfloat16)` keeps in float32 what the contract keeps there."""

    backend = "torch"

    def __init__(self, config, kernels: str):
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.backbone = Backbone(config, kernels)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

    @property
    def dtype(self) -> str:
        return str(self.backbone.embeddings.weight.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.backbone.embeddings.weight.device)

    def init_state(self, batch: int) -> State:
        weight = self.backbone.embeddings.weight
        return states.init_state(self.config, batch, weight.dtype, weight.device)

    def forward(
        self, input_ids: Tensor, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        check_tokens(input_ids, mask, segment_ids)
        observe = reporting(observe)
        if state is None:
            state = self.init_state(input_ids.shape[0])
        check_state(self.config, input_ids.shape[0], state)
        hidden, state = self.backbone(input_ids, state, mask, segment_ids, observe)
        logits = self.head(hidden)
        if mask is not None:
            logits = torch.where(mask[..., None], logits, 0.0)
        return Output(observe("logits", logits), state)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32 from the backbone's output."""
        return (
            F.linear(hidden, self.backbone.embeddings.weight) if self.lm_head is None else self.lm_head(hidden)
        ).float()

    def _apply(self, fn, recurse=True):
        float32 = {name for name, parameter in parameter_table(self.config).items() if parameter.float32}
        kept = {id(parameter) for name, parameter in self.named_parameters() if name in float32}

        def keep_float32(tensor):
            changed = fn(tensor)
            narrowed = id(tensor) in kept and changed.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(changed.device) if narrowed else changed

        return super()._apply(keep_float32, recurse)
