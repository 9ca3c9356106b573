"""Ways: how the blocks of a stack are computed. The stack asks each for the first blocks, the fastest way first.

A way is a file with RANK (the lowest is asked first; the plain way has 100) and

    take(blocks, residual, states, call) -> Taken | str

which says how many of the first blocks it computes here and now, or why not even the first.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from mamba_core import discovery


class Taken(NamedTuple):
    """count: of the first blocks. run(residual, pending, states) -> (residual, pending, those blocks' states).

    pending: what is still to be added to the residual stream, or None.
    """

    count: int
    run: Callable


@functools.cache
def ranked() -> tuple[tuple[str, ModuleType], ...]:
    """(name, way) of each, the fastest first."""
    return tuple(sorted(discovery.modules("backends.jax.ways").items(), key=lambda item: item[1].RANK))


def own(module, name: str) -> Any:
    """What the module's very class, not a base of it, says under this name; None where it says nothing."""
    return vars(type(module)).get(name)
