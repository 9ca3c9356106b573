"""The models: embedding, blocks, final norm, head, as the task has them. `state_dict` has the canonical names."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba_core.backend import Hidden, Output, State
from mamba_core.backends.torch import state as states
from mamba_core.backends.torch.kernels import step
from mamba_core.backends.torch.kernels.linear import linear
from mamba_core.backends.torch.layers import Block, MambaMixer, RMSNorm
from mamba_core.backends.torch.scan import kernel_for
from mamba_core.observe import reporting, unobserved, within
from mamba_core.spec.checks import check_inputs, check_state
from mamba_core.spec.params import parameter_table

# Bytes of a mixer's widest array, the product with in_proj, that are computed at once on a CPU: much more leaves the
# cache, and malloc takes such arrays from the system anew each time. And the fewest positions of a row.
PIECE_BYTES, FEWEST = 2**23, 256


class Backbone(nn.Module):
    """Token ids to the normalised residual stream; for task "layers" embeddings to the residual stream itself."""

    def __init__(self, config, kernels: str):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.remat = False
        self.kernels = kernels
        self.width = 2 * config.d_inner
        whole = config.task != "layers"
        self.embeddings = nn.Embedding(config.padded_vocab_size, config.d_model) if whole else None
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps) if whole else None

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].norm.weight.dtype

    def forward(
        self, inputs: Tensor, state: State, mask, segment_ids, observe, last: bool = False
    ) -> tuple[Tensor, State]:
        """last: only the last position's hidden state is asked for, and (b, 1, d) will do."""
        piece = self._piece(inputs) if observe is unobserved else None
        if piece is None or torch.is_grad_enabled():
            return self._whole(inputs, state, mask, segment_ids, observe, piece, last)
        hidden, given = [], (_split(value, piece, inputs) for value in (inputs, mask, segment_ids))
        for part, *positions in zip(*given, strict=True):
            part, state = self._whole(part, state, *positions, observe, last=last)
            hidden.append(part)
        return torch.cat(hidden, dim=1), state

    def _whole(self, inputs, state, mask, segment_ids, observe, piece=None, last=False):
        """piece: how many positions a block that is computed again in a gradient is given at once; None for all."""
        residual = inputs if self.embeddings is None else observe("embedding", self._embed(inputs))
        residual = residual.to(torch.float32 if self.residual_in_fp32 else self.dtype)
        one = residual.shape[1] == 1 and mask is None and segment_ids is None and observe is unobserved
        if one and (stepped := self._step(residual, state.layers)) is not None:
            (residual, layers), hidden = stepped, None
        else:
            piece = piece if mask is None and segment_ids is None else None
            residual, hidden, layers = self._blocks(residual, state, mask, segment_ids, observe, piece, last)
        if self.norm_f is not None and observe is unobserved and self.norm_f.fuses(residual, self.kernels):
            hidden, _ = self.norm_f.add(residual, hidden, self.kernels)
        else:
            residual = _sum(residual, hidden)
            if self.norm_f is None:
                hidden = residual.to(self.dtype)
            elif piece is None:
                hidden = observe("norm_f", self.norm_f(residual))
            else:
                hidden = torch.cat([_recomputed(self.norm_f, part) for part in residual.split(piece, dim=1)], dim=1)
        return hidden, states.leaving(layers, state, mask, segment_ids)

    def _step(self, residual, layers):
        """All blocks in one call of the native library; None where it is not to be used."""
        return step.blocks(list(self.layers), residual, layers) if self.as_built() else None

    def as_built(self) -> bool:
        """Whether nobody has put others in the place of blocks, norms and mixers, or asked to be called with them."""
        blocks = list(self.layers)
        norms = [block.norm for block in blocks] + ([] if self.norm_f is None else [self.norm_f])
        return (
            step.as_built(Block, *blocks)
            and step.as_built(RMSNorm, *norms)
            and step.as_built(MambaMixer, *(block.mixer for block in blocks))
        )

    def _blocks(self, residual, state, mask, segment_ids, observe, piece, last):
        """The residual stream, what is still to be added to it or None, and the states."""
        run, layers = _recomputed if self.remat and observe is unobserved else _called, []
        if piece is not None:
            run = partial(_piecewise, run, piece=piece)
        # What a block with fused kernels leaves to the next to add.
        hidden = None
        for index, (block, carried) in enumerate(
            zip(self.layers, states.entering(state, mask, segment_ids), strict=True)
        ):
            if observe is unobserved and block.fuses(residual):
                its_last = last and index + 1 == len(self.layers)
                residual, hidden, carried = run(block.add, residual, hidden, carried, mask, segment_ids, its_last)
            else:
                residual, hidden = _sum(residual, hidden), None
                observed = within(f"layers.{index}.", observe)
                residual, carried = run(block, residual, carried, mask, segment_ids, observed)
            layers.append(carried)
        return residual, hidden, tuple(layers)

    def _piece(self, inputs) -> int | None:
        """How many positions are computed at once, one piece after the other; None if all.

        In pieces only where nothing of a block is kept but its inputs, and nobody watches what modules compute; and not
        in a graph, which would hold the pieces' number.
        """
        kept = torch.is_grad_enabled() and not self.remat
        if inputs.device.type != "cpu" or kept or torch.compiler.is_compiling():
            return None
        piece = max(FEWEST, PIECE_BYTES // (self.width * self.dtype.itemsize * max(1, len(inputs))))
        if inputs.shape[1] <= piece or not self.as_built():
            return None
        return None if any(map(_is_watched, self.modules())) else piece

    def _embed(self, input_ids):
        """An id outside the vocabulary raises on a CPU and gives NaN elsewhere, where it would end the CUDA context."""
        input_ids = input_ids.long()
        if input_ids.device.type == "cpu":
            return self.embeddings(input_ids)
        inside = (input_ids >= 0) & (input_ids < self.embeddings.num_embeddings)
        embedded = self.embeddings(torch.where(inside, input_ids, 0))
        return torch.where(inside[..., None], embedded, torch.nan)


def _sum(residual, hidden):
    return residual if hidden is None else residual + hidden


def _called(block, *arguments):
    return block(*arguments)


def _is_watched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _split(positions: Tensor | None, piece: int, inputs: Tensor) -> Sequence[Tensor | None]:
    return [None] * -(-inputs.shape[1] // piece) if positions is None else positions.split(piece, dim=1)


def _piecewise(run, block, residual, state, *positions, piece: int):
    """A block of the pieces of the residual stream, each of which goes on from the state that the last has left."""
    pieces = []
    for part in residual.split(piece, dim=1):
        part, state = run(block, part, state, *positions)
        pieces.append(part)
    return torch.cat(pieces, dim=1), state


def _recomputed(block, *arguments):
    """Called again in the backward pass, from its inputs, which are all that is kept of it."""
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)


class Model(nn.Module):
    """What the tasks share. `.to(torch.bfloat16)` keeps in float32 what the contract keeps there."""

    backend = "torch"

    def __init__(self, config, kernels: str):
        super().__init__()
        self.config = config
        self.chosen_kernels = kernels
        self.backbone = Backbone(config, kernels)

    @property
    def dtype(self) -> str:
        return str(self.backbone.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.backbone.layers[0].norm.weight.device)

    @property
    def remat(self) -> bool:
        return self.backbone.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        self.backbone.remat = value

    @property
    def kernels(self) -> str:
        return kernel_for(self.chosen_kernels, torch.device(self.device), self.backbone.dtype)

    def init_state(self, batch: int) -> State:
        weight = self.backbone.layers[0].norm.weight
        return states.init_state(self.config, batch, weight.dtype, weight.device)

    def _run(self, inputs, state, mask, segment_ids, observe) -> tuple[Tensor, State]:
        """What comes before the head, and the state after it."""
        check_inputs(self.config, inputs, mask, segment_ids)
        if state is None:
            state = self.init_state(inputs.shape[0])
        check_state(self.config, inputs.shape[0], state)
        return self.backbone(inputs, state, mask, segment_ids, observe)

    def _masked(self, values, mask):
        if mask is not None:
            values = torch.where(mask[..., None], values, 0.0)
        return values

    def _apply(self, fn, recurse=True):
        float32 = {name for name, parameter in parameter_table(self.config).items() if parameter.float32}
        kept = {id(parameter) for name, parameter in self.named_parameters() if name in float32}

        def keep_float32(tensor):
            changed = fn(tensor)
            narrowed = id(tensor) in kept and changed.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(changed.device) if narrowed else changed

        return super()._apply(keep_float32, recurse)


class LanguageModel(Model):
    """Task "lm": see `mamba_core.backend.Backend.build`."""

    def __init__(self, config, kernels: str):
        super().__init__(config, kernels)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        observe = reporting(observe)
        hidden, state = self._run(input_ids, state, mask, segment_ids, observe)
        return Output(observe("logits", self._masked(self.head(hidden), mask)), state)

    def hidden(self, input_ids: Tensor, mask=None) -> Tensor:
        """What the head is given, zero at masked positions, where the logits then are."""
        hidden, _ = self._run(input_ids, None, mask, None, unobserved)
        return self._masked(hidden, mask)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32 from the backbone's output."""
        if (weight := self.head_weight()) is None:
            return self.lm_head(hidden).float()
        if (logits := step.head(self.chosen_kernels, hidden, weight)) is not None:
            return logits
        return linear(hidden, weight, kernels=self.chosen_kernels).float()

    def head_weight(self) -> Tensor | None:
        """The weight whose product with the backbone's output the logits are; None if nobody knows what they are."""
        if self.lm_head is None:
            return self.backbone.embeddings.weight
        return self.lm_head.weight if step.as_built(nn.Linear, self.lm_head) else None


class FeatureModel(Model):
    """Tasks "features", from input_ids, and "layers", from inputs_embeds: see `mamba_core.backend.Backend.build`."""

    def forward(
        self, inputs: Tensor, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Hidden:
        observe = reporting(observe)
        hidden, state = self._run(inputs, state, mask, segment_ids, observe)
        return Hidden(observe("hidden", self._masked(hidden, mask)), state)


MODELS = {"lm": LanguageModel, "features": FeatureModel, "layers": FeatureModel}
