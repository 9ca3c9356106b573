"""What the package MiniMamba computes, which is not Mamba: for checkpoints that were trained with it.

It differs from `mamba` in two places: the dt bias counts twice, and the gate z multiplies without its SiLU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mamba_core.architectures import mamba
from mamba_core.architectures.mamba import TRAITS, SelectiveConfig, blocks, parameters, state
from mamba_core.spec.graph import Node

__all__ = ["PRESETS", "TRAITS", "Config", "MiniMambaConfig", "blocks", "graph", "parameters", "state"]


@dataclass(frozen=True, kw_only=True)
class MiniMambaConfig(SelectiveConfig):
    """The fields of `SelectiveConfig`."""

    architecture: ClassVar[str] = "minimamba"


Config = MiniMambaConfig
PRESETS: dict[str, MiniMambaConfig] = {}


def graph(config: MiniMambaConfig, residual: str) -> Iterator[Node]:
    return mamba.graph(config, residual, _scan)


def _scan(layer: int, config: MiniMambaConfig) -> Iterator[Node]:
    here = f"layers.{layer}."
    yield mamba.linear(layer, "dt_proj", "dt")
    yield mamba.scan_node(layer, ("conv", "dt_proj", "B", "C"), {"delta_bias_factor": 2})
    yield Node(here + "gate", "multiply", (here + "scan", here + "z"))
    yield mamba.linear(layer, "out_proj", "gate", config.bias)
