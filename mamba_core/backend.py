"""What a backend exports, documented once. A backend's own docstrings say only what is particular to it.

A backend is the module or object that the entry-point group "mamba_core.backends" names. Array means that framework's
array type. Letters are those of `mamba_core.spec.dims`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mamba_core.call import Call

Array = Any
Model = Any
Observe = Callable[[str, Array], None]


class LayerState(NamedTuple):
    """What one Mamba layer carries from position to position.

    conv: (b, k-1, e) in the compute dtype, the last inputs of the convolution, oldest first.
    ssm: (b, e, n) float32, the state h of the recurrence.
    """

    conv: Array
    ssm: Array


class State(NamedTuple):
    """What a model carries: a value, never changed in place, the same type for prefill, chunk and step.

    layers: one entry a layer, a NamedTuple of arrays whose first axis is the batch, as `mamba_core.spec.state` has
        them; one without fields for a layer that carries nothing.
    segment: (b,) int32, the segment id of each row's last position that counted.
    """

    layers: tuple
    segment: Array


class Output(NamedTuple):
    """logits: (b, l, v) float32, v the padded vocabulary, or as the task says. state: after the last position."""

    logits: Array
    state: State


class Hidden(NamedTuple):
    """hidden: in the compute dtype, what comes before a head, (b, l, d), or (b, d) pooled. state: after the last
    position."""

    hidden: Array
    state: State


class Forecast(NamedTuple):
    """What follows a series.

    forecast: (b, h, c) float32, or (b, h, c, q) of q quantiles: h positions of c channels. state: after the last
    position. location, scale: (b, c) float32, by which the series was normalised; None where it was not.
    """

    forecast: Array
    state: State
    location: Array | None
    scale: Array | None


class Context(NamedTuple):
    """What a choice depends on beside the logits; logits processors are given it. Arrays of fixed shapes.

    last: (b,) int, each row's last token; 0 where there is none.
    prompt: (b, v) bool, the tokens that stand in the prompt.
    counts: (b, v) int32, how often each has been generated.
    step: () int32, how many tokens a row has been given.
    bias: (v,) float32, added to the logits; or None.
    """

    last: Array
    prompt: Array
    counts: Array
    step: Array
    bias: Array | None


class Choice(NamedTuple):
    """One token a row.

    tokens: (b,) int.
    logprobs: (b,) float32, its log-probability under the logits as they came; NaN or -inf where there is no token.
    top_tokens, top_logprobs: (b, top_logprobs), the likeliest under them, the lower id first among equals; or None.
    """

    tokens: Array
    logprobs: Array
    top_tokens: Array | None = None
    top_logprobs: Array | None = None


class Carry(NamedTuple):
    """What decoding carries from token to token: arrays on the model's device, of fixed shapes between two growths.

    choice: the last tokens. state: before them. context: with them, or None where no choice depends on it.
    """

    choice: Choice
    state: State
    context: Context | None


class Mixer(Protocol):
    """What mixes positions in a block: `Mixer` in `backends/<backend>/mixers/<kind>.py`, the framework's own module.

    A mixer says in its own class body for which fast ways it was written; a subclass does not inherit that.
    """

    def __init__(self, config: Any, layer: int, options: Any) -> None:
        """options: the backend's, such as the policy of kernels and the dtype."""

    def __call__(self, hidden: Array, state: Any, call: Call) -> tuple[Array, Any]:
        """hidden (b, l, d) and the layer's state to (b, l, d) and the state after the last position."""


class Taken(NamedTuple):
    """Blocks that a way computes.

    count: how many of the first blocks.
    run: (residual, pending, states) -> (residual, pending, states). residual is the residual stream (b, l, d), pending
        what is still to be added to it or None, states those of the blocks.
    """

    count: int  # type: ignore[assignment]  # tuples have a method of that name
    run: Callable


