"""What the tasks that give labels have in common: the labels, their weights in the loss, and the linear head."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.architectures.base import is_bool, is_number, is_size
from mamba_core.backend import Output
from mamba_core.spec.init import uniform, zeros
from mamba_core.spec.losses import IGNORED
from mamba_core.spec.ops.base import expect_shape
from mamba_core.spec.params import Parameter
from mamba_core.tasks import base
from mamba_core.tasks.base import SCORE, SCORE_BIAS

_FEWEST = 2  # labels, unless the options say otherwise
_PLAIN = "LABEL_{}"  # what transformers calls a label that has no name


@dataclass(frozen=True)
class Task(base.Task):
    """A linear layer gives logits of labels.

    Attributes:
        num_labels: as many as `labels` by default, or 2.
        labels: their names, in the order of the logits.
        class_weights: the weight of each label in the loss.
        bias: whether the layer has one.
    """

    trains: ClassVar[bool] = True
    labelled: ClassVar[bool] = True
    float32: ClassVar[bool] = True
    output: ClassVar[type] = Output

    num_labels: int | None = None
    labels: tuple[str, ...] | None = None
    class_weights: tuple[float, ...] | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        if self.num_labels is None:
            object.__setattr__(self, "num_labels", _FEWEST if self.labels is None else len(self.labels))
        self._expect("num_labels", is_size(self.num_labels), "an integer from 1")
        named = isinstance(self.labels, tuple) and all(isinstance(label, str) for label in self.labels)
        fits = named and len(set(self.labels or ())) == len(self.labels or ()) == self.num_labels
        self._expect("labels", self.labels is None or fits, f"{self.num_labels} names, all different")
        weights = self.class_weights if isinstance(self.class_weights, tuple) else ()
        fits = len(weights) == self.num_labels and all(is_number(weight) and weight >= 0 for weight in weights)
        known = self.class_weights is None or (fits and any(weights))
        self._expect("class_weights", known, f"{self.num_labels} numbers from 0, not all of them 0")
        self._expect("bias", is_bool(self.bias), "true or false")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {base.shown(getattr(self, name))}; expected {expected}")

    @property
    def size(self) -> int:
        """How many labels there are."""
        assert self.num_labels is not None
        return self.num_labels

    def after(self, config: Any) -> Iterator[Parameter]:
        yield from super().after(config)
        shape = (self.size, config.d_model)
        yield Parameter(SCORE, "od", shape, uniform(config.d_model**-0.5), mup_role="output")
        if self.bias:
            yield Parameter(SCORE_BIAS, "o", shape[:1], zeros, decay=False)

    def score(self) -> dict[str, str]:
        """The parameters of the node that gives the logits."""
        return {"weight": SCORE} | ({"bias": SCORE_BIAS} if self.bias else {})

    def checked_labels(self, shape: tuple[int, ...], letters: str, targets: np.ndarray) -> np.ndarray:
        """Targets that are numbers of labels, or `IGNORED`, as int32."""
        return check_labels(targets, shape, letters, self.size)

    def weight_of_labels(self, targets: np.ndarray, counts: np.ndarray) -> float:
        counts = counts & (targets != IGNORED)
        if self.class_weights is None:
            return float(counts.sum())
        return float(np.asarray(self.class_weights)[targets[counts]].sum())

    @classmethod
    def read_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        options = {}
        if (count := fields.pop("num_labels", None)) is not None:
            options["num_labels"] = count
        fields.pop("label2id", None)
        names = fields.pop("id2label", None)
        if isinstance(names, dict):
            options["num_labels"] = len(names)
            labels = tuple(names.get(str(number), names.get(number)) for number in range(len(names)))
            if None in labels:
                raise ValueError(f"config has id2label {base.shown(names)}; expected the numbers from 0 as its keys")
            if labels != tuple(map(_PLAIN.format, range(len(names)))):
                options["labels"] = labels
        return options

    def fields(self) -> dict[str, Any]:
        labels = self.labels or tuple(map(_PLAIN.format, range(self.size)))
        return {
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }


def check_labels(targets: np.ndarray, shape: tuple[int, ...], letters: str, count: int) -> np.ndarray:
    """Targets of that shape that are numbers of so many labels, or `IGNORED`, as int32.

    Raises:
        TypeError, ValueError: they are others.
    """
    expect_shape("targets", targets, shape, letters)
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets is {targets.dtype}; expected integers, the numbers of labels")
    if targets.size and not ((targets == IGNORED) | ((targets >= 0) & (targets < count))).all():
        raise ValueError(
            f"targets holds {targets.min()} to {targets.max()}; expected 0 to {count - 1}, or {IGNORED} for one that "
            "does not count"
        )
    return targets.astype(np.int32)
