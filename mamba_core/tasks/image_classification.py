"""Models that tell which of some classes an image is of: a linear head on the class tokens, or on the mean."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.architectures.base import is_size
from mamba_core.backend import Output
from mamba_core.spec.graph import Node
from mamba_core.spec.init import normal, zeros
from mamba_core.spec.losses import IGNORED, cross_entropy
from mamba_core.spec.params import Parameter
from mamba_core.tasks import image_features
from mamba_core.tasks._labels import check_labels

HEAD = "head"


@dataclass(frozen=True)
class Task(image_features.Task):
    """Its output has logits (b, classes) float32. num_classes: how many there are.

    Targets are numbers of classes (b,); one that is -100 does not count in the loss.
    """

    num_classes: int = 1000

    output: ClassVar[type] = Output
    trains: ClassVar[bool] = True
    labelled: ClassVar[bool] = True
    float32: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_size(self.num_classes):
            raise ValueError(f"num_classes is {self.num_classes!r}; expected a size")

    def after(self, config: Any) -> Iterator[Parameter]:
        yield from super().after(config)
        shape = (self.num_classes, config.d_model)
        yield Parameter(f"{HEAD}.weight", "md", shape, normal(image_features.SPREAD), mup_role="output")
        yield Parameter(f"{HEAD}.bias", "m", shape[:1], zeros, decay=False)

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        norm, _ = super().closing(config, residual)
        yield norm
        yield Node("classified", "classified", ("norm_f",), settings={"place": self.class_token})
        yield Node("logits", "linear", ("classified",), {"weight": f"{HEAD}.weight", "bias": f"{HEAD}.bias"})

    def loss(self, config: Any, output: np.ndarray, targets: Any, mask: Any = None) -> tuple[float, np.ndarray]:
        """Mean cross-entropy of logits (b, classes) against the classes (b,) that count."""
        counts = np.asarray(targets) != IGNORED
        return cross_entropy(output, np.where(counts, targets, 0), counts)

    def draw_targets(self, config: Any, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
        return rng.integers(0, self.num_classes, batch).astype(np.int32)

    def checked_targets(self, config: Any, shape: tuple[int, int], targets: np.ndarray) -> np.ndarray:
        return check_labels(targets, shape[:1], "(b,)", self.num_classes)

    def weight(self, config: Any, targets: np.ndarray, mask: np.ndarray | None) -> float:
        return float((targets != IGNORED).sum())
