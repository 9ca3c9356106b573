"""Jamba (Lieber et al. 2024, arXiv:2403.19887): Mamba-1 with some layers of attention, and mixtures of experts.

Its Mamba layers norm dt, B and C, with weights. Its attention has no positions. Each block has a feed-forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mamba_core.architectures import mamba
from mamba_core.architectures.base import MAX_SIZE, Balance, Traits, is_int, is_number, is_size
from mamba_core.architectures.mamba import SelectiveConfig
from mamba_core.spec.blocks import hybrid
from mamba_core.spec.blocks.attention import Attention
from mamba_core.spec.blocks.feed_forward import FeedForward
from mamba_core.spec.graph import Node
from mamba_core.spec.init import normal, ones
from mamba_core.spec.params import Parameter


@dataclass(frozen=True, kw_only=True)
class JambaConfig(SelectiveConfig):
    """Jamba, with the defaults of transformers, which are the sizes of Jamba-v0.1.

    Attributes:
        d_intermediate: width of the feed-forwards and of each expert.
        num_heads, num_kv_heads: of attention's queries, and of its keys and values, which divide them.
        attn_layer_period, attn_layer_offset: layer i has attention where i % period == offset, else Mamba.
        num_experts, num_experts_per_tok: how many there are, and how many compute a position; 1 expert is no mixture.
        expert_layer_period, expert_layer_offset: layer i has a mixture where i % period == offset.
        router_aux_loss_coef: weight of the loss that draws routers towards equal use of experts (equations 4 to 6 of
            Fedus et al. 2021, arXiv:2101.03961), in training; 0 for none.

    The other fields are `SelectiveConfig`'s.
    """

    d_model: int = 4096
    n_layer: int = 32
    vocab_size: int = 65536
    norm_eps: float = 1e-6
    residual_in_fp32: bool = False
    tie_embeddings: bool = False
    pad_vocab_size_multiple: int = 1
    rescale_prenorm_residual: bool = False
    d_intermediate: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    num_experts: int = 16
    num_experts_per_tok: int = 2
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    router_aux_loss_coef: float = 0.0

    architecture: ClassVar[str] = "jamba"
    NOT_OF_STATE: ClassVar[tuple[str, ...]] = (*SelectiveConfig.NOT_OF_STATE, "router_aux_loss_coef")

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("d_intermediate", "num_heads", "num_kv_heads", "num_experts", "num_experts_per_tok")
        self.expect(f"an integer from 1 to {MAX_SIZE}", is_size, *sizes, "attn_layer_period", "expert_layer_period")
        for kind in ("attn", "expert"):
            period = getattr(self, f"{kind}_layer_period")
            expected = f"an integer from 0 to {period - 1}, less than {kind}_layer_period"
            self.expect(expected, partial(_is_below, period), f"{kind}_layer_offset")
        self.expect("a number >= 0", lambda v: is_number(v) and v >= 0, "router_aux_loss_coef")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; expected a divisor of d_model, {self.d_model}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; expected a divisor of num_heads, {self.num_heads}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; expected at most num_experts, {self.num_experts}"
            )

    @property
    def balance(self) -> Balance | None:
        mixes = any(self.feed_forward(layer).experts for layer in range(self.n_layer))
        return (
            Balance(self.router_aux_loss_coef, self.num_experts_per_tok)
            if mixes and self.router_aux_loss_coef
            else None
        )

    def attention(self, layer: int) -> Attention | None:
        """The sizes of a layer's attention; None for a layer of Mamba."""
        if layer % self.attn_layer_period != self.attn_layer_offset:
            return None
        return Attention(self.num_heads, self.num_kv_heads, self.d_model // self.num_heads)

    def feed_forward(self, layer: int) -> FeedForward:
        """The sizes of a layer's feed-forward."""
        if self.num_experts > 1 and layer % self.expert_layer_period == self.expert_layer_offset:
            return FeedForward(self.d_intermediate, self.num_experts, self.num_experts_per_tok)
        return FeedForward(self.d_intermediate)


def _is_below(period: int, value: Any) -> bool:
    return is_int(value) and 0 <= value < period


Config = JambaConfig
TRAITS = Traits()
_MINI: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PRESETS = {
    "jamba-v0.1": JambaConfig(**_MINI),
    "jamba-1.5-mini": JambaConfig(**_MINI),
    "jamba-1.5-large": JambaConfig(d_model=8192, n_layer=72, d_intermediate=24576, num_heads=64, dt_rank=512, **_MINI),
    "jamba-reasoning-3b": JambaConfig(
        d_model=2560,
        n_layer=28,
        d_intermediate=8192,
        num_heads=20,
        num_kv_heads=1,
        attn_layer_period=14,
        attn_layer_offset=7,
        num_experts=1,
        num_experts_per_tok=1,
        dt_rank=160,
        tie_embeddings=True,
        bos_token_id=1,
        eos_token_id=(2, 519),
        pad_token_id=0,
    ),
}


blocks = hybrid.blocks
state = mamba.state


def parameters(config: JambaConfig) -> Iterator[Parameter]:
    """Initial values: Mamba's layers as mamba_ssm's, the others normal as in transformers."""
    return hybrid.parameters(config, _layer_parameters, lambda fan_in, last: normal(config.initializer_range))


def _layer_parameters(layer: int, config: JambaConfig) -> Iterator[Parameter]:
    yield from mamba.layer_parameters(layer, config)
    for name, letter, size in _selection(config):
        weight = f"backbone.layers.{layer}.mixer.{name}_norm.weight"
        yield Parameter(weight, letter, (size,), ones, decay=False)


def graph(config: JambaConfig, residual: str) -> Iterator[Node]:
    return hybrid.graph(config, residual, partial(mamba.layer_graph, scan=_scan))


def _selection(config: JambaConfig) -> tuple[tuple[str, str, int], ...]:
    """(name, letter, size) of what x_proj gives."""
    n = config.d_state
    return ("dt", "r", config.dt_rank_size), ("B", "n", n), ("C", "n", n)


def _scan(layer: int, config: Any) -> Iterator[Node]:
    here, mixer = f"layers.{layer}.", f"backbone.layers.{layer}.mixer."
    for name, _, _ in _selection(config):
        weight = {"weight": f"{mixer}{name}_norm.weight"}
        yield Node(f"{here}{name}_norm", "rms_norm", (here + name,), weight, {"eps": config.norm_eps})
    yield mamba.linear(layer, "dt_proj", "dt_norm")
    yield mamba.scan_node(layer, ("conv", "dt_proj", "B_norm", "C_norm", "z"))
    yield mamba.linear(layer, "out_proj", "scan", config.bias)
