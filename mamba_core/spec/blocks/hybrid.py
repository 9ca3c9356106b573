"""Blocks of several kinds: the architecture's own mixer, or attention, and where asked for a feed-forward after it.

Hybrids of Mamba are as https://github.com/state-spaces/mamba builds them (mamba_ssm/models/mixer_seq_simple.py and
mamba_ssm/modules/{mha,mlp}.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mamba_core.architectures.base import MAX_SIZE, BaseConfig, Block, is_bool, is_int, is_number, is_positive, is_size
from mamba_core.spec.blocks import attention, feed_forward
from mamba_core.spec.blocks.attention import Attention
from mamba_core.spec.blocks.feed_forward import FeedForward
from mamba_core.spec.graph import Node
from mamba_core.spec.init import Init, uniform
from mamba_core.spec.ops.attention import Rotary
from mamba_core.spec.params import Parameter

MULTIPLE = 128  # of which the width of mamba_ssm's feed-forwards is one


@dataclass(frozen=True, kw_only=True)
class HybridConfig(BaseConfig):
    """The fields that make hybrids, by mamba_ssm's names. Without them every block is the architecture's own mixer.

    Attributes:
        attn_layer_idx: the layers that have attention in the place of the architecture's mixer.
        attn_cfg: what that attention is, with the defaults of mamba_ssm: num_heads, which has none; num_heads_kv (as
            many), head_dim (d_model / num_heads), qkv_proj_bias and out_proj_bias (true), softmax_scale (1 /
            sqrt(head_dim)), d_conv (0: no convolution of queries, keys and values), rotary_emb_dim (0),
            rotary_emb_base (10000), rotary_emb_interleaved (false); and causal, which must be true.
        d_intermediate: width of a SwiGLU after each mixer, rounded up to a multiple of 128; 0 for none.
    """

    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: Mapping[str, Any] = field(default_factory=dict, hash=False)
    d_intermediate: int = 0

    FIELDS: ClassVar[tuple[str, ...]] = ("attn_layer_idx", "attn_cfg", "d_intermediate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.attn_layer_idx, list):
            object.__setattr__(self, "attn_layer_idx", tuple(self.attn_layer_idx))
        self.expect(f"integers from 0 to {self.n_layer - 1}, layers of this model", self._are_layers, "attn_layer_idx")
        self.expect("a mapping", lambda value: isinstance(value, Mapping), "attn_cfg")
        self.expect(f"an integer from 0 to {MAX_SIZE}", lambda v: v == 0 or is_size(v), "d_intermediate")
        if self.attn_layer_idx:
            _attention(self.attn_cfg, self.d_model)

    def _are_layers(self, value: Any) -> bool:
        return isinstance(value, tuple) and all(is_int(layer) and 0 <= layer < self.n_layer for layer in value)

    def attention(self, layer: int) -> Attention | None:
        return _attention(self.attn_cfg, self.d_model) if layer in self.attn_layer_idx else None

    def feed_forward(self, layer: int) -> FeedForward | None:
        return FeedForward(-(-self.d_intermediate // MULTIPLE) * MULTIPLE) if self.d_intermediate else None

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        if self.attn_layer_idx:
            layers = tuple(sorted(set(self.attn_layer_idx)))
            found |= {"attn_layer_idx": layers, "attn_cfg": tuple(_attention(self.attn_cfg, self.d_model))}
        return found | ({"d_intermediate": self.feed_forward(0)} if self.d_intermediate else {})


def blocks(config: BaseConfig) -> tuple[Block, ...]:
    def block(layer: int) -> Block:
        mixer = config.architecture if config.attention(layer) is None else "attention"
        after = config.feed_forward(layer)
        return Block(mixer, None if after is None else after.kind)

    return tuple(map(block, range(config.n_layer)))


def parameters(
    config: BaseConfig, own: Callable[[int, Any], Iterator[Parameter]], init: Init | None = None
) -> Iterator[Parameter]:
    """own: of a block of the architecture's mixer. init: of the other projections, mamba_ssm's by default."""
    init = _linear(config) if init is None else init
    for layer in range(config.n_layer):
        prefix = f"backbone.layers.{layer}."
        if (sizes := config.attention(layer)) is None:
            yield from own(layer, config)
        else:
            yield from attention.parameters(prefix, sizes, config, init)
        if (after := config.feed_forward(layer)) is not None:
            yield from feed_forward.parameters(prefix, after, config, init)


def graph(config: BaseConfig, residual: str, own: Callable[..., Iterator[Node]]) -> Iterator[Node]:
    """own: (layer, residual, config, after=name) -> the nodes of a block of the architecture's mixer."""
    for layer in range(config.n_layer):
        feed = config.feed_forward(layer)
        after = "residual" if feed is None else "mixed"
        if (sizes := config.attention(layer)) is None:
            yield from own(layer, residual, config, after=after)
        else:
            yield from attention.graph(layer, residual, sizes, config, after)
        if feed is not None:
            yield from feed_forward.graph(layer, f"layers.{layer}.mixed", feed, config)
        residual = f"layers.{layer}.residual"


