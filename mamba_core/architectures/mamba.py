"""Mamba-1 (Gu and Dao 2023, section 3.4 and figure 3)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from mamba_core.architectures.base import (
    MAX_SIZE,
    BaseConfig,
    Traits,
    is_bool,
    is_number,
    is_positive,
    is_size,
)
from mamba_core.spec.blocks import attention, hybrid
from mamba_core.spec.blocks.hybrid import HybridConfig
from mamba_core.spec.graph import Node
from mamba_core.spec.init import constant, log_arange, ones, step_bias, uniform, zeros
from mamba_core.spec.params import Parameter
from mamba_core.spec.state import Field


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(BaseConfig):
    """The sizes of Mamba-1's mixer, which other architectures have too, with the defaults of mamba_ssm.

    Attributes:
        d_state: states per channel.
        d_conv: width of the short convolution.
        expand: d_inner = int(expand * d_model).
        dt_rank: rank of the step-size projection, "auto" for ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform in [dt_min, dt_max], at least the floor.
        dt_init, dt_scale: initial dt_proj.weight, "random" or "constant", scaled by dt_scale / sqrt(dt_rank).
        bias, conv_bias: whether in_proj and out_proj, and the convolution, have a bias.
        rescale_prenorm_residual: divide the initial out_proj.weight by sqrt(n_layer).

    The other fields are `BaseConfig`'s.
    """

    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    bias: bool = False
    conv_bias: bool = True
    rescale_prenorm_residual: bool = True

    NOT_OF_STATE: ClassVar[tuple[str, ...]] = (
        *BaseConfig.NOT_OF_STATE,
        *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "rescale_prenorm_residual"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(f"an integer from 1 to {MAX_SIZE}", is_size, "d_state", "d_conv")
        self.expect("a positive number", is_positive, "expand", "dt_min", "dt_max", "dt_scale")
        self.expect("true or false", is_bool, "bias", "conv_bias", "rescale_prenorm_residual")
        self.expect(f"an integer from 1 to {MAX_SIZE} or 'auto'", lambda v: v == "auto" or is_size(v), "dt_rank")
        self.expect("'random' or 'constant'", lambda value: value in ("random", "constant"), "dt_init")
        self.expect("a number >= 0", lambda value: is_number(value) and value >= 0, "dt_init_floor")
        self.expect(f"at least dt_min={self.dt_min!r}", lambda value: value >= self.dt_min, "dt_max")
        if not 1 <= self.expand * self.d_model < MAX_SIZE + 1:
            raise ValueError(
                f"expand={self.expand!r} of d_model={self.d_model} is no number of channels from 1 to {MAX_SIZE}"
            )

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def dt_rank_size(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else int(self.dt_rank)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"expand": self.d_inner, "dt_rank": self.dt_rank_size}


@dataclass(frozen=True, kw_only=True)
class MambaConfig(SelectiveConfig, HybridConfig):
    """Mamba-1, with the defaults of mamba_ssm and the size of mamba-130m.

    The fields are those of `SelectiveConfig` and of `HybridConfig`.
    """

    architecture: ClassVar[str] = "mamba"
    NOT_OF_STATE: ClassVar[tuple[str, ...]] = (*SelectiveConfig.NOT_OF_STATE, *HybridConfig.FIELDS)


Config = MambaConfig
TRAITS = Traits()
PRESETS = {
    "mamba-130m": MambaConfig(d_model=768, n_layer=24),
    "mamba-370m": MambaConfig(d_model=1024, n_layer=48),
    "mamba-790m": MambaConfig(d_model=1536, n_layer=48),
    "mamba-1.4b": MambaConfig(d_model=2048, n_layer=48),
    "mamba-2.8b": MambaConfig(d_model=2560, n_layer=64),
}


blocks = hybrid.blocks


def state(config: SelectiveConfig, layer: int) -> tuple[Field, ...]:
    """Of Mamba the last inputs of the convolution, oldest first, and the state h of the recurrence."""
    if (sizes := config.attention(layer)) is not None:
        return attention.state(sizes)
    return (
        Field("conv", "ke", (config.d_conv - 1, config.d_inner)),
        Field("ssm", "en", (config.d_inner, config.d_state), "float32"),
    )


def parameters(config: SelectiveConfig) -> Iterator[Parameter]:
    """Initial values as mamba_ssm's (modules/mamba_simple.py and models/mixer_seq_simple.py)."""
    return hybrid.parameters(config, layer_parameters)


