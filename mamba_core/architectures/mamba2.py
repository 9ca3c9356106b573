"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060, section 7).

One projection gives all: the gate, the inputs of the recurrence, B, C and the step sizes. The convolution goes over x,
B and C together, and a norm with the gate follows the recurrence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core.architectures.base import (
    MAX_SIZE,
    BaseConfig,
    Traits,
    is_bool,
    is_number,
    is_positive,
    is_size,
)
from mamba_core.architectures.mamba import linear
from mamba_core.spec.blocks import attention, hybrid
from mamba_core.spec.blocks.hybrid import HybridConfig
from mamba_core.spec.graph import Node
from mamba_core.spec.init import ones, step_bias, uniform, zeros
from mamba_core.spec.ops.ssd import NO_LIMIT, check_limit
from mamba_core.spec.params import Parameter
from mamba_core.spec.state import Field


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(HybridConfig):
    """Mamba-2, with the defaults of mamba_ssm and the size of mamba2-130m.

    Attributes:
        d_state: states per channel.
        d_conv: width of the short convolution.
        expand: d_inner = int(expand * d_model).
        headdim: channels of a head.
        d_ssm: channels of the recurrence, None for all of d_inner. The others pass a gate instead.
        ngroups: groups of heads that share B and C, and of channels that are normed together.
        rmsnorm: whether a norm follows the recurrence; without it there is the gate alone.
        norm_before_gate: whether that norm comes before the gate.
        D_has_hdim: whether D has a value a channel, and not a head.
        dt_limit: the least and the most that a step size may be.
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform in [dt_min, dt_max], at least the floor.
        A_init_range: initial rates are uniform between these, with a minus sign.
        conv_init: bound of the initial weights of the convolution, None for 1 / sqrt(d_conv).
        bias, conv_bias: whether in_proj and out_proj, and the convolution, have a bias.
        rescale_prenorm_residual: divide the initial out_proj.weight by sqrt(n_layer).
        chunk_size: positions of a chunk in other libraries. No result here depends on it.

    The other fields are those of `HybridConfig` and `BaseConfig`.
    """

    pad_vocab_size_multiple: int = 16
    d_state: int = 128
    d_conv: int = 4
    expand: float = 2
    headdim: int = 64
    d_ssm: int | None = None
    ngroups: int = 1
    rmsnorm: bool = True
    norm_before_gate: bool = False
    D_has_hdim: bool = False
    dt_limit: tuple[float, float] = NO_LIMIT
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    A_init_range: tuple[float, float] = (1.0, 16.0)
    conv_init: float | None = None
    bias: bool = False
    conv_bias: bool = True
    rescale_prenorm_residual: bool = True
    chunk_size: int = 256

    architecture: ClassVar[str] = "mamba2"
    NOT_OF_STATE: ClassVar[tuple[str, ...]] = (
        *BaseConfig.NOT_OF_STATE,
        *HybridConfig.FIELDS,
        *("dt_min", "dt_max", "dt_init_floor", "A_init_range", "conv_init", "rescale_prenorm_residual", "chunk_size"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("d_state", "d_conv", "headdim", "ngroups", "chunk_size")
        self.expect(f"an integer from 1 to {MAX_SIZE}", is_size, *sizes)
        self.expect(f"an integer from 1 to {MAX_SIZE} or nothing", lambda v: v is None or is_size(v), "d_ssm")
        self.expect("a positive number", is_positive, "expand", "dt_min", "dt_max")
        self.expect("a number >= 0", lambda value: is_number(value) and value >= 0, "dt_init_floor")
        self.expect("a positive number or nothing", lambda v: v is None or is_positive(v), "conv_init")
        self.expect("true or false", is_bool, "bias", "conv_bias", "rmsnorm", "norm_before_gate", "D_has_hdim")
        self.expect("true or false", is_bool, "rescale_prenorm_residual")
        self.expect(f"at least dt_min={self.dt_min!r}", lambda value: value >= self.dt_min, "dt_max")
        self.expect("two numbers, 0 < least <= most", _is_range, "A_init_range")
        check_limit(self.dt_limit)
        for name in ("dt_limit", "A_init_range"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        self._check_sizes()

    def _check_sizes(self) -> None:
        if not 1 <= self.expand * self.d_model < MAX_SIZE + 1:
            raise ValueError(
                f"expand={self.expand!r} of d_model={self.d_model} is no number of channels from 1 to {MAX_SIZE}"
            )
        e, whole = self.d_scanned, self.d_inner
        if e > whole:
            raise ValueError(f"d_ssm is {e}; expected at most d_inner, {whole}")
        if e % self.headdim:
            raise ValueError(f"headdim is {self.headdim}; expected a divisor of the recurrence's {e} channels")
        if self.nheads % self.ngroups:
            raise ValueError(f"ngroups is {self.ngroups}; expected a divisor of the {self.nheads} heads")

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def d_scanned(self) -> int:
        """Channels of the recurrence."""
        return self.d_inner if self.d_ssm is None else self.d_ssm

    @property
    def d_gated(self) -> int:
        """Channels that pass a gate instead of the recurrence."""
        return self.d_inner - self.d_scanned

    @property
    def nheads(self) -> int:
        return self.d_scanned // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: those of x, B and C."""
        return self.d_scanned + 2 * self.ngroups * self.d_state

    @property
    def projected(self) -> tuple[tuple[str, int], ...]:
        """What in_proj gives, in its order: (name, channels)."""
        e, gated, of_groups = self.d_scanned, self.d_gated, self.ngroups * self.d_state
        beside = (("gate", gated), ("gated", gated)) if gated else ()
        return (*beside, ("z", e), ("x", e), ("B", of_groups), ("C", of_groups), ("dt", self.nheads))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"expand": self.d_inner, "d_ssm": self.d_scanned}


def _is_range(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_positive, value)) and value[0] <= value[1]


Config = Mamba2Config
TRAITS = Traits()
PRESETS = {
    "mamba2-130m": Mamba2Config(d_model=768, n_layer=24),
    "mamba2-370m": Mamba2Config(d_model=1024, n_layer=48),
    "mamba2-780m": Mamba2Config(d_model=1536, n_layer=48),
    "mamba2-1.3b": Mamba2Config(d_model=2048, n_layer=48),
    "mamba2-2.7b": Mamba2Config(d_model=2560, n_layer=64),
    "mamba2attn-2.7b": Mamba2Config(
        d_model=2560,
        n_layer=64,
        attn_layer_idx=(9, 18, 27, 36, 45, 56),
        attn_cfg={
            "causal": True,
            "d_conv": 4,
            "head_dim": 128,
            "num_heads": 30,
            "out_proj_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_dim": 64,
        },
    ),
    "mamba-codestral-7b": Mamba2Config(
        d_model=4096,
        n_layer=64,
        vocab_size=32768,
        pad_vocab_size_multiple=1,
        ngroups=8,
        tie_embeddings=False,
        rescale_prenorm_residual=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
}


blocks = hybrid.blocks


def state(config: Mamba2Config, layer: int) -> tuple[Field, ...]:
    """Of Mamba the last inputs of the convolution, oldest first, and the state h of the recurrence."""
    if (sizes := config.attention(layer)) is not None:
        return attention.state(sizes)
    return (
        Field("conv", "ke", (config.d_conv - 1, config.conv_dim)),
        Field("ssm", "hpn", (config.nheads, config.headdim, config.d_state), "float32"),
    )


def parameters(config: Mamba2Config) -> Iterator[Parameter]:
    """Initial values as mamba_ssm's (modules/mamba2.py and models/mixer_seq_simple.py)."""
    return hybrid.parameters(config, layer_parameters)


def layer_parameters(layer: int, config: Mamba2Config) -> Iterator[Parameter]:
    """Those of one block."""
    prefix = f"backbone.layers.{layer}."
    mixer = prefix + "mixer."
    d, e, h, k = config.d_model, config.d_scanned, config.nheads, config.d_conv
    parts = config.projected
    rows, filters = sum(size for _, size in parts), config.conv_dim
    joined = tuple(part for part in parts if part[0] in ("x", "B", "C"))
    conv_bound = k**-0.5 if config.conv_init is None else config.conv_init
    step = step_bias(config.dt_min, config.dt_max, config.dt_init_floor)
    out_scale = config.n_layer**-0.5 if config.rescale_prenorm_residual else 1.0
    yield Parameter(prefix + "norm.weight", "d", (d,), ones, decay=False)
    yield Parameter(mixer + "dt_bias", "h", (h,), step, float32=True, decay=False)
    yield Parameter(mixer + "A_log", "h", (h,), log_uniform(*config.A_init_range), float32=True, decay=False)
    axes, shape = ("e", (e,)) if config.D_has_hdim else ("h", (h,))
    yield Parameter(mixer + "D", axes, shape, ones, float32=True, decay=False)
    yield Parameter(mixer + "in_proj.weight", "ed", (rows, d), uniform(d**-0.5), mup_role="hidden", parts=parts)
    if config.bias:
        yield Parameter(mixer + "in_proj.bias", "e", (rows,), zeros, decay=False, parts=parts)
    conv = uniform(conv_bound)
    yield Parameter(mixer + "conv1d.weight", "e1k", (filters, 1, k), conv, mup_role="vector", parts=joined)
    if config.conv_bias:
        yield Parameter(mixer + "conv1d.bias", "e", (filters,), uniform(k**-0.5), decay=False, parts=joined)
    if config.rmsnorm:
        yield Parameter(mixer + "norm.weight", "e", (e,), ones, decay=False)
    out = uniform(out_scale * config.d_inner**-0.5)
    yield Parameter(mixer + "out_proj.weight", "de", (d, config.d_inner), out, mup_role="hidden")
    if config.bias:
        yield Parameter(mixer + "out_proj.bias", "d", (d,), zeros, decay=False)


def log_uniform(least: float, most: float):
    """The logarithm of values uniform in [least, most]."""
    return lambda generator, shape: np.log(least + generator.random(shape) * (most - least))


def layer_graph(layer: int, residual: str, config: Mamba2Config, after: str = "residual") -> Iterator[Node]:
    """The nodes from the norm to the sum with the residual stream, which is named `after`."""
    here, weights = f"layers.{layer}.", f"backbone.layers.{layer}."
    mixer, e, n = weights + "mixer.", config.d_scanned, config.ngroups * config.d_state

    def columns(name, source, start, stop):
        return Node(here + name, "columns", (here + source,), settings={"start": start, "stop": stop})

    eps = {"eps": config.norm_eps}
    yield Node(here + "norm", "rms_norm", (residual,), {"weight": weights + "norm.weight"}, eps)
    yield linear(layer, "in_proj", "norm", config.bias)
    at = 0
    for name, size in _projected_nodes(config):
        yield columns(name, "in_proj", at, at + size)
        at += size
    taps = {"weight": mixer + "conv1d.weight"} | ({"bias": mixer + "conv1d.bias"} if config.conv_bias else {})
    yield Node(here + "conv", "causal_conv", (here + "xBC",), taps, {"activation": "silu"}, (layer, ("conv",)))
    yield columns("x", "conv", 0, e)
    yield columns("B", "conv", e, e + n)
    yield columns("C", "conv", e + n, e + 2 * n)
    yield from _recurrence(layer, config)
    if config.d_gated:
        yield Node(here + "gate_silu", "silu", (here + "gate",))
        yield Node(here + "beside", "multiply", (here + "gate_silu", here + "gated"))
        yield Node(here + "joined", "joined", (here + "beside", here + ("gated_norm" if config.rmsnorm else "ssd")))
    source = "joined" if config.d_gated else "gated_norm" if config.rmsnorm else "ssd"
    yield linear(layer, "out_proj", source, config.bias)
    yield Node(here + after, "add", (residual, here + "out_proj"))


def _projected_nodes(config: Mamba2Config) -> Iterator[tuple[str, int]]:
    """The nodes that in_proj's output is cut into: x, B and C in one, for the convolution."""
    for name, size in config.projected:
        if name == "x":
            yield "xBC", config.conv_dim
        elif name not in ("B", "C"):
            yield name, size


def _recurrence(layer: int, config: Mamba2Config) -> Iterator[Node]:
    """The nodes from x, B, C and dt to the gate."""
    here, mixer = f"layers.{layer}.", f"backbone.layers.{layer}.mixer."
    names = {"A_log": mixer + "A_log", "D": mixer + "D", "dt_bias": mixer + "dt_bias"}
    settings = {"heads": config.nheads, "groups": config.ngroups, "dt_limit": config.dt_limit}
    inputs = ("x", "dt", "B", "C") if config.rmsnorm else ("x", "dt", "B", "C", "z")
    given = tuple(here + name for name in inputs)
    yield Node(here + "ssd", "ssd", given, names, settings, (layer, ("ssm",)))
    if config.rmsnorm:
        how = {"eps": config.norm_eps, "groups": config.ngroups, "norm_before_gate": config.norm_before_gate}
        weight = {"weight": mixer + "norm.weight"}
        yield Node(here + "gated_norm", "gated_rms_norm", (here + "ssd", here + "z"), weight, how)


def graph(config: Mamba2Config, residual: str) -> Iterator[Node]:
    """The nodes of all blocks."""
    return hybrid.graph(config, residual, layer_graph)
