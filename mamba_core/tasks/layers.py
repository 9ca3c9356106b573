"""The residual blocks alone, without embedding and final norm: from embeddings (b, l, d) to the residual stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mamba_core.spec.graph import Node
from mamba_core.spec.params import Parameter
from mamba_core.tasks import base
from mamba_core.tasks.base import EMBEDS


@dataclass(frozen=True)
class Task(base.Task):
    inputs: ClassVar[str] = EMBEDS

    def before(self, config: Any) -> Iterator[Parameter]:
        return iter(())

    def after(self, config: Any) -> Iterator[Parameter]:
        return iter(())

    def opening(self, config: Any) -> Iterator[Node]:
        return iter(())

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        yield Node("hidden", "masked", (residual,))
