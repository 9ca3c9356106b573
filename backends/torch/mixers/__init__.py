"""The mixers and the feed-forwards, a file each, named after the kind that a block has.

A mixer's file exports `Mixer`, a module class with

    __init__(config, layer: int, options: Options)
    forward(hidden (b, l, d), state, call) -> (hidden (b, l, d), state after the last position)

A feed-forward's file exports `Mixer` too, with forward(hidden, call) -> hidden. The class may say in its own body for
which ways it was written: see `ways`. It may also say there

    width = s6.width    a function: elements of its widest array for each position, or None where a layer was replaced.
                        Long sequences are then computed in pieces, each from the state that the one before has left.
                        A feed-forward says it too
    captures = s6.captures
                        a function: whether its kernels here have been tried in training steps that are captured as
                        CUDA graphs. Without it no step is captured. A feed-forward says it too
    quantized = (...)   of a feed-forward: the names of its linear layers that `quantization.quantize` replaces
"""

from typing import NamedTuple

from mamba_core import discovery
from mamba_core.kernels import Kernels


class Options(NamedTuple):
    """What a model tells all of its layers. kernels: which kernel computes each op."""

    kernels: Kernels


def mixer_class(kind: str) -> type:
    return discovery.find("backends.torch.mixers", kind).Mixer
