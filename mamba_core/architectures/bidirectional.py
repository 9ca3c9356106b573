"""Any architecture that steps, in both directions: a whole mixer for each, and the mean or the sum of the two.

It differs from Vision Mamba's mixers, whose directions share a projection into the mixer and one out of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from mamba_core import architectures
from mamba_core.architectures.base import BaseConfig, Block, Traits
from mamba_core.spec.graph import Node
from mamba_core.spec.params import Parameter
from mamba_core.spec.state import Field

DIRECTIONS = ("forwards", "backwards")
MERGES = {"mean": 0.5, "sum": 1.0}
# Fields of the inner config that are this one's.
SHARED = ("d_model", "n_layer", "norm_eps", "residual_in_fp32", "initializer_range")


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig(BaseConfig):
    """The fields of `BaseConfig`, and the architecture whose mixers read both directions.

    Attributes:
        inner: its name.
        inner_options: the fields of its config, but for those of `BaseConfig`.
        merge: "mean" or "sum" of the two directions.
    """

    inner: str = "mamba"
    inner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    merge: str = "mean"

    architecture: ClassVar[str] = "bidirectional"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("'mean' or 'sum'", lambda value: value in MERGES, "merge")
        self.expect("a mapping", lambda value: isinstance(value, Mapping), "inner_options")
        if any(isinstance(value, list) for value in self.inner_options.values()):  # as JSON has a tuple
            options = {name: tuple(own) if isinstance(own, list) else own for name, own in self.inner_options.items()}
            object.__setattr__(self, "inner_options", options)
        self._check_inner()

    @cached_property
    def inner_config(self) -> Any:
        """The config that a mixer of one direction is made of."""
        shared = {name: getattr(self, name) for name in SHARED}
        try:
            return architectures.find(self.inner).Config(**{**self.inner_options, **shared})
        except TypeError as fault:
            raise ValueError(f"inner_options do not fit architecture {self.inner!r}: {str(fault)[:200]}") from None

    @property
    def merge_factor(self) -> float:
        """The factor of the sum of the two directions."""
        return MERGES[self.merge]

    def _check_inner(self) -> None:
        if self.inner == self.architecture or not all((file := architectures.find(self.inner)).TRAITS):
            raise ValueError(f"inner is {self.inner!r}; expected a causal architecture that steps and packs")
        if set(self.inner_options) & set(BaseConfig.__dataclass_fields__):
            raise ValueError(
                f"inner_options are {sorted(self.inner_options)}; expected none of the fields of this config"
            )
        inner = self.inner_config
        if inner.facts.grows or any(block.feed_forward is not None for block in file.blocks(inner)):
            raise ValueError(f"inner is {self.inner!r}, which has layers beside Mamba's; expected mixers alone")


Config = BidirectionalConfig
TRAITS = Traits(causal=False, steps=False)
PRESETS: dict[str, BidirectionalConfig] = {}


def blocks(config: BidirectionalConfig) -> tuple[Block, ...]:
    return (Block("bidirectional"),) * config.n_layer


def state(config: BidirectionalConfig, layer: int) -> tuple[Field, ...]:
    return ()


def parameters(config: BidirectionalConfig) -> Iterator[Parameter]:
    """Those of the inner architecture, once for each direction, with initial values of their own."""
    for parameter in architectures.of(config.inner_config).parameters(config.inner_config):
        names = _both(parameter.name) if ".mixer." in parameter.name else (parameter.name,)
        yield from (replace(parameter, name=name) for name in names)


def _both(name: str) -> tuple[str, ...]:
    return tuple(name.replace(".mixer.", f".mixer.{direction}.", 1) for direction in DIRECTIONS)


def graph(config: BidirectionalConfig, residual: str) -> Iterator[Node]:
    nodes = list(architectures.of(config.inner_config).graph(config.inner_config, residual))
    for layer in range(config.n_layer):
        here = f"layers.{layer}."
        norm, *inner, last = (node for node in nodes if node.name.startswith(here))
        yield norm
        for index in range(len(DIRECTIONS)):
            yield from (_of_direction(node, here, index, norm.name) for node in inner)
        ends = tuple(f"{here}{direction}.{inner[-1].name.removeprefix(here)}" for direction in DIRECTIONS)
        yield Node(here + "merged", "scaled_sum", ends, settings={"factor": config.merge_factor})
        yield last._replace(inputs=(last.inputs[0], here + "merged"))


def _of_direction(node: Node, here: str, index: int, norm: str) -> Node:
    """A mixer's node as one of a direction. None has a state, and those that would have one are reversed."""
    prefix = f"{here}{DIRECTIONS[index]}."
    inputs = tuple(name if name == norm else prefix + name.removeprefix(here) for name in node.inputs)
    named = {key: _both(name)[index] for key, name in node.parameters.items()}
    reverse = {"reverse": True} if index == 1 and node.state is not None else {}
    name = prefix + node.name.removeprefix(here)
    return Node(name, node.op, inputs, named, {**node.settings, **reverse})
