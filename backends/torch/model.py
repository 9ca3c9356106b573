"""What the models of all tasks share: embedding, blocks, final norm. `state_dict` has the canonical names."""

import torch
from torch import Tensor, nn

from mamba_core import architectures, tasks
from mamba_core.backend import State
from mamba_core.backends.torch import ops, private, stack
from mamba_core.backends.torch import state as states
from mamba_core.backends.torch.blocks import Block, RMSNorm
from mamba_core.backends.torch.mixers import Options
from mamba_core.backends.torch.positions import call_of
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call
from mamba_core.kernels import Kernels
from mamba_core.spec.checks import check_state
from mamba_core.spec.params import parameter_table
from mamba_core.tasks.base import EMBEDDING, FINAL_NORM


class Backbone(nn.Module):
    """The residual blocks, with an embedding before them and a norm behind them where the task has these."""

    def __init__(self, config, policy: Kernels):
        super().__init__()
        self.config, self.policy = config, policy
        self.residual_in_fp32, self.remat = config.residual_in_fp32, False
        table = parameter_table(config)
        embeds, norms = EMBEDDING in table, FINAL_NORM in table
        self.embeddings = nn.Embedding(config.padded_vocab_size, config.d_model) if embeds else None
        kinds, options = architectures.of(config).blocks(config), Options(policy)
        self.layers = nn.ModuleList(Block(config, layer, *kind, options) for layer, kind in enumerate(kinds))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps) if norms else None
        self.built = tuple((type(block.mixer), type(block.feed_forward)) for block in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor().dtype

    @property
    def residual_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual_in_fp32 else self.dtype

    @stack.in_pieces
    def forward(self, inputs: Tensor, state: State, call: Call, piece: int | None) -> tuple[Tensor, State]:
        """The output (b, l, d) and the state after it; with call.last, (b, 1, d) may be the last position's output."""
        residual = inputs if self.embeddings is None else call.observe("embedding", self._embed(inputs))
        residual = residual.to(self.residual_dtype)
        if call.last and self.norm_f is not None and not untouched(RMSNorm, self.norm_f):
            call = call._replace(last=False)
        layers = states.entering(state, call)
        residual, pending, layers = stack.run(list(self.layers), residual, layers, call, self.remat, piece)
        if self.norm_f is not None:
            hidden = stack.finish(self.norm_f, residual, pending, self.policy, call, piece)
        else:
            hidden = (residual if pending is None else residual + pending).to(self.dtype)
        return hidden, states.leaving(layers, state, call)

    def is_untouched(self) -> bool:
        """Whether embedding, blocks, norms and mixers are of the classes that were built, and no module has hooks."""
        blocks = list(self.layers)
        if len(blocks) != len(self.built) or not untouched(Block, *blocks) or private.hooked(*self.modules()):
            return False
        if self.embeddings is not None and not untouched(nn.Embedding, self.embeddings):
            return False
        norms = [norm for block in blocks for norm in (block.norm, block.norm2) if norm is not None]
        kinds = zip(blocks, self.built, strict=True)
        return untouched(RMSNorm, *norms, *([] if self.norm_f is None else [self.norm_f])) and all(
            untouched(mixer, block.mixer) and type(block.feed_forward) is feed_forward
            for block, (mixer, feed_forward) in kinds
        )

    def anchor(self) -> Tensor:
        """A parameter in the compute dtype, on the model's device."""
        try:
            return self.layers[0].norm.weight
        except AttributeError:  # the block or its norm was replaced
            half = (parameter for parameter in self.parameters() if parameter.dtype.itemsize == 2)
            return next(half, None) or next(self.parameters())

    def _embed(self, input_ids):
        """An id outside the vocabulary raises on a CPU and gives NaN elsewhere, where it would end the CUDA context."""
        input_ids = input_ids.long()
        if input_ids.device.type == "cpu":
            return self.embeddings(input_ids)
        inside = (input_ids >= 0) & (input_ids < self.config.padded_vocab_size)
        embedded = self.embeddings(torch.where(inside, input_ids, 0))
        return torch.where(inside[..., None], embedded, torch.nan)


class Model(nn.Module):
    """What the tasks share. `.to(torch.bfloat16)` keeps in float32 the parameters that the table keeps there."""

    backend = "torch"

    def __init__(self, config, policy: Kernels):
        super().__init__()
        self.config = config
        self.task = tasks.of(config)
        states.register(config.facts.types)
        self.policy = policy
        self.backbone = Backbone(config, policy)

    @property
    def dtype(self) -> str:
        return str(self.backbone.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.backbone.anchor().device)

    @property
    def remat(self) -> bool:
        return self.backbone.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        self.backbone.remat = value

    @property
    def kernels(self) -> dict[str, str]:
        """Op -> the kernel that is chosen for it here and now."""
        return ops.chosen(self.policy, torch.device(self.device), self.backbone.dtype)

    def init_state(self, batch: int, room: int = 0) -> State:
        """Before the first position. room: how many positions a growing state has memory for."""
        anchor = self.backbone.anchor()
        return states.init_state(self.config, batch, anchor.dtype, anchor.device, room)

    def _run(self, inputs, state, mask, segment_ids, observe) -> tuple[Tensor, State]:
        """The backbone's output, and the state after it."""
        self.task.check(self.config, inputs, mask, segment_ids)
        batch, length = inputs.shape[:2]
        if state is None:
            state = self.init_state(batch, length)
        else:
            check_state(self.config, batch, state)
            state = states.with_room(self.config, state, length)
        return self.backbone(inputs, state, call_of(mask, segment_ids, length=length, observe=observe))

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
