"""What a backend exports, documented once. A backend's own docstrings say only what is particular to it.

A backend is a module-level object named `backend` in the package that the entry-point group
"mamba_core.backends" names. Array means that framework's array type. Letters as in `mamba_core.spec.dims`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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

    layers: one entry a layer, a NamedTuple of arrays whose first axis is the batch.
    segment: (b,) int32, the segment id of each row's last position that counted.
    """

    layers: tuple
    segment: Array


class Output(NamedTuple):
    """logits: (b, l, v) float32, v the padded vocabulary. state: after the last position."""

    logits: Array
    state: State


class Hidden(NamedTuple):
    """hidden: (b, l, d) in the compute dtype, what comes before a head. state: after the last position."""

    hidden: Array
    state: State


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
    """What decoding carries from token to token: arrays of fixed shapes on the model's device.

    choice: the last tokens. state: before them. context: with them, or None where no choice depends on it.
    """

    choice: Choice
    state: State
    context: Context | None


class Backend(Protocol):
    """The functions of a backend.

    Dtypes: x, delta, z, B, C in the compute dtype (float32, bfloat16, float16); A, D, delta_bias and the state
    of the recurrence in float32. All arithmetic of the recurrence is float32; y returns in the dtype of x.
    A float64 input is computed in float64 where the framework has it.
    """

    name: str

    # --- the ops -----------------------------------------------------------------------------------

    def selective_scan(
        self,
        x: Array,
        delta: Array,
        A: Array,
        B: Array,
        C: Array,
        D: Array | None = None,
        *,
        z: Array | None = None,
        delta_bias: Array | None = None,
        delta_softplus: bool = False,
        initial_state: Array | None = None,
        return_final_state: bool = False,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        kernel: str = "auto",
    ) -> Array | tuple[Array, Array]:
        """The S6 recurrence over a sequence (Gu and Dao 2023, equations 2 and 4).

            step_t = softplus(delta_t + delta_bias)                      softplus only if delta_softplus
            h_t    = exp(step_t * A) * h_{t-1} + step_t * B_t * x_t
            y_t    = (sum_n C_t h_t + D * x_t) * silu(z_t)               D and z only if given

        Args:
            x, delta, z: (b, l, e).
            A: (e, n), negative.
            B, C: (b, l, n).
            D, delta_bias: (e,).
            initial_state: (b, e, n), h before the first position; zeros if None.
            mask: (b, l) bool. A False position leaves h as it was and yields zero, wherever it stands.
            segment_ids: (b, l) int. h restarts from zero at a position that counts whose id differs from that
                of the last position that counted. The first position goes on from initial_state.
            kernel: a name from `kernels()`, or "auto" for the fastest that runs on x's device.

        Returns:
            y (b, l, e) in x's dtype, and if return_final_state also h (b, e, n) float32 after the last position
            (the initial state where l is 0). Differentiable in every real argument, through y and the final state.

        Raises:
            ValueError, TypeError: as `mamba_core.spec.checks.check_scan`; a kernel that cannot run here.
        """

    def selective_step(
        self, x, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, state
    ) -> tuple[Array, Array]:
        """One position of `selective_scan`: x, delta, z (b, e); B, C (b, n); state (b, e, n) -> y (b, e), new state."""

    def causal_conv(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        activation: str | None = None,
        initial_state: Array | None = None,
        return_final_state: bool = False,
        mask: Array | None = None,
        segment_ids: Array | None = None,
        kernel: str = "auto",
    ) -> Array | tuple[Array, Array]:
        """A causal filter of width k for each channel: y_t = activation(bias + sum_j weight[:, j] * x_{t-k+1+j}).

        Args:
            x: (b, l, e). weight: (e, k), the newest input's tap last. bias: (e,).
            activation: None or "silu".
            initial_state: (b, k-1, e), the inputs before the first position, oldest first; zeros if None.
            mask, segment_ids: as in `selective_scan`. A position that does not count is absent from every window
                and yields zero; a restart begins from a window of zeros.
            kernel: as in `selective_scan`; all but "native" and "cuda" mean the framework's own operations.

        Returns:
            y (b, l, e) in x's dtype, and if return_final_state also the last k-1 inputs that counted (b, k-1, e)
            in x's dtype. Differentiable in x, weight, bias and initial_state, through both results.
        """

    def causal_conv_step(self, x, weight, bias=None, *, activation=None, state) -> tuple[Array, Array]:
        """One position of `causal_conv`: x (b, e), state (b, k-1, e) -> y (b, e), new state."""

    # --- arrays ------------------------------------------------------------------------------------

    def devices(self) -> list[str]:
        """What can be computed on here, the default first: "cpu", "cuda", "mps", "gpu", "tpu"."""

    def kernels(self, device: str | None = None) -> dict[str, str | None]:
        """Scan kernels, fastest first for that device: name -> None if it runs there, else why it does not."""

    def from_numpy(self, value, dtype: str | None = None, device: str | None = None) -> Array:
        """A NumPy array (ml_dtypes for bfloat16) as an array of this framework, copied."""

    def to_numpy(self, array: Array) -> Any:
        """The array as NumPy, on the host; bfloat16 as `ml_dtypes.bfloat16`."""

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
        kernels: str = "auto",
    ) -> Model:
        """The framework's own module with these values.

        Args:
            config: such as `MambaConfig`.
            parameters: (canonical name, NumPy array) for every parameter, taken one at a time and not kept.
            dtype: the compute dtype; parameters that the table keeps in float32 stay so.
            kernels: a scan kernel by name, or "auto".

        The model has `backend` (the backend's name), `config`, `dtype`, `device` and `kernels` (strings),
        `init_state(batch) -> State`, and

            model(input_ids, state=None, *, mask=None, segment_ids=None, observe=None) -> Output

        input_ids (b, l) int, mask and segment_ids as in `selective_scan`; with a state it goes on exactly where that
        left off, and without segment_ids in the segment where that left off. logits are zero at masked positions;
        a row of input_ids outside the vocabulary raises or gives NaN, never numbers. observe(name, array) is called
        with the value of every node of the block graph.

        `model.remat`, False at first, may be set to True: a gradient then keeps no more of a block than its inputs, and
        computes the block again.

        A model without a head is called the same way, model(inputs, state=None, ...) -> Hidden, with hidden zero at
        masked positions: inputs are input_ids for task "features", and for task "layers" inputs_embeds (b, l, d) in
        any float dtype, in which it is differentiable.
        """

    def parameters(self, model: Model) -> Mapping[str, Any]:
        """Canonical name -> NumPy array in the stored dtype, in the table's order; copied when it is asked for."""

    def loss_and_gradients(self, model: Model, tokens, mask=None) -> tuple[float, dict[str, Any]]:
        """Mean cross-entropy of tokens[:, 1:] given tokens[:, :-1], and its gradient by canonical name, as NumPy.

        tokens (b, l+1) and mask (b, l+1) are NumPy; the mean is over the targets that count. Raises ValueError for a
        model of another task than "lm".
        """

    # --- decoding and training ---------------------------------------------------------------------

    def prefill(self, model: Model, tokens, mask, state: State | None = None) -> Output:
        """Logits (b, v) float32 at the last column, padded vocabulary removed, and the state after it; compiled.

        Args:
            tokens: (b, l) NumPy ints, l at least 1, left-padded; mask: (b, l) bool, False at the padding.
            state: what the tokens go on from. A row that is all padding leaves it as it was; its logits mean nothing.
        """

    def fork(self, values: Any, rows) -> Any:
        """Rows of a tree of arrays, such as a `State` or an `Output`: row rows[i] (NumPy ints) becomes row i."""

    def decode(
        self, model: Model, prefilled: Output, sampling, *, context: Context | None = None, draw=None, limit=None
    ) -> Iterable[Choice]:
        """The continuations of what was prefilled, one `Choice` of NumPy arrays after another.

        Each backend's `decode.py` has `begin(prefilled, context, uniform, sampling) -> Carry`, the first token, and
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

        Raises ValueError for a model of another task than "lm".
        """


class Trainer(Protocol):
    """A compiled training step and the optimizer's state. Trains the model that it was given in place."""

    def step(self, tokens) -> tuple[float, float]:
        """One update from tokens (b, l+1) NumPy ints; returns (loss, gradient norm before clipping)."""

    def state(self) -> dict[str, Any]:
        """NumPy arrays: "step", and the moments "m.<name>" and "v.<name>" in float32. The same on every backend."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of any backend."""
