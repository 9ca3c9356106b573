"""The mixers and feed-forwards, a file each, named after the kind that an architecture's blocks name.

A mixer file exports `Mixer`:

    class Mixer(nnx.Module):
        def __init__(self, config, layer: int, options: Options)
        def __call__(self, hidden, state, call) -> (hidden, state)     # a feed-forward: (hidden, call) -> hidden

A class may say in its own body what else it was written for; a subclass does not inherit that:

    native_step = s6.native_operands    for the way of that name
    last_position                       a method: like a call, but it returns the last position's output only, or None
    width = s6.width                    a function: elements of its widest array for each position, or None where a
                                        layer was replaced. Long sequences are then computed in pieces, each from the
                                        state that the one before has left. A feed-forward says it too
"""

from typing import NamedTuple

from flax import nnx

from mamba_core import discovery
from mamba_core.kernels import Kernels


class Options(NamedTuple):
    """What a model tells all of its modules. dtype: the compute dtype. kernels: the policy."""

    dtype: str
    kernels: Kernels
    rngs: nnx.Rngs


def mixer_class(kind: str) -> type:
    return discovery.find("backends.jax.mixers", kind).Mixer
