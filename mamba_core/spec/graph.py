"""The block graph of a config as data: what the model computes, node by node.

Only `spec.reference` interprets it. A backend is written by hand and held to it: it reports its value at every node
under the node's name, and conformance compares.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Node(NamedTuple):
    """One array of the model.

    name: unique, such as "layers.0.in_proj".
    op: a key of `spec.ops.nodes()`.
    inputs: names of earlier nodes, or of what the task's model is called with.
    parameters: argument of the op -> canonical parameter name.
    settings: argument of the op -> constant.
    state: (layer, fields of its state) that the op carries, None for ops without memory.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    parameters: Mapping[str, str] = NOTHING
    settings: Mapping[str, Any] = NOTHING
    state: tuple[int, tuple[str, ...]] | None = None


def block_graph(config: Any) -> tuple[Node, ...]:
    """The nodes of a model in an order in which they can be computed; the last is the output."""
    from mamba_core import architectures, tasks

    task = tasks.of(config)
    nodes = list(task.opening(config))
    nodes += architectures.of(config).graph(config, nodes[-1].name if nodes else task.inputs)
    return (*nodes, *task.closing(config, nodes[-1].name))
