"""Language models: logits of the next token at every position."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.backend import Output
from mamba_core.spec.graph import Node
from mamba_core.spec.init import uniform
from mamba_core.spec.losses import cross_entropy
from mamba_core.spec.params import Parameter
from mamba_core.tasks import base
from mamba_core.tasks.base import EMBEDDING

HEAD = "lm_head.weight"
__all__ = ["HEAD", "Task", "cross_entropy"]


@dataclass(frozen=True)
class Task(base.Task):
    """Its head is the embedding where the config ties them."""

    generates: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    float32: ClassVar[bool] = True
    output: ClassVar[type] = Output
    suffix: ClassVar[str | None] = "ForCausalLM"

    def after(self, config: Any) -> Iterator[Parameter]:
        yield from super().after(config)
        if not config.tie_embeddings:
            d, v = config.d_model, config.padded_vocab_size
            yield Parameter(HEAD, "vd", (v, d), uniform(d**-0.5), mup_role="output")

    def closing(self, config: Any, residual: str) -> Iterator[Node]:
        norm, _ = super().closing(config, residual)
        yield norm
        yield Node("logits", "head", ("norm_f",), {"weight": EMBEDDING if config.tie_embeddings else HEAD})

    def loss(self, config: Any, output: np.ndarray, targets: Any, mask: Any = None) -> tuple[float, np.ndarray]:
        """Mean cross-entropy of logits (b, l, v) against targets (b, l) over the targets that count."""
        return cross_entropy(output, targets, mask)
