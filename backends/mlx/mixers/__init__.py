"""The mixers and feed-forwards, a file each, named after the kind that an architecture's blocks name.

A mixer file exports `Mixer`:

    class Mixer(nn.Module):
        def __init__(self, config, layer: int, options: Options)
        def __call__(self, hidden, state, call) -> (hidden, state)     # a feed-forward: (hidden, call) -> hidden

A class may say in its own body what else it was written for; a subclass does not inherit that:

    last_position = True     where `call.last`, it may return the last position's output only, (b, 1, d)
    width = s6.width     a function: elements of its widest array for each position, or None where a
                         layer was replaced. Long sequences are then computed in pieces, each from the
                         state that the one before has left. A feed-forward says it too
    recurrence = "ssd"   the op whose kernel decides whether pieces pay, where it is not "selective_scan"
"""

from typing import NamedTuple

from mamba_core import discovery
from mamba_core.kernels import Kernels


class Options(NamedTuple):
    """What this backend tells every module when it makes it.

    kernels: the model's policy.
    """

    kernels: Kernels


def mixer_class(kind: str) -> type:
    return discovery.find("backends.mlx.mixers", kind).Mixer
