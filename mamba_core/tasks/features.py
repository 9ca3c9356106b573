"""Models without a head: the normalised residual stream of token ids, or one vector of each row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mamba_core.spec.graph import Node
from mamba_core.spec.ops.pooling import POOLINGS
from mamba_core.tasks import base
from mamba_core.tasks.base import expect_one_of


@dataclass(frozen=True)
class Task(base.Task):
    """pooling: None for the hidden states of all positions, (b, l, d), or how they become one vector a row, (b, d)."""

    suffix: ClassVar[str | None] = "Model"
    pooling: str | None = None

    def __post_init__(self) -> None:
        expect_one_of("pooling", self.pooling, (None, *POOLINGS))

    @property
    def of_rows(self) -> tuple[str, ...]:
        return () if self.pooling is None else ("hidden",)

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        if self.pooling is None:
            yield from super().closing(config, residual)
            return
        norm, _ = super().closing(config, residual)
        yield norm
        yield Node("hidden", "pooled", ("norm_f",), settings={"pooling": self.pooling})
