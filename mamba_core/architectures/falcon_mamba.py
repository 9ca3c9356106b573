"""FalconMamba (Zuo et al. 2024, arXiv:2410.05355): Mamba-1 whose dt, B and C are normalised.

It differs from `mamba` in one place: after x_proj each of dt, B and C passes an RMS norm without a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mamba_core.architectures import mamba
from mamba_core.architectures.base import is_positive
from mamba_core.architectures.mamba import TRAITS, SelectiveConfig, blocks, parameters, state
from mamba_core.spec.graph import Node

__all__ = ["PRESETS", "TRAITS", "Config", "FalconMambaConfig", "blocks", "graph", "parameters", "state"]


@dataclass(frozen=True, kw_only=True)
class FalconMambaConfig(SelectiveConfig):
    """The fields of `SelectiveConfig`, and one more.

    Attributes:
        mixer_rms_eps: added to the mean square in the norms of dt, B and C.
    """

    mixer_rms_eps: float = 1e-6

    architecture: ClassVar[str] = "falcon_mamba"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("a positive number", is_positive, "mixer_rms_eps")


Config = FalconMambaConfig
PRESETS = {
    "falcon-mamba-7b": FalconMambaConfig(
        d_model=4096,
        n_layer=64,
        vocab_size=65024,
        pad_vocab_size_multiple=1,
        tie_embeddings=False,
        rescale_prenorm_residual=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=11,
        pad_token_id=11,
    ),
}


def graph(config: FalconMambaConfig, residual: str) -> Iterator[Node]:
    return mamba.graph(config, residual, _scan)


def _scan(layer: int, config: FalconMambaConfig) -> Iterator[Node]:
    here = f"layers.{layer}."
    for name in ("dt", "B", "C"):
        yield Node(f"{here}{name}_norm", "unit_rms_norm", (here + name,), settings={"eps": config.mixer_rms_eps})
    yield mamba.linear(layer, "dt_proj", "dt_norm")
    yield mamba.scan_node(layer, ("conv", "dt_proj", "B_norm", "C_norm", "z"))
    yield mamba.linear(layer, "out_proj", "scan", config.bias)
