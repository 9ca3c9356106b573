"""Ways to compute consecutive residual blocks, a file each. A stack asks them in order of their ranks.

A way is a module with

    RANK                                      the lowest is asked first; `plain`, which takes every block, has 100
    take(blocks, residual, states, call)      -> Taken, or why it does not even compute the first block here and now

A way decides wholly: what take accepts, run computes. It knows a mixer by its exact type. A mixer's class says in its
own body for which ways it was written, such as `native_step = s6.native_operands`; a subclass does not inherit that.
"""

from collections.abc import Callable
from typing import NamedTuple

from mamba_core import discovery


class Taken(NamedTuple):
    """count: how many of the first blocks it computes. run: (residual, pending, states) -> the same after them.

    pending is a value that is still to be added to the residual stream, or None. states are those of the blocks.
    """

    count: int
    run: Callable


def ranked() -> tuple:
    """(name, way) of all ways, the lowest rank first."""
    return tuple(sorted(discovery.modules("backends.torch.ways").items(), key=lambda item: item[1].RANK))


def own(mixer, way: str):
    """What the mixer's very class, not a base of it, says for that way; None if nothing."""
    return vars(type(mixer)).get(way)
