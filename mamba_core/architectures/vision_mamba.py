"""Vision Mamba (Zhu et al. 2024, arXiv:2401.09417): Mamba-1 that reads a sequence in both directions.

The patches of an image are the sequence: see the tasks of images. Of tokens it is a bidirectional Mamba-1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mamba_core.architectures import mamba
from mamba_core.architectures.base import Block, Traits, is_bool, is_number
from mamba_core.architectures.mamba import MambaConfig
from mamba_core.spec.graph import Node
from mamba_core.spec.init import constant, log_arange, ones, uniform, zeros
from mamba_core.spec.params import Parameter
from mamba_core.spec.state import Field


@dataclass(frozen=True, kw_only=True)
class VisionMambaConfig(MambaConfig):
    """The fields of `MambaConfig`, with the size of Vim-tiny, and those of the second direction.

    Attributes:
        bimamba_type: "v2" where the reverse direction has a convolution, an x_proj, a dt_proj, an A and a D of its own;
            "v1" where it has only an A of its own, and reads what the forward convolution gives.
        divide_output: the two directions are averaged; where it is false, they are added.
        drop_path_rate: in training, the output of mixer i is left out of a row with probability
            rate * i / (n_layer - 1), and divided by one minus that where it is not. It acts after `model.train()`, and
            not in a model as it is built or loaded.
    """

    d_model: int = 192
    task: str = "image_classification"
    bimamba_type: str = "v2"
    divide_output: bool = True
    drop_path_rate: float = 0.0

    architecture: ClassVar[str] = "vision_mamba"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("'v1' or 'v2'", lambda value: value in ("v1", "v2"), "bimamba_type")
        self.expect("true or false", is_bool, "divide_output")
        self.expect("a number >= 0 and < 1", lambda value: is_number(value) and 0 <= value < 1, "drop_path_rate")

    @property
    def merge_factor(self) -> float:
        """The factor of the sum of the two directions."""
        return 0.5 if self.divide_output else 1.0

    def drop_rate(self, layer: int) -> float:
        """The probability with which training leaves out the output of that layer's mixer."""
        return self.drop_path_rate * layer / max(1, self.n_layer - 1)


Config = VisionMambaConfig
# A reversed direction sees what comes later, so that nothing can go on from a state.
TRAITS = Traits(causal=False, steps=False)
PRESETS = {
    "vim-tiny": VisionMambaConfig(d_model=192),
    "vim-small": VisionMambaConfig(d_model=384),
    "vim-base": VisionMambaConfig(d_model=768),
}


def blocks(config: VisionMambaConfig) -> tuple[Block, ...]:
    return (Block(f"bimamba_{config.bimamba_type}"),) * config.n_layer


def state(config: VisionMambaConfig, layer: int) -> tuple[Field, ...]:
    return ()


def parameters(config: VisionMambaConfig) -> Iterator[Parameter]:
    """Initial values and decay as in the original (vim/models_mamba.py), where A decays: its mark is not honoured."""
    for layer in range(config.n_layer):
        prefix = f"backbone.layers.{layer}."
        for parameter in mamba.layer_parameters(layer, config):
            if parameter.name.endswith(".A_log"):
                yield _rate(parameter.name, config)
            elif parameter.name.endswith(".out_proj.weight"):
                yield from _reverse_parameters(prefix + "mixer.", config)
                yield parameter
            else:
                yield parameter


def _rate(name: str, config: VisionMambaConfig) -> Parameter:
    return Parameter(name, "en", (config.d_inner, config.d_state), log_arange, float32=True)


def _reverse_parameters(mixer: str, config: VisionMambaConfig) -> Iterator[Parameter]:
    """What the reverse direction has of its own."""
    e, n, k, r = config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    yield _rate(mixer + "A_b_log", config)
    if config.bimamba_type == "v1":
        return
    step_scale = config.dt_scale * r**-0.5
    step_weight = uniform(step_scale) if config.dt_init == "random" else constant(step_scale)
    selection = (("dt", r), ("B", n), ("C", n))
    yield Parameter(mixer + "D_b", "e", (e,), ones, float32=True, decay=False)
    yield Parameter(mixer + "conv1d_b.weight", "e1k", (e, 1, k), uniform(k**-0.5), mup_role="vector")
    if config.conv_bias:
        yield Parameter(mixer + "conv1d_b.bias", "e", (e,), uniform(k**-0.5), decay=False)
    projected = (r + 2 * n, e)
    yield Parameter(mixer + "x_proj_b.weight", "re", projected, uniform(e**-0.5), mup_role="hidden", parts=selection)
    yield Parameter(mixer + "dt_proj_b.weight", "er", (e, r), step_weight, mup_role="hidden")
    # The original's first values are zero, and not those of the forward direction: nothing marks them to be kept.
    yield Parameter(mixer + "dt_proj_b.bias", "e", (e,), zeros, float32=True, decay=False)


def graph(config: VisionMambaConfig, residual: str) -> Iterator[Node]:
    for layer in range(config.n_layer):
        yield from _layer_graph(layer, residual, config)
        residual = f"layers.{layer}.residual"


def _layer_graph(layer: int, residual: str, config: VisionMambaConfig) -> Iterator[Node]:
    """Mamba-1's block with a second direction between its scan and its out_proj; no node has a state."""
    here = f"layers.{layer}."
    for node in mamba.layer_graph(layer, residual, config):
        if node.name == here + "out_proj":
            yield from _reverse(layer, config)
            node = node._replace(inputs=(here + "merged",))
        yield node._replace(state=None)


def _reverse(layer: int, config: VisionMambaConfig) -> Iterator[Node]:
    """The nodes of the reverse direction, and the two as one."""
    here = f"layers.{layer}."
    x, dt, B, C = "conv", "dt_proj", "B", "C"
    if config.bimamba_type == "v2":
        yield from _reverse_selection(layer, config)
        x, dt, B, C = "conv_b", "dt_proj_b", "B_b", "C_b"
    yield _reverse_scan(layer, config, (x, dt, B, C, "z"))
    factor = {"factor": config.merge_factor}
    yield Node(here + "merged", "scaled_sum", (here + "scan", here + "scan_b"), settings=factor)


def _reverse_selection(layer: int, config: VisionMambaConfig) -> Iterator[Node]:
    here, mixer = f"layers.{layer}.", f"backbone.layers.{layer}.mixer."
    n, r = config.d_state, config.dt_rank_size
    taps = {"weight": mixer + "conv1d_b.weight"} | ({"bias": mixer + "conv1d_b.bias"} if config.conv_bias else {})
    yield Node(here + "conv_b", "causal_conv", (here + "x",), taps, {"activation": "silu", "reverse": True})
    yield mamba.linear(layer, "x_proj_b", "conv_b")
    for name, start, stop in (("dt_b", 0, r), ("B_b", r, r + n), ("C_b", r + n, r + 2 * n)):
        yield Node(here + name, "columns", (here + "x_proj_b",), settings={"start": start, "stop": stop})
    yield mamba.linear(layer, "dt_proj_b", "dt_b")


def _reverse_scan(layer: int, config: VisionMambaConfig, inputs: tuple[str, ...]) -> Node:
    here, mixer = f"layers.{layer}.", f"backbone.layers.{layer}.mixer."
    own = "_b" if config.bimamba_type == "v2" else ""
    names = {"A_log": mixer + "A_b_log", "D": mixer + "D" + own, "delta_bias": mixer + f"dt_proj{own}.bias"}
    return Node(here + "scan_b", "selective_scan", tuple(here + name for name in inputs), names, {"reverse": True})
