"""The block graph of a config as data: what the model computes, node by node.

Only `spec.reference` interprets it. A backend is written by hand and held to it: it reports its value at every node
under the node's name, and conformance compares.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Node(NamedTuple):
    """One array of the model.

    name: unique, such as "layers.0.in_proj".
    op: a key of `spec.reference.OPS`.
    inputs: names of earlier nodes; "input_ids", or "inputs_embeds" for task "layers", is given.
    parameters: argument of the op -> canonical parameter name.
    settings: argument of the op -> constant.
    state: (layer, field) of the `LayerState` that the op carries, None for ops without memory.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    parameters: Mapping[str, str] = NOTHING
    settings: Mapping[str, Any] = NOTHING
    state: tuple[int, str] | None = None


def block_graph(config) -> tuple[Node, ...]:
    """The nodes of a model in an order in which they can be computed; the last is "logits" or "hidden"."""
    return tuple(import_module(f"mamba_core.spec.{config.architecture}").graph(config))
