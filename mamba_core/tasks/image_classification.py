"""Models that tell which of some classes an image is of: a linear head on the class tokens, or on the mean."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.architectures.base import is_size
from mamba_core.backend import Output
from mamba_core.spec.graph import Node
from mamba_core.spec.init import normal, zeros
from mamba_core.spec.params import Parameter
from mamba_core.tasks import image_features
from mamba_core.tasks.lm import cross_entropy

HEAD = "head"


@dataclass(frozen=True)
class Task(image_features.Task):
    """Its output has logits (b, classes). num_classes: how many there are."""

    num_classes: int = 1000

    output: ClassVar[type] = Output

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
        """Mean cross-entropy of logits (b, classes) against classes (b,) over the rows that count, mask (b,)."""
        return cross_entropy(output, targets, mask)
