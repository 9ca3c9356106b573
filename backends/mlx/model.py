"""The models: embedding, blocks and final norm, under the canonical parameter names. `heads/` adds the heads."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mamba_core import architectures, routing, tasks
from mamba_core.backend import State
from mamba_core.backends.mlx import ops, stack
from mamba_core.backends.mlx import state as states
from mamba_core.backends.mlx.arrays import check_array, dtype_name, keep_float32, kind_of
from mamba_core.backends.mlx.blocks import Block, RMSNorm
from mamba_core.backends.mlx.mixers import Options
from mamba_core.backends.mlx.positions import call_of
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call
from mamba_core.kernels import Kernels, choose
from mamba_core.spec.checks import check_state
from mamba_core.spec.params import parameter_table
from mamba_core.tasks.base import EMBEDDING, FINAL_NORM

FLOAT64 = "the model is float64, which no MLX GPU has; set_dtype takes float32, bfloat16 and float16"


class Backbone(nn.Module):
    """The residual blocks, with an embedding before them and a norm behind them where the task has these."""

    def __init__(self, config, options: Options):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.remat = False
        self.config = config
        self.policy = options.kernels
        table = parameter_table(config)
        embeds, norms = EMBEDDING in table, FINAL_NORM in table
        self.embeddings = nn.Embedding(config.padded_vocab_size, config.d_model) if embeds else None
        kinds = architectures.of(config).blocks(config)
        self.layers = [Block(config, layer, *kind, options) for layer, kind in enumerate(kinds)]
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, options) if norms else None

    @property
    def dtype(self) -> mx.Dtype:
        """The compute dtype."""
        for norm in (getattr(self.layers[0], "norm", None), self.norm_f):
            if untouched(RMSNorm, norm):
                return norm.weight.dtype
        return _dtype_of(self, "backbone.", self.config)

    def __call__(self, inputs: mx.array, state: State, call: Call) -> tuple[mx.array, State]:
        """With `call.last` the hidden states may be that of the last position only, (b, 1, d)."""
        dtype = self.dtype
        if dtype == mx.float64:
            raise ValueError(FLOAT64)
        # Embeddings come in the place of ids.
        floats = mx.issubdtype(inputs.dtype, mx.floating)
        residual = inputs if floats else self._embed(inputs)
        residual = residual if self.embeddings is None else call.observe("embedding", residual)
        residual = residual.astype(mx.float32 if self.residual_in_fp32 else dtype)
        if call.last and self.norm_f is not None and not untouched(RMSNorm, self.norm_f):
            call = call._replace(last=False)
        residual, pending, layers = stack.run(self.layers, residual, states.entering(state, call), call, self.remat)
        residual = residual if pending is None else residual + pending
        hidden = residual.astype(dtype) if self.norm_f is None else call.observe("norm_f", self._normalise(residual))
        return hidden, states.leaving(layers, state, call)

    def _normalise(self, residual):
        """Its gradient takes several arrays as large as the residual stream, unless the norm is computed again."""
        if not self.remat:
            return self.norm_f(residual)
        run = lambda value: (self.norm_f(value),)  # noqa: E731
        return stack.recomputed_module(self.norm_f, run, self.policy, self.dtype, residual)[0]

    def _embed(self, input_ids):
        """NaN for an id outside the vocabulary: MLX does not check an index, and reads whatever memory is there."""
        # As int64: the size of the vocabulary need not fit into the dtype of the ids.
        input_ids = input_ids.astype(mx.int64)
        inside = (input_ids >= 0) & (input_ids < self.config.padded_vocab_size)
        embedded = self.embeddings(mx.where(inside, input_ids, 0))
        return mx.where(inside[..., None], embedded, mx.array(mx.nan, embedded.dtype))


def _dtype_of(module: nn.Module, prefix: str, config) -> mx.Dtype:
    """The dtype of the first floats that the contract does not keep in float32.

    A quantised weight is of integers, but its scales are of the compute dtype.
    """
    float32 = {name for name, parameter in parameter_table(config).items() if parameter.float32}
    dtypes = (value.dtype for name, value in tree_flatten(module.parameters()) if f"{prefix}{name}" not in float32)
    return next((dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)), mx.float32)


def _fails_on_nothing() -> bool:
    """Whether MLX fails, or ends the process, at operations without elements: such nodes are then not observed.

    Its build for CUDA does, on its CPU too.
    """
    return mx.cuda.is_available()


class Model(nn.Module):
    """What the tasks share. It computes on its own device, whatever MLX's default is at the time.

    `set_dtype` leaves in float32 the parameters that the contract keeps there. `apply` does not: it knows no names.
    """

    backend = "mlx"

    def __init__(self, config, policy: Kernels, device: str):
        super().__init__()
        keep_float32()
        self.config = config
        self.task = tasks.of(config)
        self.policy = policy
        self.device = device
        self.backbone = Backbone(config, Options(policy))

    @property
    def compute_dtype(self) -> mx.Dtype:
        inner = self.inner_backbone()
        return _dtype_of(self, "", self.config) if inner is None else inner.dtype

    @property
    def dtype(self) -> str:
        return dtype_name(self.compute_dtype)

    @property
    def remat(self) -> bool:
        inner = self.inner_backbone()
        return inner is not None and inner.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        self.inner_backbone("remat").remat = value

    @property
    def layers(self) -> list:
        """The blocks, under the name that mlx-lm's tools ask for."""
        return self.inner_backbone("layers").layers

    def inner_backbone(self, use: str | None = None) -> Backbone | None:
        """The backbone, or the one inside of what somebody put in its place; None where there is none.

        Raises:
            TypeError: there is none, and a use is named.
        """
        if isinstance(self.backbone, Backbone):
            return self.backbone
        inside = self.backbone.modules() if isinstance(self.backbone, nn.Module) else []
        found = next((module for module in inside if isinstance(module, Backbone)), None)
        if found is None and use is not None:
            raise TypeError(f"backbone is {kind_of(self.backbone)} without a backbone of this library; {use} needs one")
        return found

    @property
    def kernels(self) -> dict[str, str]:
        """Op -> the kernel that computes it here. Inside `mx.compile` "auto" may be another."""
        available = ops.available_kernels(self.device, self.compute_dtype)
        return {op: choose(self.policy.of(op), kernels, op, "mlx", self.device) for op, kernels in available.items()}

    def on_device(self):
        """A context in which operations are computed on the model's device."""
        return mx.stream(getattr(mx, self.device))

    def init_state(self, batch: int, room: int = 0) -> State:
        """Before the first position. room: how many positions a growing state has memory for."""
        with self.on_device():
            return states.init_state(self.config, batch, self.compute_dtype, room)

    def _run(self, inputs, inputs_embeds, state, mask, segment_ids, observe) -> tuple[mx.array, State]:
        """The backbone's output and the state after it."""
        inputs, kind = self.task.given(inputs, inputs_embeds)
        self._check(inputs, mask, segment_ids, kind)
        return self._run_from(self._opened(inputs, observe), state, mask, segment_ids, observe)

    def _check(self, inputs, mask, segment_ids, kind: str, **extras) -> None:
        for name, value in {kind: inputs, "mask": mask, "segment_ids": segment_ids, **extras}.items():
            check_array(name, value)
        self.task.check(self.config, inputs, mask, segment_ids, kind, extras)

    def _run_from(self, inputs, state, mask, segment_ids, observe) -> tuple[mx.array, State]:
        """The same from what the backbone takes, checked: ids (b, l), or floats (b, l, d)."""
        batch, length = inputs.shape[:2]
        fresh = state is None
        if fresh:
            state = self.init_state(batch, length)
        else:
            check_state(self.config, batch, state)
            check_array("state.segment", state.segment)
            state = states.with_room(self.config, state, length)
        if length == 0 and _fails_on_nothing():
            likes = self.init_state(batch).layers
            layers = tree_map(lambda value, like: value.astype(like.dtype), state.layers, likes)
            return mx.zeros((batch, 0, self.config.d_model), self.compute_dtype), State(layers, state.segment)
        both = not architectures.traits(self.config).causal
        routers = None if self.config.balance is None else routing.collecting()
        how = {"observe": observe, "fresh": fresh, "both": both, "routers": routers}
        call = call_of(mask, segment_ids, length=length, **how)
        return self.backbone(inputs, state, call)

    def _opened(self, inputs, observe):
        """What the backbone is given, of the task's inputs."""
        return inputs

    def _masked(self, values, mask):
        if mask is not None and values.size:
            values = mx.where(mask[..., None], values, mx.zeros((), values.dtype))
        return values

    def set_dtype(self, dtype: mx.Dtype, predicate=lambda dtype: mx.issubdtype(dtype, mx.floating)) -> None:
        if dtype == mx.float64:
            raise ValueError(FLOAT64)
        float32 = {name for name, parameter in parameter_table(self.config).items() if parameter.float32}
        kept = [(name, value) for name, value in tree_flatten(self.parameters()) if name in float32]
        super().set_dtype(dtype, predicate)
        self.load_weights(kept, strict=False)
