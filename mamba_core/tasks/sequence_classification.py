"""Sequence classification: logits of a row's labels from one vector of its positions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.spec import losses
from mamba_core.spec.graph import Node
from mamba_core.spec.losses import IGNORED
from mamba_core.spec.ops.base import expect_shape
from mamba_core.spec.ops.pooling import POOLINGS
from mamba_core.tasks import _labels
from mamba_core.tasks.base import expect_one_of

SINGLE, MULTI, REGRESSION = PROBLEMS = ("single_label", "multi_label", "regression")
_THEIRS = "{}_classification"  # transformers' name of the first two


@dataclass(frozen=True)
class Task(_labels.Task):
    """A model gives `Output` with logits (b, o) float32, o labels.

    Attributes:
        pooling: which vector of a row: that of the "last" or the "first" position that counts, their "mean", or the
            "max" of each channel. It is zero for a row of which nothing counts, which does not count in the loss.
        problem_type: "single_label", of which targets are numbers of labels (b,); "multi_label", with targets (b, o)
            from 0 to 1; or "regression", with targets (b, o), or (b,) where o is 1. By default the first, and the last
            for one label. A target -100 of a single label does not count.
    """

    suffix: ClassVar[str | None] = "ForSequenceClassification"

    pooling: str = "last"
    problem_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_one_of("pooling", self.pooling, POOLINGS)
        expect_one_of("problem_type", self.problem_type, (None, *PROBLEMS))
        if self.problem_type is None:
            object.__setattr__(self, "problem_type", REGRESSION if self.num_labels == 1 else SINGLE)
        if self.problem_type == SINGLE and self.num_labels == 1:
            raise ValueError(f"problem_type is {SINGLE!r} of 1 label, which says nothing; expected 2 labels at least")
        if self.problem_type == REGRESSION and self.class_weights is not None:
            raise ValueError(f"class_weights are given for {REGRESSION!r}, which has no classes")

    @property
    def of_rows(self) -> tuple[str, ...]:
        return "pooled", "logits"

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        norm, _ = super().closing(config, residual)
        yield norm
        yield Node("pooled", "pooled", ("norm_f",), settings={"pooling": self.pooling})
        yield Node("logits", "linear", ("pooled",), self.score())

    def loss(self, config: Any, output: np.ndarray, targets: Any, mask: Any = None) -> tuple[float, np.ndarray]:
        """Mean loss of logits (b, o) over the rows of which a position counts; mask (b, l)."""
        targets = np.asarray(targets)
        rows = _counting(len(output), mask)
        if self.problem_type == SINGLE:
            rows = rows & (targets != IGNORED)
            return losses.cross_entropy(output, np.where(rows, targets, 0), rows, self.class_weights)
        targets = targets.reshape(np.shape(output))
        if self.problem_type == MULTI:
            return losses.binary_cross_entropy(output, targets, rows, self.class_weights)
        return losses.squared_error(output, targets, np.broadcast_to(rows[:, None], targets.shape))

    def draw_targets(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        if self.problem_type == SINGLE:
            return rng.integers(0, self.num_labels, batch).astype(np.int32)
        shape = (batch, self.size)
        if self.problem_type == MULTI:
            return rng.integers(0, 2, shape).astype(np.float32)
        return rng.standard_normal(shape).astype(np.float32)

    def checked_targets(self, config: Any, shape: tuple[int, int], targets: np.ndarray) -> np.ndarray:
        if self.problem_type == SINGLE:
            return self.checked_labels(shape[:1], "(b,)", targets)
        if self.num_labels == 1 and targets.ndim == 1:
            targets = targets[:, None]
        expect_shape("targets", targets, (shape[0], self.size), "(b, o)")
        targets = targets.astype(np.float32)
        if not np.isfinite(targets).all():
            raise ValueError("targets holds values that are not finite; expected numbers")
        if self.problem_type == MULTI and targets.size and not (targets.min() >= 0 and targets.max() <= 1):
            raise ValueError(f"targets holds {targets.min()} to {targets.max()}; expected 0 to 1 for each label")
        return targets

    def weight(self, config: Any, targets: np.ndarray, mask: np.ndarray | None) -> float:
        rows = _counting(len(targets), mask)
        if self.problem_type == SINGLE:
            return self.weight_of_labels(targets, rows)
        return float(rows.sum() * (self.size if self.class_weights is None else sum(self.class_weights)))

    @classmethod
    def read_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        options = super().read_fields(fields)
        if (problem := fields.pop("problem_type", None)) is not None:
            theirs = {_THEIRS.format(name): name for name in (SINGLE, MULTI)}
            options["problem_type"] = theirs.get(problem, problem)
        return options

    def fields(self) -> dict[str, Any]:
        problem = self.problem_type if self.problem_type == REGRESSION else _THEIRS.format(self.problem_type)
        return super().fields() | {"problem_type": problem}


def _counting(batch: int, mask: Any) -> np.ndarray:
    """(b,) bool: the rows of which a position counts."""
    return np.ones(batch, bool) if mask is None else np.asarray(np.asarray(mask).any(1))
