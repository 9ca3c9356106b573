"""The norm and the residual block, as `mlx.nn` modules with the canonical parameter names."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.mixers import Options, mixer_class
from mamba_core.backends.mlx.ops.rms_norm import rms_norm
from mamba_core.call import Call


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight in float32, returned in the dtype of the weight."""

    def __init__(self, dims: int, eps: float, options: Options):
        super().__init__(dims, eps)
        self.kernel = options.kernels.of("rms_norm")

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps, kernel=self.kernel)


class Block(nn.Module):
    """residual + mixer(norm(residual)); with a feed-forward, to that result is added feed_forward(norm2(result)).

    mixer, feed_forward: the names of files in `mixers/`.
    """

    def __init__(self, config, layer: int, mixer: str, feed_forward: str | None, options: Options):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, options)
        self.mixer = mixer_class(mixer)(config, layer, options)
        if feed_forward is not None:
            self.norm2 = RMSNorm(config.d_model, config.norm_eps, options)
            self.feed_forward = mixer_class(feed_forward)(config, layer, options)

    def __call__(self, residual: mx.array, state: tuple, call: Call) -> tuple[mx.array, tuple]:
        """The residual stream after the block, at the positions that the mixer returns, and the state."""
        hidden, state = self.mixer(call.observe("norm", self.norm(residual)), state, call)
        residual = residual[:, -hidden.shape[1] :] if hidden.shape[1] < residual.shape[1] else residual
        if "feed_forward" not in self:
            return call.observe("residual", residual + hidden), state
        residual = call.observe("mixed", residual + hidden)
        hidden = self.feed_forward(call.observe("norm2", self.norm2(residual)), call)
        return call.observe("residual", residual + hidden), state
