"""The ways to compute blocks, a file each; the stack asks them, the fastest first.

A way exports `RANK`, an int, the lower the earlier it is asked, and

    take(blocks, residual, states, call) -> Taken | str

how many of the first of these blocks it computes here and now, or why not even the first. It decides wholly: what
`take` accepts, `run` computes. A way knows mixers by their exact class.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from mamba_core import discovery


class Taken(NamedTuple):
    """count: of the first blocks. run: (residual, pending, their states) -> (residual, pending, their new states).

    pending: what is still to be added to the residual stream, or None.
    """

    count: int
    run: Callable


@functools.cache
def ways() -> tuple[tuple[str, Callable], ...]:
    """(name, take) of every way, the fastest first."""
    found = discovery.modules("backends.mlx.ways")
    return tuple((name, found[name].take) for name in sorted(found, key=lambda name: found[name].RANK))