class Way(Protocol):
    """One way to compute consecutive blocks: a module in `backends/<backend>/ways`. The plain way takes every block.

    A model names no way. The ways are asked in the order of their ranks, and each decides wholly: it takes mixers of
    the exact types that it was written for, norms and projections that nobody has replaced or hooked, and calls that it
    computes as the plain way would.
    """

    RANK: int

    def take(self, blocks: Sequence, residual: Array, states: Sequence, call: Call) -> Taken | str:
        """What it computes of the first of these blocks here and now, or why not even the first."""


class Explained(NamedTuple):
    """Which way computes some consecutive layers.

    first, last: the layers. way: its name. passed_over: a faster way's name -> why it does not compute the first.
    """

    first: int
    last: int
    way: str
    passed_over: Mapping[str, str]


class Foreign(NamedTuple):
    """What makes a model another than its parameter table says.

    names: of parameters and persistent buffers that the table does not have, outside the changed layers.
    changed: path of a module that has parameters of the table inside, and is of another class, or has not just those
        parameters -> what stands there.
    hooked: path of a layer that is of the right class with the right parameters, and is patched or has hooks -> what
        was done to it. The table holds its parameters.
    """

    names: tuple[str, ...] = ()
    changed: Mapping[str, str] = {}
    hooked: Mapping[str, str] = {}


