"""The models: embedding, blocks, final norm, head, as the task has them. The parameters have the canonical names."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mamba_core.backend import Hidden, LayerState, Output, State
from mamba_core.backends.mlx import state as states
from mamba_core.backends.mlx.arrays import dtype_name
from mamba_core.backends.mlx.kernels import linear
from mamba_core.backends.mlx.layers import Block, MambaMixer, RMSNorm
from mamba_core.backends.mlx.recompute import recomputed
from mamba_core.backends.mlx.scan import kernel_for
from mamba_core.observe import reporting, unobserved, within
from mamba_core.spec.checks import check_inputs, check_state
from mamba_core.spec.params import parameter_table

# Bytes of a mixer's widest array, the product with in_proj, that are computed at once on a CPU: much more leaves the
# cache, and is taken from the system anew each time. And the fewest positions of a row.
PIECE_BYTES, FEWEST = 2**23, 256
# Parts into which MLX splits an array by an operation of its own.
SPLIT = 8


class Backbone(nn.Module):
    """Token ids to the normalised residual stream; for task "layers" embeddings to the residual stream itself."""

    def __init__(self, config, kernels: str):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.remat = False
        self.vocabulary = config.padded_vocab_size
        whole = config.task != "layers"
        self.embeddings = nn.Embedding(config.padded_vocab_size, config.d_model) if whole else None
        self.layers = [Block(config, kernels) for _ in range(config.n_layer)]
        self.norm_f = RMSNorm(config.d_model, config.norm_eps) if whole else None

    @property
    def dtype(self) -> mx.Dtype:
        # Of a norm: a quantised embedding is of packed integers.
        return self.layers[0].norm.weight.dtype

    def __call__(
        self, inputs: mx.array, state: State, mask, segment_ids, observe, last: bool = False
    ) -> tuple[mx.array, State]:
        """last: only the last position's hidden state is asked for, and (b, 1, d) will do."""
        residual = inputs if self.embeddings is None else observe("embedding", self._embed(inputs))
        residual = residual.astype(mx.float32 if self.residual_in_fp32 else self.dtype)
        run, layers = _recomputed if self.remat and observe is unobserved else _called, []
        if observe is unobserved and mask is None and segment_ids is None and (piece := self._piece(residual)):
            run = partial(_piecewise, run, piece=piece)
        for index, (block, carried) in enumerate(
            zip(self.layers, states.entering(state, mask, segment_ids), strict=True)
        ):
            if last and index + 1 == len(self.layers) and run is _called and type(block) is Block:
                run = Block.last
            residual, carried = run(block, residual, carried, mask, segment_ids, within(f"layers.{index}.", observe))
            layers.append(carried)
        hidden = residual.astype(self.dtype) if self.norm_f is None else observe("norm_f", self._normalise(residual))
        return hidden, states.leaving(tuple(layers), state, mask, segment_ids)

    def _piece(self, residual) -> int | None:
        """How many positions a block on a CPU is given at once, one piece after the other; None if all.

        Only with the native kernels, which compute at once: what is lazy MLX would compute in an order of its own.
        """
        batch, length, _ = residual.shape
        mixer = self.layers[0].mixer
        if not all(type(block) is Block and type(block.mixer) is MambaMixer for block in self.layers):
            return None
        piece = max(FEWEST, PIECE_BYTES // (2 * len(mixer.A_log) * self.dtype.size * max(1, batch)))
        if length <= piece or kernel_for(mixer.kernels, self.dtype, (residual,)) != "native":
            return None
        return piece

    def _normalise(self, residual):
        """Its gradient takes several arrays as large as the residual stream."""
        if not self.remat:
            return self.norm_f(residual)
        kernels = self.layers[0].mixer.kernels
        return _recomputed_of(self.norm_f, lambda value: (self.norm_f(value),), kernels, self.dtype, residual)[0]

    def _embed(self, input_ids):
        """NaN for an id outside the vocabulary: MLX does not check an index, it reads whatever memory is there."""
        # As int64: the size of the vocabulary need not fit into the dtype of the ids.
        input_ids = input_ids.astype(mx.int64)
        inside = (input_ids >= 0) & (input_ids < self.vocabulary)
        embedded = self.embeddings(mx.where(inside, input_ids, 0))
        return mx.where(inside[..., None], embedded, mx.array(mx.nan, embedded.dtype))


def _called(block, *arguments):
    return block(*arguments)


def _piecewise(run, block, residual, carried, *positions, piece: int):
    """A block of the pieces of the residual stream, each of which goes on from the state that the last has left."""
    pieces = []
    for part in _split(residual, piece):
        part, carried = run(block, part, carried, *positions)
        mx.eval(part)
        pieces.append(part)
    return mx.concatenate(pieces, axis=1), carried


def _split(values, piece: int) -> list[mx.array]:
    """In two or three steps: a slice has a gradient as long as the whole, and into many parts MLX splits by slices."""
    count = -(-values.shape[1] // piece)
    if count == 1:
        return [values]
    size = -(-count // SPLIT) * piece
    parts = mx.split(values, range(size, values.shape[1], size), axis=1)
    return [part for several in parts for part in _split(several, piece)]


def _recomputed(block, residual, carried, *positions):
    # MLX would differentiate in a mask that it is given.
    def run(residual, *carried):
        residual, after = block(residual, LayerState(*carried), *positions)
        return residual, *after

    values, kernels = (residual, *carried), block.mixer.kernels
    residual, *after = _recomputed_of(block, run, kernels, block.norm.weight.dtype, *values, apart=len(values))
    return residual, LayerState(*after)


def _recomputed_of(module, run, kernels, dtype, *values, apart=0):
    """`recomputed`, with the gradients of the module's parameters."""
    trained = dict(tree_flatten(module.trainable_parameters()))

    def run_with(*arguments):
        module.update(tree_unflatten(list(zip(trained, arguments[len(values) :], strict=True))))
        return run(*arguments[: len(values)])

    return recomputed(run_with, kernels, dtype, (*values, *trained.values()), apart)


def _fails_on_nothing() -> bool:
    """Whether MLX fails or ends the process where operations have no elements: such nodes are then not seen.

    So its build for CUDA does, on its CPU too.
    """
    return mx.cuda.is_available()


class Model(nn.Module):
    """What the tasks share. It computes on its own device, whatever MLX's default is at the time.

    `set_dtype` keeps in float32 what the contract keeps there; `apply` does not, it has no names to tell them by.
    """

    backend = "mlx"

    def __init__(self, config, kernels: str, device: str):
        super().__init__()
        self.config = config
        self.chosen_kernels = kernels
        self.device = device
        self.backbone = Backbone(config, kernels)

    @property
    def dtype(self) -> str:
        return dtype_name(self.backbone.dtype)

    @property
    def remat(self) -> bool:
        return self.backbone.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        self.backbone.remat = value

    @property
    def kernels(self) -> str:
        """Outside `mx.compile`, where "auto" is another."""
        return kernel_for(self.chosen_kernels, self.backbone.dtype, device=self.device)

    def on_device(self):
        """A context in which operations are computed on the model's device."""
        return mx.stream(getattr(mx, self.device))

    def init_state(self, batch: int) -> State:
        with self.on_device():
            return states.init_state(self.config, batch, self.backbone.dtype)

    def _run(self, inputs, state, mask, segment_ids, observe) -> tuple[mx.array, State]:
        """What comes before the head, and the state after it."""
        check_inputs(self.config, inputs, mask, segment_ids)
        if state is None:
            state = self.init_state(inputs.shape[0])
        check_state(self.config, inputs.shape[0], state)
        if inputs.shape[1] == 0 and _fails_on_nothing():
            dtype = self.backbone.dtype
            layers = tuple(LayerState(layer.conv.astype(dtype), layer.ssm) for layer in state.layers)
            return mx.zeros((len(inputs), 0, self.config.d_model), dtype), State(layers, state.segment)
        return self.backbone(inputs, state, mask, segment_ids, observe)

    def _masked(self, values, mask):
        if mask is not None and values.size:
            values = mx.where(mask[..., None], values, mx.zeros((), values.dtype))
        return values

    def set_dtype(self, dtype: mx.Dtype, predicate=lambda dtype: mx.issubdtype(dtype, mx.floating)) -> None:
        float32 = {name for name, parameter in parameter_table(self.config).items() if parameter.float32}
        kept = [(name, value) for name, value in tree_flatten(self.parameters()) if name in float32]
        super().set_dtype(dtype, predicate)
        self.load_weights(kept, strict=False)


class LanguageModel(Model):
    """Task "lm": see `mamba_core.backend.Backend.build`."""

    def __init__(self, config, kernels: str, device: str):
        super().__init__(config, kernels, device)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)

    def __call__(
        self, input_ids: mx.array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Output:
        observe = reporting(observe)
        with self.on_device():
            hidden, state = self._run(input_ids, state, mask, segment_ids, observe)
            return Output(observe("logits", self._masked(self.head(hidden), mask)), state)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits in float32 from the backbone's output."""
        if hidden.size == 0 and _fails_on_nothing():
            return mx.zeros((*hidden.shape[:-1], self.config.padded_vocab_size))
        return self._project(hidden).astype(mx.float32)

    def _project(self, hidden):
        embeddings = self.backbone.embeddings
        if not self.config.tie_embeddings:
            return linear.call(self.lm_head, hidden, self.chosen_kernels)
        if type(embeddings) is not nn.Embedding:
            return embeddings.as_linear(hidden)
        return linear.linear(hidden, embeddings.weight, self.chosen_kernels)


class FeatureModel(Model):
    """Tasks "features", from input_ids, and "layers", from inputs_embeds: see `mamba_core.backend.Backend.build`."""

    def __call__(
        self, inputs: mx.array, state: State | None = None, *, mask=None, segment_ids=None, observe=None
    ) -> Hidden:
        observe = reporting(observe)
        with self.on_device():
            hidden, state = self._run(inputs, state, mask, segment_ids, observe)
            return Hidden(observe("hidden", self._masked(hidden, mask)), state)


MODELS = {"lm": LanguageModel, "features": FeatureModel, "layers": FeatureModel}
