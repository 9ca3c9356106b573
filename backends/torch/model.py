"""What the models of all tasks share: embedding, blocks, final norm. `state_dict` has the canonical names."""

import torch
from torch import Tensor, nn

from mamba_core import architectures, routing, tasks
from mamba_core.backend import State
from mamba_core.backends.torch import ops, stack
from mamba_core.backends.torch import state as states
from mamba_core.backends.torch.arrays import anchor
from mamba_core.backends.torch.blocks import Block, RMSNorm
from mamba_core.backends.torch.mixers import Options
from mamba_core.backends.torch.positions import call_of
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call
from mamba_core.kernels import Kernels
from mamba_core.spec.checks import check_state
from mamba_core.spec.params import parameter_table
from mamba_core.tasks.base import EMBEDDING, FINAL_NORM

# Of a model: what its call is made of.
PACKAGE = __name__.rpartition(".")[0]
METHODS = ("forward", "head", "head_weight", "hidden", "_run", "_check", "_run_from", "_opened", "_masked")


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
        self.record()

    def record(self) -> None:
        """Takes the modules as they are for those that were built."""
        self.built = tuple(map(type, self.modules()))

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor().dtype

    @property
    def residual_dtype(self) -> torch.dtype:
        dtype = self.dtype
        return torch.float32 if self.residual_in_fp32 and dtype != torch.float64 else dtype

    def forward(self, inputs: Tensor, state: State, call: Call) -> tuple[Tensor, State]:
        """The output (b, l, d) and the state after it; with call.last, (b, 1, d) may be the last position's output.

        inputs: ids (b, l), or what stands in the place of their embeddings (b, l, d).
        """
        return stack.in_pieces(self, inputs, state, call)

    def forward_piece(self, inputs: Tensor, state: State, call: Call, piece: int | None) -> tuple[Tensor, State]:
        """`forward`, all at once; piece: as in `stack.run`."""
        residual = inputs
        if self.embeddings is not None:
            residual = call.observe("embedding", inputs if inputs.is_floating_point() else self._embed(inputs))
        residual = residual.to(self.residual_dtype)
        if call.last and self.norm_f is not None and not untouched(RMSNorm, self.norm_f):
            call = call._replace(last=False)
        layers = states.entering(state, call)
        residual, pending, layers = stack.run(list(self.layers), residual, layers, call, self.remat, piece)
        if self.norm_f is not None:
            hidden = stack.finish(self.norm_f, residual, pending, self.policy, call, piece)
            hidden = hidden if type(self.norm_f) is RMSNorm else hidden.to(self.dtype)
        else:
            hidden = (residual if pending is None else residual + pending).to(self.dtype)
        return hidden, states.leaving(layers, state, call)

    def is_untouched(self) -> bool:
        """Whether all modules inside are of the classes that were built, and none is patched or has hooks."""
        modules = list(self.modules())
        return tuple(map(type, modules)) == self.built and all(untouched(type(module), module) for module in modules)

    def anchor(self) -> Tensor:
        """A parameter in the compute dtype."""
        norm = getattr(self.layers[0], "norm", None)
        return norm.weight if type(norm) is RMSNorm else anchor(self)

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
    # The class that it was built as.
    built: type | None = None

    def __init__(self, config, policy: Kernels):
        super().__init__()
        self.config = config
        self.task = tasks.of(config)
        states.register(config.facts.types)
        self.policy = policy
        self.backbone = Backbone(config, policy)

    @property
    def dtype(self) -> str:
        return str(self._anchor().dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """Where it computes, also where its parameters are kept elsewhere between calls."""
        found = self._anchor().device
        return str(_execution_device(self) or found) if found.type == "meta" else str(found)

    @property
    def remat(self) -> bool:
        return self.inner.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        self.inner.remat = value

    @property
    def kernels(self) -> dict[str, str]:
        """Op -> the kernel that is chosen for it here and now."""
        return ops.chosen(self.policy, torch.device(self.device), self._anchor().dtype)

    @property
    def inner(self) -> Backbone:
        """The backbone that was built, which may be inside of what stands in its place.

        Raises:
            TypeError: it is not there.
        """
        if type(self.backbone) is Backbone:
            return self.backbone
        found = next((module for module in self.backbone.modules() if isinstance(module, Backbone)), None)
        if found is None:
            raise TypeError(
                f"backbone is {type(self.backbone).__qualname__}; expected the one that was built inside it"
            )
        return found

    def is_untouched(self) -> bool:
        """Whether its call and its backbone's are what was built, so that its parts may be called without it."""
        if self.built is None or not untouched(Backbone, self.backbone):
            return False
        # Asked of the class: a module of this one may have a method's name.
        return all(untouched(self.built, self, method=method) for method in METHODS if hasattr(self.built, method))

    def has_own_ends(self) -> bool:
        """Whether the modules before and behind the backbone are of known classes, and none is patched or has hooks."""
        ends = [child for name, child in self.named_children() if name != "backbone"]
        modules = [module for end in ends for module in end.modules()]
        known = all(type(module).__module__.startswith(("torch.nn.", f"{PACKAGE}.")) for module in modules)
        return known and all(untouched(type(module), module) for module in modules)

    def init_state(self, batch: int, room: int = 0) -> State:
        """Before the first position. room: how many positions a growing state has memory for."""
        return states.init_state(self.config, batch, self._anchor().dtype, torch.device(self.device), room)

    def _anchor(self) -> Tensor:
        backbone = self.backbone
        return backbone.anchor() if type(backbone) is Backbone else anchor(backbone)

    def _run(self, inputs, inputs_embeds, state, mask, segment_ids, observe) -> tuple[Tensor, State]:
        """The backbone's output, and the state after it."""
        inputs, kind = self.task.given(inputs, inputs_embeds)
        self._check(inputs, mask, segment_ids, kind)
        return self._run_from(self._opened(inputs, observe), state, mask, segment_ids, observe)

    def _check(self, inputs, mask, segment_ids, kind: str, **extras) -> None:
        _check_tensors({kind: inputs, "mask": mask, "segment_ids": segment_ids, **extras})
        self.task.check(self.config, inputs, mask, segment_ids, kind, extras)

    def _run_from(self, inputs, state, mask, segment_ids, observe) -> tuple[Tensor, State]:
        """The same from what the backbone takes, checked: ids (b, l), or floats (b, l, d)."""
        batch, length = inputs.shape[:2]
        fresh = state is None
        if fresh:
            state = self.init_state(batch, length)
        else:
            check_state(self.config, batch, state)
            _check_tensors({"segment of the state": state.segment})
            state = states.with_room(self.config, state, length)
        both = not architectures.traits(self.config).causal
        routers = None if self.config.balance is None else routing.collecting()
        how = {"observe": observe, "fresh": fresh, "both": both, "routers": routers}
        call = call_of(mask, segment_ids, length=length, **how)
        return self.backbone(inputs, state, call)

    def _opened(self, inputs, observe):
        """What the backbone is given, of the task's inputs."""
        return inputs

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


def _execution_device(model: nn.Module) -> torch.device | None:
    """Where modules compute whose parameters hooks bring there: accelerate's attribute `_hf_hook` says it."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for own in getattr(hook, "hooks", (hook,)):
            if (device := getattr(own, "execution_device", None)) is not None:
                return torch.device(device)
    return None


def _check_tensors(named: dict) -> None:
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"{name} is {kind}; expected a torch.Tensor, such as torch.as_tensor gives")
