"""The mixer of Vision Mamba's first form: the reverse direction has nothing of its own but A."""

from torch import Tensor, nn

from mamba_core.backends.torch.mixers import bimamba


class BidirectionalMixer(nn.Module):
    def __init__(self, config, layer: int, options):
        super().__init__()
        bimamba.add_parameters(self, config, layer, options, own_selection=False)

    def forward(self, hidden: Tensor, state, call) -> tuple[Tensor, tuple]:
        x, z = bimamba.halves(bimamba.project_in(self, hidden, call), call)
        here, back = bimamba.whole(call), bimamba.reversed_call(call)
        x = bimamba.convolve(self, self, x, here)
        delta, B, C, bias = bimamba.steps_of(self, x, here)
        y = bimamba.recur(self, x, z, (delta, B, C, bias), here)
        x, z, delta, B, C = map(bimamba.flip, (x, z, delta, B, C))
        y_b = bimamba.recur(self._reverse(), x, z, (delta, B, C, bias), back)
        return bimamba.project_out(self, bimamba.merge(self, y, bimamba.flip(y_b), call), call), state

    def _reverse(self) -> bimamba.Direction:
        layers = (self.conv1d, self.x_proj, self.dt_proj)
        return bimamba.Direction(*layers, self.A_b_log, self.D, self.kernels, self.sizes)


Mixer = BidirectionalMixer
