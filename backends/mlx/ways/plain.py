"""The plain way: it calls a block. It takes any block, but only one, so that faster ways are asked about the next."""

from mamba_core.backends.mlx.blocks import Block
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.backends.mlx.ways import Taken, own

RANK = 100


def take(blocks, residual, states, call) -> Taken:
    block = blocks[0]
    if call.last and not (len(blocks) == 1 and _can_compute_last_only(block)):
        call = call._replace(last=False)

    def run(residual, pending, states):
        residual = residual if pending is None else residual + pending
        residual, state = block(residual, states[0], call)
        return residual, None, (state,)

    return Taken(1, run)


def _can_compute_last_only(block) -> bool:
    """Whether the block may return the last position's output only. Nobody expects that of a class it did not write."""
    return untouched(Block, block) and "feed_forward" not in block and bool(own(block.mixer, "last_position"))