def layer_parameters(layer: int, config: SelectiveConfig) -> Iterator[Parameter]:
    """Those of one block."""
    prefix = f"backbone.layers.{layer}."
    d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer = prefix + "mixer."
    step_scale = config.dt_scale * r**-0.5
    step_weight = uniform(step_scale) if config.dt_init == "random" else constant(step_scale)
    out_scale = config.n_layer**-0.5 if config.rescale_prenorm_residual else 1.0
    step = step_bias(config.dt_min, config.dt_max, config.dt_init_floor)
    halves, selection = (("x", e), ("z", e)), (("dt", r), ("B", n), ("C", n))
    yield Parameter(prefix + "norm.weight", "d", (d,), ones, decay=False)
    yield Parameter(mixer + "A_log", "en", (e, n), log_arange, float32=True, decay=False)
    yield Parameter(mixer + "D", "e", (e,), ones, float32=True, decay=False)
    yield Parameter(mixer + "in_proj.weight", "ed", (2 * e, d), uniform(d**-0.5), mup_role="hidden", parts=halves)
    if config.bias:
        yield Parameter(mixer + "in_proj.bias", "e", (2 * e,), zeros, decay=False, parts=halves)
    yield Parameter(mixer + "conv1d.weight", "e1k", (e, 1, k), uniform(k**-0.5), mup_role="vector")
    if config.conv_bias:
        yield Parameter(mixer + "conv1d.bias", "e", (e,), uniform(k**-0.5), decay=False)
    projected = (r + 2 * n, e)
    yield Parameter(mixer + "x_proj.weight", "re", projected, uniform(e**-0.5), mup_role="hidden", parts=selection)
    yield Parameter(mixer + "dt_proj.weight", "er", (e, r), step_weight, mup_role="hidden")
    yield Parameter(mixer + "dt_proj.bias", "e", (e,), step, float32=True, decay=False)
    out = uniform(out_scale * e**-0.5)
    yield Parameter(mixer + "out_proj.weight", "de", (d, e), out, mup_role="hidden")
    if config.bias:
        yield Parameter(mixer + "out_proj.bias", "d", (d,), zeros, decay=False)


def linear(layer: int, name: str, source: str, bias: bool = False) -> Node:
    """A projection of a mixer."""
    weights = f"backbone.layers.{layer}.mixer.{name}."
    names = {"weight": weights + "weight"} | ({"bias": weights + "bias"} if bias else {})
    return Node(f"layers.{layer}.{name}", "linear", (f"layers.{layer}.{source}",), names)


def scan_node(layer: int, inputs: tuple[str, ...], settings: dict | None = None) -> Node:
    """The recurrence. The bias of dt_proj enters in float32 inside it, before the softplus."""
    here, mixer = f"layers.{layer}.", f"backbone.layers.{layer}.mixer."
    names = {"A_log": mixer + "A_log", "D": mixer + "D", "delta_bias": mixer + "dt_proj.bias"}
    given = tuple(here + name for name in inputs)
    return Node(here + "scan", "selective_scan", given, names, settings or {}, (layer, ("ssm",)))


def scan(layer: int, config: SelectiveConfig) -> Iterator[Node]:
    """The nodes from dt, B and C to out_proj."""
    yield linear(layer, "dt_proj", "dt")
    yield scan_node(layer, ("conv", "dt_proj", "B", "C", "z"))
    yield linear(layer, "out_proj", "scan", config.bias)


Scan = Callable[[int, Any], Iterator[Node]]


def layer_graph(
    layer: int, residual: str, config: SelectiveConfig, scan: Scan = scan, after: str = "residual"
) -> Iterator[Node]:
    """The nodes from the norm to the sum with the residual stream, which is named `after`."""
    e, n, r = config.d_inner, config.d_state, config.dt_rank_size
    here, weights = f"layers.{layer}.", f"backbone.layers.{layer}."
    mixer = weights + "mixer."

    def columns(name, source, start, stop):
        return Node(here + name, "columns", (here + source,), settings={"start": start, "stop": stop})

    eps = {"eps": config.norm_eps}
    yield Node(here + "norm", "rms_norm", (residual,), {"weight": weights + "norm.weight"}, eps)
    yield linear(layer, "in_proj", "norm", config.bias)
    yield columns("x", "in_proj", 0, e)
    yield columns("z", "in_proj", e, 2 * e)
    taps = {"weight": mixer + "conv1d.weight"} | ({"bias": mixer + "conv1d.bias"} if config.conv_bias else {})
    yield Node(here + "conv", "causal_conv", (here + "x",), taps, {"activation": "silu"}, (layer, ("conv",)))
    yield linear(layer, "x_proj", "conv")
    yield columns("dt", "x_proj", 0, r)
    yield columns("B", "x_proj", r, r + n)
    yield columns("C", "x_proj", r + n, r + 2 * n)
    yield from scan(layer, config)
    yield Node(here + after, "add", (residual, here + "out_proj"))


def graph(config: SelectiveConfig, residual: str, scan: Scan = scan) -> Iterator[Node]:
    """The nodes of all blocks. A variant gives another `scan`: those from dt, B and C to out_proj."""
    return hybrid.graph(config, residual, partial(layer_graph, scan=scan))
