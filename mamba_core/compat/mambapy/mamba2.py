"""mambapy.mamba2 over ours, which needs no GPU."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mamba_core.compat.mambapy.mamba import Core, RMSNorm
from mamba_core.compat.wrapped import refuse

__all__ = ["Mamba2", "Mamba2Config", "RMSNorm"]


@dataclass
class Mamba2Config:
    """mambapy's fields and defaults. chunk_size chooses how, not what."""

    d_model: int
    n_layers: int
    d_head: int
    d_state: int = 64
    expand_factor: int = 2
    d_conv: int = 4
    n_groups: int = 1
    A_init_range: tuple = (1, 16)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple = (0.0, float("inf"))
    learnable_init_states: bool = False
    activation: str = "swish"
    rms_norm_eps: float = 1e-5
    base_std: float = 0.02
    bias: bool = False
    conv_bias: bool = True
    mup: bool = False
    mup_base_width: float = 128
    chunk_size: int = 256
    use_mem_eff_path: bool = True

    architecture: ClassVar[str] = "mamba2"

    def __post_init__(self) -> None:
        self.d_inner = self.expand_factor * self.d_model
        self.n_heads = self.d_inner // self.d_head

    def fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Mamba2(Core):
    """The blocks alone, (b, l, d) to (b, l, d)."""

    def step(self, x, caches):
        raise NotImplementedError("mambapy has no cache of Mamba-2; call LM.generate, or core with a state")


__getattr__ = refuse(__name__, dict.fromkeys(("Mamba2Block", "ResidualBlock"), "take Mamba2"))
