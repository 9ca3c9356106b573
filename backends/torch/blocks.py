"""The norm and the residual block, as `torch.nn` modules with the canonical parameter names."""

import torch
from torch import Tensor, nn

from mamba_core.backends.torch.mixers import Options, mixer_class
from mamba_core.backends.torch.ops import rms_norm
from mamba_core.call import Call


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32, returned in the dtype of the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """residual + mixer(norm(residual)), and with a feed-forward after it: that + feed_forward(norm2(that))."""

    def __init__(self, config, layer: int, mixer: str, feed_forward: str | None, options: Options):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer_class(mixer)(config, layer, options)
        self.norm2 = self.feed_forward = None
        if feed_forward is not None:
            self.norm2 = RMSNorm(config.d_model, config.norm_eps)
            self.feed_forward = mixer_class(feed_forward)(config, layer, options)

    def forward(self, residual: Tensor, state, call: Call) -> tuple:
        """The residual stream (b, l, d) and the layer's state after the block."""
        hidden, state = self.mixer(call.observe("norm", self._normed(self.norm, residual)), state, call)
        if self.feed_forward is None:
            return call.observe("residual", residual + hidden), state
        residual = call.observe("mixed", residual + hidden)
        hidden = self.feed_forward(call.observe("norm2", self._normed(self.norm2, residual)), call)
        return call.observe("residual", residual + hidden), state

    def _normed(self, norm: nn.Module, residual: Tensor) -> Tensor:
        """By a norm that somebody put here, in the compute dtype, which it need not return."""
        normed = norm(residual)
        return normed if type(norm) is RMSNorm else normed.to(anchor(self).dtype)


def anchor(module: nn.Module) -> Tensor:
    """A parameter in the compute dtype, where the module is computed: a norm's, or the first one of two bytes."""
    for part in module.modules():
        if type(part) is RMSNorm:
            return part.weight
    floats = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    return next((parameter for parameter in floats if parameter.dtype.itemsize == 2), floats[0])
