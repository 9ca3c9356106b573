"""What a task is: the parameters and nodes around the blocks, the inputs, the output and the loss.

A file exports `Task`, a frozen dataclass that derives from the one here; its fields are the task's own. Each backend
has a file of the same name in `backends/<backend>/heads`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core import architectures
from mamba_core.backend import Hidden
from mamba_core.spec.graph import Node
from mamba_core.spec.init import normal, ones
from mamba_core.spec.ops.base import check_positions, expect_floats, expect_rows, expect_shape, shape_of
from mamba_core.spec.params import Parameter

EMBEDDING = "backbone.embeddings.weight"
FINAL_NORM = "backbone.norm_f.weight"
IDS, EMBEDS = "input_ids", "inputs_embeds"


@dataclass(frozen=True)
class Task:
    """A task without fields of its own, whose model gives hidden states of token ids.

    Attributes:
        inputs: the name of what the model is called with, `IDS` or `EMBEDS`.
        generates: whether the output is logits of the next token.
        trains: whether there is a loss.
        output: the NamedTuple that a call returns; its first field is the last node of the graph.
    """

    inputs: ClassVar[str] = IDS
    generates: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    output: ClassVar[type] = Hidden

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

    def check(self, config: Any, inputs: Any, mask: Any, segment_ids: Any, kind: str | None = None) -> None:
        """Check the arguments of a model's call.

        kind: of the inputs, `IDS` or `EMBEDS`; by default the task's.

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
        expect_rows("the input", batch)
        check_positions(batch, length, mask, segment_ids)
        if segment_ids is not None and not architectures.traits(config).packs:
            raise ValueError(f"{config.architecture} cannot separate packed sequences; give no segment_ids")

    def positions(self, inputs: Any) -> int:
        """The positions that the blocks are given for these inputs."""
        return inputs.shape[1]

    def beginning(self, config: Any, inputs: Any, kind: str) -> np.ndarray:
        """The value that the graph begins with, for the reference; kind as in `check`."""
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

    def loss(self, config: Any, output: np.ndarray, targets: Any, mask: Any = None) -> tuple[float, np.ndarray]:
        """The loss in float64, and its gradient in the output.

        Raises:
            ValueError: the task has none.
        """
        raise ValueError(f"task {config.task!r} has no loss")