class Backend(Protocol):
    """The functions of a backend: a module, or any object that has them.

    Dtypes: x, delta, z, B, C in the compute dtype (float32, bfloat16, float16); A, D, delta_bias and the state
    of the recurrence in float32. All arithmetic of the recurrence is float32; y returns in the dtype of x.
    A float64 input is computed in float64 where the framework has it.
    """

    name: str

    # --- the ops -----------------------------------------------------------------------------------

    def op(self, name: str) -> Any:
        """What has the functions of an op, such as `selective_scan` and `selective_step` for "selective_scan".

        Their signatures are those of the functions in `mamba_core.ops`, and `mamba_core.spec.ops` is what they
        compute. In our own backends it is the module `ops/<name>.py`.

        Raises:
            ValueError: there is no such op.
        """

    def available_kernels(self, device: str | None = None) -> dict[str, dict[str, str | None]]:
        """Op -> its kernels, the fastest for that device first and the plain one last.

        A kernel's value is None if it runs there, else why it does not.
        """

    # --- arrays ------------------------------------------------------------------------------------

    def devices(self) -> list[str]:
        """What can be computed on here, the default first: "cpu", "cuda", "mps", "gpu", "tpu"."""

    def from_numpy(self, value, dtype: str | None = None, device: str | None = None) -> Array:
        """A NumPy array (ml_dtypes for bfloat16) as an array of this framework, copied."""

    def to_numpy(self, array: Array) -> Any:
        """The array as NumPy, on the host; bfloat16 as `ml_dtypes.bfloat16`."""

    def on_device(self, device: str) -> Any:
        """A context in which ops are computed on that device, as far as their arrays do not say where."""

    def device_facts(self, device: str) -> Mapping[str, str]:
        """The name of the device and the versions of what computes there: what a kernel's self-test holds for.

        Raises:
            RuntimeError, ValueError, AssertionError: there is no such device.
        """

    def peak_memory(self, device: str) -> int | None:
        """The most bytes of the device's own memory that were in use at once; None for a CPU or where nobody knows."""

    def vjp(self, function: Callable, arguments: Sequence[Array], cotangents: Sequence[Array]) -> tuple[list, list]:
        """(outputs, gradients) of a function of arrays that returns a tuple of arrays, all as NumPy.

        gradients[i] is that of sum_j <outputs[j], cotangents[j]> with respect to arguments[i]; the framework's
        own differentiation is what is run. What the conformance suite compares.
        """

    # --- models ------------------------------------------------------------------------------------

    def build(
        self,
        config,
        parameters: Iterable[tuple[str, Any]],
        *,
        dtype: str = "float32",
        device: str | None = None,
        kernels: Any = "auto",
    ) -> Model:
        """The framework's own module with these values.

        Args:
            config: such as `MambaConfig`.
            parameters: (canonical name, NumPy array) for every parameter, taken one at a time and not kept.
            dtype: the compute dtype; parameters that the table keeps in float32 stay so.
            kernels: what `mamba_core.kernels.Kernels.read` takes: "auto", "plain", or kernels by op.

        The model has `backend` (the backend's name), `config`, `dtype` and `device` (strings), `policy` (the `Kernels`
        that was asked for), `kernels` (op -> the kernel that is chosen now), `init_state(batch) -> State`, and

            model(input_ids, state=None, *, inputs_embeds=None, mask=None, segment_ids=None, observe=None) -> Output

        input_ids (b, l) int; or inputs_embeds (b, l, d) in any float dtype in their place, which are what the embedding
        would give, and in which the output is differentiable. mask and segment_ids as in `selective_scan`. With a state
        it goes on exactly where that left off, and without segment_ids in the segment where that left off. logits are
        zero at masked positions; a row of input_ids outside the vocabulary raises or gives NaN, never numbers.
        observe(name, array) is called with the value of every node of the block graph.

        `model.remat`, False at first, may be set to True: a gradient then keeps no more of a block than its inputs, and
        computes the block again.

        The inputs and the output are the task's (`mamba_core.tasks`), and so are further arguments. A model without a
        head is called the same way, model(inputs, state=None, ...) -> Hidden, with hidden zero at masked positions:
        inputs are input_ids for task "features", and for task "layers" inputs_embeds. A task whose output has one entry
        a row takes no segment_ids; its output is of the positions of the call, and its state goes on as always.

        A module that is not as it was built (replaced, wrapped, subclassed, patched or hooked) is called, on every
        path, or refused with a TypeError that names it; that of the model itself too. `mamba_core.wrappers` names what
        may be wrapped around a model.
        """

    def explain(
        self, model: Model, batch: int = 1, length: int = 1
    ) -> Sequence[tuple[int, int, str, Mapping[str, str]]]:
        """The fields of an `Explained` for each run of layers, for a call without gradients. Nothing is run."""

    def parameters(self, model: Model, merge: bool = False) -> Mapping[str, Any]:
        """Canonical name -> NumPy array in the stored dtype, in the table's order; copied when it is asked for.

        merge: give layers that were changed as the weights that compute the same: `mamba_core.merging.merged`.

        Raises:
            ValueError: the table cannot hold all of the model: `mamba_core.merging.check_held`.
        """

    def foreign(self, model: Model) -> Foreign:
        """What the model has beside its table."""

    def layer(self, model: Model, path: str, inputs: Any) -> Any:
        """The output of the layer at a canonical path, NumPy to NumPy, as `mamba_core.merging.merged` calls it."""

    def loss_and_gradients(self, model: Model, batch, mask=None) -> tuple[float, dict[str, Any]]:
        """The loss of the model's task, and its gradient by canonical name, as NumPy.

        batch: of a labelled task what `Task.checked_batch` takes, without the mask argument. Else tokens (b, l+1) NumPy
        with mask (b, l+1): the mean cross-entropy of tokens[:, 1:] given tokens[:, :-1] over the targets that count.

        Raises ValueError for a model of a task without a loss, and where the table cannot hold all of the model.
        """

    # --- decoding and training ---------------------------------------------------------------------

    def prefill(self, model: Model, tokens, mask, state: State | None = None) -> Output:
        """Logits (b, v) float32 at the last column, padded vocabulary removed, and the state after it; compiled.

        Args:
            tokens: (b, l) NumPy ints, or (b, l, d) float32 in the place of their embeddings; l at least 1, left-padded.
            mask: (b, l) bool, False at the padding.
            state: what the tokens go on from. A row that is all padding leaves it as it was; its logits mean nothing.
        """

    def infer(self, model: Model, inputs, state: State | None = None, **arrays) -> Any:
        """What the model's call gives, without gradients, in the backend's arrays; compiled where that pays.

        Args:
            inputs: what the task's model is called with, NumPy or of the backend; not changed, nor is the state.
            arrays: what else the call takes by name, such as mask; None for one that is not given.
        """

    def fork(self, values: Any, rows) -> Any:
        """Rows of a tree of arrays, such as a `State` or an `Output`: row rows[i] (NumPy ints) becomes row i."""

    def with_room(self, config, state: State, positions: int) -> State:
        """The state with room for so many more positions in every row: `mamba_core.spec.state.with_room`."""

    def cut(self, config, state: State, kept: Mapping[int, Any]) -> State:
        """The state with so many positions of each row alone, by layer, (b,) NumPy: `mamba_core.spec.state.cut`."""

    def decode(
        self, model: Model, prefilled: Output, sampling, *, context: Context | None = None, draw=None, limit=None
    ) -> Iterable[Choice]:
        """The continuations of what was prefilled, one `Choice` of NumPy arrays after another.

        Each backend's `decoding.py` has `begin(prefilled, context, uniform, sampling) -> Carry`, the first token, and
        `advance(model, carry, uniform, sampling) -> Carry`, one more: operations on the device, of fixed shapes, that
        branch on settings alone, so that any number of tokens may be computed before the host looks at one.

        Args:
            prefilled: of `prefill`.
            sampling: a `mamba_core.sampling.Sampling`; order and meaning are documented there.
            context: of NumPy arrays, from `mamba_core.sampling.first_context`.
            draw: a function (start, count) -> (count, b) float32 NumPy, the uniform numbers of the steps from start,
                such as `mamba_core.sampling.Uniforms`; not used, and may be None, where sampling is greedy.
            limit: how many tokens a row will be taken at most; without end if None.
        """

    def choose(self, logits: Array, context: Context | None, uniform: Array | None, sampling) -> Choice:
        """One token a row.

        Args:
            logits: (b, v) float32.
            uniform: (b,) float32 in [0, 1); not used, and may be None, where sampling is greedy.
            context, sampling: as in `decode`.
        """

    def distribution(self, logits: Array, context: Context | None, sampling) -> Array:
        """Probabilities (b, v) float32, up to a factor a row: what `choose` draws from where sampling is not greedy."""

    def trainer(self, model: Model, settings) -> "Trainer":
        """An AdamW trainer of the model, with `mamba_core.training.TrainSettings`.

        Raises ValueError for a model of a task without a loss, and for one of which nothing is trainable.
        """


