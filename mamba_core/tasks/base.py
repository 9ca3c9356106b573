"""What a task is: the parameters and nodes around the blocks, the inputs, the output, the targets and the loss.

A file exports `Task`, a frozen dataclass that derives from the one here; its fields are the task's own. Each backend
has a file of the same name in `backends/<backend>/heads`.
"""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core import architectures
from mamba_core.backend import Hidden, State
from mamba_core.spec.graph import NOTHING, Node
from mamba_core.spec.init import normal, ones
from mamba_core.spec.ops.base import check_positions, expect_floats, expect_rows, expect_shape, shape_of
from mamba_core.spec.params import Parameter

EMBEDDING = "backbone.embeddings.weight"
FINAL_NORM = "backbone.norm_f.weight"
SCORE, SCORE_BIAS = "score.weight", "score.bias"
IDS, EMBEDS = "input_ids", "inputs_embeds"
# The node that embeddings given as such stand for.
EMBEDDED = "embedding"


@dataclass(frozen=True)
class Task:
    """A task without fields of its own, whose model gives hidden states of token ids.

    Attributes:
        inputs: the name of what the model is called with, `IDS`, `EMBEDS` or one of the task's own.
        extras: the names of arrays that a call may have beside them.
        generates: whether the output is logits of the next token.
        forecasts: whether the output is the values that follow a series.
        trains: whether there is a loss.
        labelled: whether the loss is of targets that are given beside the inputs, in a batch (`checked_batch`). Else
            the targets are the inputs one position later.
        float32: whether the output is float32 whatever the compute dtype.
        output: the NamedTuple that a call returns; its first field is the last node of the graph.
        suffix: how transformers' classes of this task end, None where it has none.
        marks: tensors in the place of the embedding, which tell a checkpoint of this task.
    """

    inputs: ClassVar[str] = IDS
    extras: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = False
    forecasts: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    labelled: ClassVar[bool] = False
    float32: ClassVar[bool] = False
    output: ClassVar[type] = Hidden
    suffix: ClassVar[str | None] = None
    marks: ClassVar[tuple[str, ...]] = ()

    @property
    def of_rows(self) -> tuple[str, ...]:
        """The nodes that have one entry a row, and no axis of positions."""
        return ()

    @property
    def pools(self) -> bool:
        """Whether the output is such a node."""
        return bool(self.of_rows)

    @property
    def resumes(self) -> bool:
        """Whether a call that is given a state alone goes on where the one before it left off."""
        return True

    def before(self, config: Any) -> Iterator[Parameter]:
        """The parameters before the blocks."""
        shape = (config.padded_vocab_size, config.d_model)
        yield Parameter(EMBEDDING, "vd", shape, normal(config.initializer_range), mup_role="input")

    def after(self, config: Any) -> Iterator[Parameter]:
        """The parameters behind the blocks."""
        yield Parameter(FINAL_NORM, "d", (config.d_model,), ones, decay=False)

    def opening(self, config: Any) -> Iterator[Node]:
        """The nodes before the blocks, the last of which is the residual stream."""
        yield Node("embedding", "embedding", (IDS,), {"weight": EMBEDDING})

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        """The nodes behind the blocks, the last of which is the output."""
        yield Node("norm_f", "rms_norm", (residual,), {"weight": FINAL_NORM}, {"eps": config.norm_eps})
        yield Node("hidden", "masked", ("norm_f",))

    def given(self, inputs: Any, inputs_embeds: Any) -> tuple[Any, str]:
        """What a model is called with, of its first argument and of `inputs_embeds`; and which of the two it is.

        Raises:
            TypeError: both are there, or neither.
        """
        if (inputs is None) == (inputs_embeds is None):
            count = "neither" if inputs is None else "both"
            raise TypeError(f"expected {self.inputs} or {EMBEDS}; {count} given")
        return (inputs_embeds, EMBEDS) if inputs is None else (inputs, self.inputs)

    def check(
        self,
        config: Any,
        inputs: Any,
        mask: Any,
        segment_ids: Any,
        kind: str | None = None,
        extras: Mapping[str, Any] = NOTHING,
    ) -> None:
        """Check the arguments of a model's call.

        kind: of the inputs, `IDS` or `EMBEDS`; by default the task's. extras: those of the task that are given.

        Raises:
            TypeError: the inputs or segment_ids have another kind of dtype, or `mask` is not boolean.
            ValueError: a shape does not fit, or the batch is empty.
        """
        if (kind or self.inputs) == EMBEDS:
            batch, length, _ = shape_of(EMBEDS, inputs, ("b", "l", "d"))
            expect_shape(EMBEDS, inputs, (batch, length, config.d_model), "(b, l, d)")
            expect_floats({EMBEDS: inputs})
        else:
            batch, length = shape_of(IDS, inputs, ("b", "l"))
            if "int" not in str(inputs.dtype):
                raise TypeError(f"{IDS} is {inputs.dtype}; expected integers")
        self._check_positions(config, batch, length, mask, segment_ids)
        if unknown := [name for name in extras if name not in self.extras]:
            raise TypeError(f"a model of task {config.task!r} has no argument {', '.join(unknown)}")

    def _check_positions(self, config: Any, batch: int, length: int, mask: Any, segment_ids: Any) -> None:
        expect_rows("the input", batch)
        check_positions(batch, length, mask, segment_ids)
        if segment_ids is not None and not architectures.traits(config).packs:
            raise ValueError(f"{config.architecture} cannot separate packed sequences; give no segment_ids")
        if segment_ids is not None and self.pools:
            raise ValueError(
                f"a model of task {config.task!r} gives one output a row, not one for each of several packed "
                "sequences; give each a row of its own, and no segment_ids"
            )

    def beginnings(
        self, config: Any, inputs: Any, kind: str, mask: Any, extras: Mapping[str, Any] = NOTHING
    ) -> dict[str, np.ndarray]:
        """What the graph begins with, for the reference, by name; kind and extras as in `check`.

        A node of one of these names is not computed.
        """
        return {kind if kind == self.inputs else EMBEDDED: self.beginning(config, inputs, kind)}

    def check_values(self, config: Any, inputs: Any, mask: Any, extras: Mapping[str, Any] = NOTHING) -> None:
        """Check the values of inputs whose kind and shape `check` has found right.

        Raises:
            ValueError: the graph cannot begin with one of them.
        """
        self.beginnings(config, inputs, self.inputs, mask, extras)

    def positions(self, inputs: Any) -> int:
        """The positions that the blocks are given for these inputs."""
        return inputs.shape[1]

    def beginning(self, config: Any, inputs: Any, kind: str) -> np.ndarray:
        """The first of them in float64, or ids as they are."""
        inputs = np.asarray(inputs)
        if kind == EMBEDS:
            return inputs.astype(np.float64)
        if inputs.size and not (inputs.min() >= 0 and inputs.max() < config.padded_vocab_size):
            raise ValueError(f"{IDS} holds ids outside 0..{config.padded_vocab_size - 1}")
        return inputs

    def draw(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        """Random inputs of a model: (b, l) int32 ids, or (b, l, d) float32 embeddings."""
        if self.inputs == EMBEDS:
            return rng.standard_normal((batch, length, config.d_model), dtype=np.float32)
        return rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32)

    def draw_extras(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> dict[str, np.ndarray]:
        """Random extras for as many inputs, by name."""
        return {}

    def result(self, nodes: dict[str, np.ndarray], state: State) -> Any:
        """What a call of the reference returns, of the values of its nodes in their order."""
        return self.output(nodes[next(reversed(nodes))], state)

    def loss(self, config: Any, output: np.ndarray, targets: Any, mask: Any = None) -> tuple[float, np.ndarray]:
        """The loss in float64, and its gradient in the output.

        Raises:
            ValueError: the task has none.
        """
        raise ValueError(f"task {config.task!r} has no loss")

    # --- of a labelled task ------------------------------------------------------------------------

    def draw_targets(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        """Random targets for as many inputs."""
        raise ValueError(f"task {config.task!r} has no targets beside its inputs")

    def checked_targets(self, config: Any, shape: tuple[int, int], targets: np.ndarray) -> np.ndarray:
        """Targets for inputs of shape (b, l), in the dtype in which a loss takes them.

        Raises:
            TypeError, ValueError: they are of another dtype or shape, or out of range.
        """
        raise ValueError(f"task {config.task!r} has no targets beside its inputs")

    def weight(self, config: Any, targets: np.ndarray, mask: np.ndarray | None) -> float:
        """What the loss of these checked targets is a mean over: how many count, or the sum of their weights."""
        raise ValueError(f"task {config.task!r} has no targets beside its inputs")

    def checked_batch(self, config: Any, batch: Any) -> dict[str, np.ndarray]:
        """A batch with its arrays as NumPy, floats in float32, checked.

        Args:
            batch: a mapping with "inputs" and "targets" and where they are needed "mask", "segment_ids" and the task's
                extras; or the first two, or three, as a sequence.

        Raises:
            TypeError, ValueError: it is none, the model cannot be called with it, or none of its targets counts.
        """
        named = _named(batch, ("inputs", "targets", "mask"))
        known = ("inputs", "targets", "mask", "segment_ids", *self.extras)
        if not {"inputs", "targets"} <= named.keys() <= set(known):
            found, others = ", ".join(map(str, named)), ", ".join(known[2:])
            raise ValueError(f"the batch has {found}; expected inputs and targets, and where needed {others}")
        arrays = {name: np.asarray(value) for name, value in named.items() if value is not None}
        arrays = {
            name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in arrays.items()
        }
        inputs, extras = arrays["inputs"], {name: arrays[name] for name in self.extras if name in arrays}
        self.check(config, inputs, arrays.get("mask"), arrays.get("segment_ids"), extras=extras)
        self.check_values(config, inputs, arrays.get("mask"), extras)
        arrays["targets"] = self.checked_targets(config, inputs.shape[:2], arrays["targets"])
        if not self.weight(config, arrays["targets"], arrays.get("mask")) > 0:
            raise ValueError("no target of the batch counts, so that it has no loss")
        return arrays

    # --- in transformers' words --------------------------------------------------------------------

    @classmethod
    def read_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The task's options that fields of a config.json tell, which are taken out."""
        return {}

    def fields(self) -> dict[str, Any]:
        """The fields of a config.json that tell some of the options."""
        return {}


shown = reprlib.repr  # a value in a message, which has an end


def expect_one_of(name: str, value: Any, expected: Sequence) -> None:
    """Raises ValueError for an option that is none of the expected values."""
    if not any(value is each or (isinstance(value, str) and value == each) for each in expected):
        raise ValueError(f"{name} is {shown(value)}; expected {', '.join(map(repr, expected))}")


def _named(batch: Any, names: Sequence[str]) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, (tuple, list)) and 2 <= len(batch) <= len(names):
        return dict(zip(names, batch, strict=False))
    raise TypeError(f"the batch is {type(batch).__name__}; expected a mapping or a tuple of {', '.join(names)}")
