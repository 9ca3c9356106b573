"""Token classification: logits of the labels of every position."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.spec.graph import Node
from mamba_core.spec.losses import IGNORED, cross_entropy
from mamba_core.spec.ops.base import counting
from mamba_core.tasks import _labels


@dataclass(frozen=True)
class Task(_labels.Task):
    """A model gives `Output` with logits (b, l, o) float32, o labels, zero at masked positions.

    Targets are numbers of labels (b, l). Those of masked positions do not count in the loss, nor do targets -100, such
    as those of the later pieces of a word. Packed sequences have targets of their own as other positions have.
    """

    suffix: ClassVar[str | None] = "ForTokenClassification"

    bias: bool = True  # as transformers' classes have it

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        norm, _ = super().closing(config, residual)
        yield norm
        yield Node("logits", "head", ("norm_f",), self.score())

    def loss(self, config: Any, output: np.ndarray, targets: Any, mask: Any = None) -> tuple[float, np.ndarray]:
        """Mean cross-entropy of logits (b, l, o) over the targets (b, l) that count."""
        counts = counting(np.shape(output), mask) & (np.asarray(targets) != IGNORED)
        return cross_entropy(output, np.where(counts, targets, 0), counts, self.class_weights)

    def draw_targets(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        drawn = rng.integers(0, self.num_labels, (batch, length))
        return np.where(rng.random((batch, length)) < 0.2, IGNORED, drawn).astype(np.int32)

    def checked_targets(self, config: Any, shape: tuple[int, int], targets: np.ndarray) -> np.ndarray:
        return self.checked_labels(shape, "(b, l)", targets)

    def weight(self, config: Any, targets: np.ndarray, mask: np.ndarray | None) -> float:
        return self.weight_of_labels(targets, counting(targets.shape, mask))
