"""The ops, a file each: what they are in float64, found by file name; see `base` for what a file exports."""

import functools

from mamba_core import discovery
from mamba_core.spec.ops.base import NodeOp, Op

FOLDER = "spec.ops"


@functools.cache
def nodes() -> dict[str, NodeOp]:
    """Every op of the block graph by name.

    Raises:
        ValueError: two files have an op of the same name.
    """
    found: dict[str, NodeOp] = {}
    places: dict[str, str] = {}
    for file, module in discovery.modules(FOLDER).items():
        for name, op in getattr(module, "NODES", {}).items():
            if name in found:
                raise ValueError(f"spec/ops/{file} has the node op {name!r}, which spec/ops/{places[name]} has too")
            found[name], places[name] = op, file
    return found


@functools.cache
def public() -> dict[str, Op]:
    """Every op that backends compute, by name."""
    return {name: module.OP for name, module in discovery.modules(FOLDER).items() if hasattr(module, "OP")}
