"""The mixers and the feed-forwards, a file each, named after the kind that a block has.

A mixer's file exports `Mixer`, a module class with

    __init__(config, layer: int, options: Options)
    forward(hidden (b, l, d), state, call) -> (hidden (b, l, d), state after the last position)

and the attribute `width`, the entries of its widest array a position. A feed-forward's file exports `Mixer` too, with
forward(hidden, call) -> hidden. The class may say for which ways it was written: see `ways`.
"""

from typing import NamedTuple

from mamba_core import discovery
from mamba_core.kernels import Kernels


class Options(NamedTuple):
    """What a model tells all of its layers. kernels: which kernel computes each op."""

    kernels: Kernels


def mixer_class(kind: str) -> type:
    return discovery.find("backends.torch.mixers", kind).Mixer
