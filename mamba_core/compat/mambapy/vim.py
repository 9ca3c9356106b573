"""mambapy.vim over ours: the blocks of Vision Mamba, without patches and head. Whole models: `VisionMambaConfig`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mamba_core.compat.mambapy.mamba import Core, RMSNorm
from mamba_core.compat.wrapped import refuse

__all__ = ["MambaConfig", "RMSNorm", "VMamba"]


@dataclass
class MambaConfig:
    """mambapy.vim's fields and defaults."""

    d_model: int
    n_layers: int
    dt_rank: int | str = "auto"
    d_state: int = 16
    expand_factor: int = 2
    d_conv: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: ClassVar[float] = 1e-4
    rms_norm_eps: float = 1e-5
    bias: bool = False
    conv_bias: bool = True
    inner_layernorms: bool = False
    pscan: bool = True
    use_cuda: bool = False
    bidirectional: bool = True
    divide_output: bool = True

    def __post_init__(self) -> None:
        self.d_inner = self.expand_factor * self.d_model
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)

    @property
    def architecture(self) -> str:
        return "vision_mamba" if self.bidirectional else "mamba"

    def fields(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        if not self.bidirectional:
            del found["bidirectional"], found["divide_output"]
        return found


class VMamba(Core):
    """The blocks alone, (b, l, d) to (b, l, d)."""

    def step(self, x: Tensor, caches: list) -> tuple[Tensor, list]:
        if self.config.bidirectional:
            raise NotImplementedError("a reversed direction sees what comes later; call the whole sequence")
        return super().step(x, caches)


__getattr__ = refuse(__name__, dict.fromkeys(("VMambaBlock", "ResidualBlock"), "take VMamba"))
