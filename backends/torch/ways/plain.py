"""A block as its module computes it."""

from mamba_core.backends.torch.ways import Taken

RANK = 100


def take(blocks, residual, states, call) -> Taken:
    def run(residual, pending, states):
        residual = residual if pending is None else residual + pending
        residual, state = blocks[0](residual, states[0], call)
        return residual, None, (state,)

    return Taken(1, run)
