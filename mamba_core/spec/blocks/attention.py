"""Attention as the mixer of a block: q, k and v from one projection, where asked for through a short convolution."""

from collections.abc import Iterator
from typing import NamedTuple

from mamba_core.spec.graph import Node
from mamba_core.spec.init import Init, ones, uniform, zeros
from mamba_core.spec.ops.attention import Rotary
from mamba_core.spec.params import Parameter
from mamba_core.spec.state import FILLED, Field


class Attention(NamedTuple):
    """heads, kv_heads: of the queries, and of keys and values, which divide them. head_dim: components of a head.

    bias, out_bias: whether in_proj and out_proj have one.
    d_conv: width of a causal convolution over q, k and v together; 0 for none.
    scale: of the products, None for 1 / sqrt(head_dim).
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    d_conv: int = 0
    rotary: Rotary = Rotary()
    scale: float | None = None

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """The parts of in_proj's output."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return ("q", wide), ("k", narrow), ("v", narrow)

    @property
    def projected(self) -> int:
        """The width of in_proj's output."""
        return sum(size for _, size in self.parts)


def state(sizes: Attention) -> tuple[Field, ...]:
    """The keys and values that were, and how many; with a convolution its last inputs, oldest first."""
    heads = (0, sizes.kv_heads, sizes.head_dim)
    cache = (
        Field("keys", "lhp", heads, grows=1),
        Field("values", "lhp", heads, grows=1),
        Field(FILLED, "", (), "int32"),
    )
    return (Field("conv", "ke", (sizes.d_conv - 1, sizes.projected)), *cache) if sizes.d_conv else cache


def parameters(prefix: str, sizes: Attention, config, init: Init) -> Iterator[Parameter]:
    """prefix: of the layer, such as "backbone.layers.0.". init: of the projections."""
    d, wide, rows = config.d_model, sizes.heads * sizes.head_dim, sizes.projected
    mixer = prefix + "mixer."
    yield Parameter(prefix + "norm.weight", "d", (d,), ones, decay=False)
    yield Parameter(mixer + "in_proj.weight", "ed", (rows, d), init(d, False), mup_role="hidden", parts=sizes.parts)
    if sizes.bias:
        yield Parameter(mixer + "in_proj.bias", "e", (rows,), zeros, decay=False, parts=sizes.parts)
    if sizes.d_conv:
        taps, bound = (rows, 1, sizes.d_conv), uniform(sizes.d_conv**-0.5)
        yield Parameter(mixer + "conv1d.weight", "e1k", taps, bound, mup_role="vector", parts=sizes.parts)
        yield Parameter(mixer + "conv1d.bias", "e", (rows,), bound, decay=False, parts=sizes.parts)
    yield Parameter(mixer + "out_proj.weight", "de", (d, wide), init(wide, True), mup_role="hidden")
    if sizes.out_bias:
        yield Parameter(mixer + "out_proj.bias", "d", (d,), zeros, decay=False)


def graph(layer: int, residual: str, sizes: Attention, config, after: str = "residual") -> Iterator[Node]:
    """The nodes from the norm to the sum with the residual stream, which is named `after`."""
    here, weights = f"layers.{layer}.", f"backbone.layers.{layer}."
    mixer, source = weights + "mixer.", "in_proj"
    eps = {"eps": config.norm_eps}
    yield Node(here + "norm", "rms_norm", (residual,), {"weight": weights + "norm.weight"}, eps)
    yield _linear(here, mixer, "in_proj", "norm", sizes.bias)
    if sizes.d_conv:
        taps = {"weight": mixer + "conv1d.weight", "bias": mixer + "conv1d.bias"}
        yield Node(here + "conv", "causal_conv", (here + source,), taps, {"activation": None}, (layer, ("conv",)))
        source = "conv"
    at = 0
    for name, size in sizes.parts:
        yield Node(here + name, "columns", (here + source,), settings={"start": at, "stop": at + size})
        at += size
    how = {"heads": sizes.heads, "kv_heads": sizes.kv_heads, "scale": sizes.scale, "rotary": sizes.rotary}
    carried = (layer, ("keys", "values", FILLED))
    yield Node(here + "attention", "attention", tuple(here + name for name in "qkv"), {}, how, carried)
    yield _linear(here, mixer, "out_proj", "attention", sizes.out_bias)
    yield Node(here + after, "add", (residual, here + "out_proj"))


def _linear(here: str, mixer: str, name: str, source: str, bias: bool) -> Node:
    weights = {"weight": f"{mixer}{name}.weight"} | ({"bias": f"{mixer}{name}.bias"} if bias else {})
    return Node(here + name, "linear", (here + source,), weights)
