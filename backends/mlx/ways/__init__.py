"""The ways to compute blocks, a file each; the stack asks them, the fastest first.

A way exports `RANK`, an int, the lower the earlier it is asked, and

    take(blocks, residual, states, call) -> Taken | str

how many of the first of these blocks it computes here and now, or why not even the first. It decides wholly: what
`take` accepts, `run` computes. A way knows mixers by their exact class.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from mamba_core import discovery
from mamba_core.backends.mlx.untouched import untouched


class Taken(NamedTuple):
    """count: of the first blocks. run: (residual, pending, their states) -> (residual, pending, their new states).

    pending: what is still to be added to the residual stream, or None.
    """

    count: int
    run: Callable


@functools.cache
def ranked() -> tuple[tuple[str, ModuleType], ...]:
    """(name, way) of each, the fastest first."""
    return tuple(sorted(discovery.modules("backends.mlx.ways").items(), key=lambda item: item[1].RANK))


def own(module, name: str) -> Any:
    """What the module's very class, not a base of it, says under this name; None where it does not, or is patched."""
    kind = type(module)
    return vars(kind).get(name) if untouched(kind, module) else None
