"""Vision Mamba's mixer (Zhu et al. 2024, algorithm 1): each direction has a selection of its own."""

from torch import Tensor, nn

from mamba_core.backends.torch.mixers import bimamba, s6


class BidirectionalMixer(nn.Module):
    captures = s6.captures

    def __init__(self, config, layer: int, options):
        super().__init__()
        bimamba.add_parameters(self, config, layer, options, own_selection=True)

    def forward(self, hidden: Tensor, state, call) -> tuple[Tensor, tuple]:
        xz, reverse = bimamba.project_in(self, hidden, call), self._reverse()
        if bimamba.is_fused((self, reverse), xz, call):
            merged = bimamba.fused((self, reverse), xz, self.factor, call)
        else:
            x, z = bimamba.halves(xz, call)
            y = self._one_way(self, x, z, bimamba.whole(call))
            y_b = self._one_way(reverse, bimamba.flip(x), bimamba.flip(z), bimamba.reversed_call(call))
            merged = bimamba.merge(self, y, bimamba.flip(y_b), call)
        return bimamba.project_out(self, merged, call), state

    def _one_way(self, direction, x: Tensor, z: Tensor, call) -> Tensor:
        x = bimamba.convolve(self, direction, x, call)
        return bimamba.recur(direction, x, z, bimamba.steps_of(direction, x, call), call)

    def _reverse(self) -> bimamba.Direction:
        layers = (self.conv1d_b, self.x_proj_b, self.dt_proj_b)
        return bimamba.Direction(*layers, self.A_b_log, self.D_b, self.kernels, self.sizes)


Mixer = BidirectionalMixer