def _linear(config: Any) -> Init:
    """As mamba_ssm's language model has it in the end, where each layer counts once, with a feed-forward too."""
    scale = config.n_layer**-0.5 if config.rescale_prenorm_residual else 1.0
    return lambda fan_in, last: uniform((scale if last else 1.0) * fan_in**-0.5)


# --- attention as mamba_ssm's MHA has it -------------------------------------------------------------

_SIZES = ("num_heads", "num_heads_kv", "head_dim")
_DEFAULTS: Mapping[str, Any] = {
    "num_heads": None,
    "num_heads_kv": None,
    "head_dim": None,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "softmax_scale": None,
    "causal": False,
    "d_conv": 0,
    "rotary_emb_dim": 0,
    "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False,
}


def _attention(given: Mapping[str, Any], d_model: int) -> Attention:
    """The sizes that `attn_cfg` gives. Raises ValueError for others than can be computed."""
    if unknown := sorted(map(str, set(given) - set(_DEFAULTS) - {"mlp_dim"})):
        raise ValueError(f"attn_cfg has {', '.join(unknown[:3])}; expected some of {', '.join(_DEFAULTS)}")
    if given.get("mlp_dim"):
        raise ValueError(f"attn_cfg has mlp_dim {given['mlp_dim']!r}; a feed-forward beside attention is not computed")
    cfg = {**_DEFAULTS, **given}
    heads = cfg["num_heads"]
    cfg["num_heads_kv"] = heads if cfg["num_heads_kv"] is None else cfg["num_heads_kv"]
    if cfg["head_dim"] is None and is_size(heads):
        cfg["head_dim"], rest = divmod(d_model, heads)
        _expect(rest == 0, "num_heads", heads, f"a divisor of d_model, {d_model}, where no head_dim is given")
    for name in _SIZES:
        _expect(is_size(cfg[name]), name, cfg[name], f"an integer from 1 to {MAX_SIZE}")
    _expect(heads % cfg["num_heads_kv"] == 0, "num_heads_kv", cfg["num_heads_kv"], f"a divisor of num_heads, {heads}")
    for name in ("qkv_proj_bias", "out_proj_bias", "rotary_emb_interleaved"):
        _expect(is_bool(cfg[name]), name, cfg[name], "true or false")
    _expect(cfg["causal"] is True, "causal", cfg["causal"], "true: no position may see a later one")
    _expect(cfg["d_conv"] == 0 or is_size(cfg["d_conv"]), "d_conv", cfg["d_conv"], "an integer >= 0")
    size, most = cfg["rotary_emb_dim"], cfg["head_dim"]
    fits = is_int(size) and size % 2 == 0 and 0 <= size <= most
    _expect(fits, "rotary_emb_dim", size, f"an even number from 0 to {most}, the size of a head")
    _expect(is_positive(cfg["rotary_emb_base"]), "rotary_emb_base", cfg["rotary_emb_base"], "a positive number")
    scale = cfg["softmax_scale"]
    _expect(scale is None or is_number(scale), "softmax_scale", scale, "a number or nothing")
    return Attention(
        heads,
        cfg["num_heads_kv"],
        cfg["head_dim"],
        bias=cfg["qkv_proj_bias"],
        out_bias=cfg["out_proj_bias"],
        d_conv=cfg["d_conv"],
        rotary=Rotary(size, float(cfg["rotary_emb_base"]), cfg["rotary_emb_interleaved"]),
        scale=None if scale is None else float(scale),
    )


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"attn_cfg has {name} {value!r}; expected {expected}")
