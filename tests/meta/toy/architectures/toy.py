"""Blocks of three kinds: a leaky sum with a feed-forward, a mean of all that was, and Mamba-1's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mamba_core.architectures import mamba
from mamba_core.architectures.base import Block, Traits
from mamba_core.architectures.mamba import MambaConfig
from mamba_core.spec.graph import Node
from mamba_core.spec.init import normal, ones, uniform
from mamba_core.spec.params import Parameter
from mamba_core.spec.state import Field

KINDS = {"s": Block("toy_sum", "toy_gate"), "h": Block("toy_history"), "m": Block("mamba")}


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MambaConfig):
    """pattern: the kind of each layer, repeated: "s" a sum, "h" a history, "m" Mamba-1."""

    pattern: str = "mshm"

    architecture: ClassVar[str] = "toy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("letters of s, h and m", lambda value: value and set(value) <= set(KINDS), "pattern")

    def kind(self, layer: int) -> str:
        return self.pattern[layer % len(self.pattern)]


Config = ToyConfig
# A history has no way to tell sequences apart.
TRAITS = Traits(packs=False)
PRESETS = {"toy-tiny": ToyConfig(d_model=8, n_layer=4, vocab_size=17, d_state=4)}


def blocks(config: ToyConfig) -> tuple[Block, ...]:
    return tuple(KINDS[config.kind(layer)] for layer in range(config.n_layer))


def state(config: ToyConfig, layer: int) -> tuple[Field, ...]:
    kind = config.kind(layer)
    if kind == "m":
        return mamba.state(config, layer)
    if kind == "s":
        return (Field("leak", "eij", (config.d_inner, 2, 3), "float32"),)
    return Field("history", "ld", (0, config.d_model), grows=1), Field("filled", "", (), "int32")


def parameters(config: ToyConfig) -> Iterator[Parameter]:
    for layer in range(config.n_layer):
        kind, prefix = config.kind(layer), f"backbone.layers.{layer}."
        d, e = config.d_model, config.d_inner
        if kind == "m":
            yield from mamba.layer_parameters(layer, config)
            continue
        yield Parameter(prefix + "norm.weight", "d", (d,), ones, decay=False)
        if kind == "s":
            yield Parameter(prefix + "mixer.decay", "e", (e,), normal(1.0), float32=True, decay=False)
            yield Parameter(prefix + "mixer.in_proj.weight", "ed", (e, d), uniform(d**-0.5))
            yield Parameter(prefix + "mixer.out_proj.weight", "de", (d, e), uniform(e**-0.5))
            yield Parameter(prefix + "norm2.weight", "d", (d,), ones, decay=False)
            yield Parameter(prefix + "feed_forward.up.weight", "ed", (3 * d, d), uniform(d**-0.5))
            yield Parameter(prefix + "feed_forward.down.weight", "de", (d, 3 * d), uniform(d**-0.5))
        else:
            yield Parameter(prefix + "mixer.out_proj.weight", "dd", (d, d), uniform(d**-0.5))


def graph(config: ToyConfig, residual: str) -> Iterator[Node]:
    for layer in range(config.n_layer):
        here, weights = f"layers.{layer}.", f"backbone.layers.{layer}."
        if config.kind(layer) == "m":
            yield from mamba.layer_graph(layer, residual, config)
        else:
            yield _norm("norm", layer, residual, config)
            after = "residual"
            if config.kind(layer) == "s":
                after = "mixed"
                yield mamba.linear(layer, "in_proj", "norm")
                decay = {"decay": weights + "mixer.decay"}
                yield Node(here + "sum", "leaky_sum", (here + "in_proj",), decay, state=(layer, ("leak",)))
                yield mamba.linear(layer, "out_proj", "sum")
            else:
                yield Node(here + "mean", "history_mean", (here + "norm",), state=(layer, ("history", "filled")))
                yield mamba.linear(layer, "out_proj", "mean")
            yield Node(here + after, "add", (residual, here + "out_proj"))
            if config.kind(layer) == "s":
                yield _norm("norm2", layer, here + "mixed", config)
                up, down = ({"weight": f"{weights}feed_forward.{name}.weight"} for name in ("up", "down"))
                yield Node(here + "up", "linear", (here + "norm2",), up)
                yield Node(here + "active", "silu", (here + "up",))
                yield Node(here + "down", "linear", (here + "active",), down)
                yield Node(here + "residual", "add", (here + "mixed", here + "down"))
        residual = here + "residual"


def _norm(name: str, layer: int, source: str, config: ToyConfig) -> Node:
    weight = {"weight": f"backbone.layers.{layer}.{name}.weight"}
    return Node(f"layers.{layer}.{name}", "rms_norm", (source,), weight, {"eps": config.norm_eps})