class Trainer(Protocol):
    """A compiled training step and the optimizer's state. Trains the model that it was given in place.

    It trains what the framework says is trainable, parameters that somebody added included. Those of the table decay as
    the table says, the others if they have two axes or more.
    """

    def step(self, batch) -> tuple[float, float]:
        """One update; returns (loss, gradient norm before clipping). batch: as of `loss_and_gradients`."""

    def evaluate(self, batch, counts=None) -> float:
        """The loss of a labelled task's batch; else the sum of the cross-entropies of those targets that count.

        tokens (b, l+1) NumPy ints; counts (b, l) NumPy bool, of which the model knows nothing. It is computed as `step`
        computes its loss, but without gradients and in evaluation form: dropout and its like do not act. The model, its
        modes, the optimizer and the framework's random numbers are afterwards as they were, so that the steps after it
        have the same bits with or without it. Calls of one shape are compiled once.
        """

    def predict(self, batch) -> Any:
        """The first field of the model's output for a labelled task's batch, as NumPy.

        It is computed as `evaluate` computes its loss: in evaluation form, and nothing is changed.
        """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that is trained, by its canonical name, or where that of the table does not have
        it, by the framework's own path. A shape is that of the table where the table has the parameter."""

    def state(self) -> dict[str, Any]:
        """NumPy arrays: "step", and the moments "m.<name>" and "v.<name>" in float32, of the names of `shapes`.

        That of a model as built is the same on every backend.
        """

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of any backend."""
