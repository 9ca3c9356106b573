"""mambapy.mamba over ours: the residual blocks of Mamba alone, from (b, l, d) to (b, l, d), and their step."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mamba_core.backend import State
from mamba_core.backends.torch import blocks
from mamba_core.compat.wrapped import Wrapped, detached, refuse, seeded
from mamba_core.weights.configs import read_config


@dataclass
class MambaConfig:
    """mambapy's fields and defaults. pscan and use_cuda choose how, not what, and are left to `mamba_core.kernels`."""

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
    base_std: float = 0.02
    bias: bool = False
    conv_bias: bool = True
    inner_layernorms: bool = False
    mup: bool = False
    mup_base_width: float = 128
    pscan: bool = True
    use_cuda: bool = False

    architecture: ClassVar[str] = "mamba"

    def __post_init__(self) -> None:
        self.d_inner = self.expand_factor * self.d_model
        if self.dt_rank == "auto":
            self.dt_rank = math.ceil(self.d_model / 16)

    def fields(self) -> dict[str, Any]:
        """As a checkpoint of mambapy would tell them."""
        return dataclasses.asdict(self)


def ours(config: Any, **told: Any):
    """Our config of the same model; told: what theirs does not say.

    Raises:
        ValueError: a field has a value that ours cannot have, such as mup=True.
    """
    return read_config("mambapy", config.fields(), architecture=config.architecture, told=told)


class Core(Wrapped):
    """Blocks alone, of any of mambapy's configs."""

    def __init__(self, config: Any):
        super().__init__(seeded(ours(config, task="layers", vocab_size=1)), "mambapy")
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.core(inputs_embeds=x).hidden

    def step(self, x: Tensor, caches: list) -> tuple[Tensor, list]:
        """x (b, d) and a cache for each layer; the caches are replaced in their list, as there.

        A cache of Mamba is (h (b, e, n) or None, the last inputs of the convolution (b, e, d_conv - 1)).
        """
        output = self.core(state=state_of(self.core, caches, len(x)), inputs_embeds=x[:, None])
        put_back(output.state, caches)
        return output.hidden[:, 0], caches


class Mamba(Core):
    pass


class RMSNorm(blocks.RMSNorm):
    def __init__(self, d_model: int, eps: float = 1e-5, use_mup: bool = False):
        if use_mup:
            raise ValueError("use_mup=True: norms without weights, of muP, are not there")
        super().__init__(d_model, eps)
        nn.init.ones_(self.weight)


# --- their caches and our states -----------------------------------------------------------------


def state_of(core: Any, caches: list, rows: int) -> State:
    """Ours of a cache for each layer: (h, inputs) of Mamba, (keys, values) (b, heads, l, p) of attention."""
    if len(caches) != len(core.backbone.layers):
        raise ValueError(f"{len(caches)} caches are given; expected one for each of {len(core.backbone.layers)} layers")
    begun = core.init_state(rows)
    return State(tuple(_layer(*pair) for pair in zip(begun.layers, caches, strict=True)), begun.segment)


def put_back(state: State, caches: list) -> None:
    """The caches after a call, in their list."""
    caches[:] = [_cache(layer) for layer in detached(state).layers]


def _layer(begun: Any, cache: tuple):
    first, second = cache
    if "ssm" in begun._fields:
        return type(begun)(second.mT.to(begun.conv), begun.ssm if first is None else first.to(begun.ssm))
    if first is None:
        return begun
    filled = torch.full_like(begun.filled, first.shape[2])
    return type(begun)(*(value.transpose(1, 2).to(begun.keys) for value in cache), filled)


def _cache(layer: Any) -> tuple:
    if "ssm" in layer._fields:
        return layer.ssm, layer.conv.mT
    return tuple(value[:, : int(layer.filled.max())].transpose(1, 2) for value in (layer.keys, layer.values))


_WHOLE = "its layers are inside a model of ours here; take Mamba"
__getattr__ = refuse(__name__, dict.fromkeys(("MambaBlock", "ResidualBlock", "pscan"), _WHOLE))
