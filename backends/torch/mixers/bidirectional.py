"""A mixer of any kind for each direction, and the mean or the sum of the two."""

import torch
from torch import Tensor, nn

from mamba_core import architectures
from mamba_core.backends.torch.arrays import dtype_of
from mamba_core.backends.torch.mixers import mixer_class
from mamba_core.backends.torch.mixers.bimamba import flip
from mamba_core.call import Call
from mamba_core.spec import state as states


class BidirectionalMixer(nn.Module):
    def __init__(self, config, layer: int, options):
        super().__init__()
        inner = config.inner_config
        kind = mixer_class(architectures.of(inner).blocks(inner)[layer].mixer)
        self.factor, self.inner_config, self.layer = config.merge_factor, inner, layer
        self.forwards, self.backwards = kind(inner, layer, options), kind(inner, layer, options)

    def forward(self, hidden: Tensor, state, call: Call) -> tuple[Tensor, tuple]:
        """hidden (b, l, d) to (b, l, d)."""
        call, zeros = call._replace(last=False), self._zeros(hidden)
        y, _ = self.forwards(hidden, zeros, call.within("forwards."))
        y_b, _ = self.backwards(flip(hidden), zeros, _reversed(call))
        return call.observe("merged", (y + flip(y_b)) * self.factor), state

    def _zeros(self, hidden: Tensor):
        """The state that each direction begins with."""
        fields = states.fields(self.inner_config, self.layer)
        kind = states.layer_types(self.inner_config)[self.layer]
        return kind(*(_zeros(field.stored_shape(len(hidden)), field.dtype, hidden) for field in fields))


def _zeros(shape: tuple[int, ...], dtype: str, hidden: Tensor) -> Tensor:
    same = dtype == "compute" or hidden.dtype == torch.float64
    return torch.zeros(shape, dtype=hidden.dtype if same else dtype_of(dtype), device=hidden.device)


def _reversed(call: Call) -> Call:
    """That of the flipped sequence, which reports its nodes as the positions lie."""
    turned = call._replace(last=False) if call.reverse is None else call.reverse
    if not call.observed:
        return turned
    observe = call.within("backwards.").observe
    return turned._replace(observe=lambda name, value: (observe(name, flip(value)), value)[1])


Mixer = BidirectionalMixer
