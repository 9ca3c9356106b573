"""Layers of a mixer: as built, they are computed from their weights by our kernels; any other layer is called.

A layer that somebody replaced or wrapped need not have weights, so that nothing here asks it for any.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backends.torch.kernels import onednn_linear
from mamba_core.backends.torch.ops import causal_conv
from mamba_core.backends.torch.ops.linear import linear as product
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call


class StepProjection(nn.Linear):
    """A linear layer whose bias may stay in float32, where it is added."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def linear(layer: nn.Module, x: Tensor, kernel: str = "auto") -> Tensor:
    """layer(x), by the kernels of the op if the layer is an untouched `nn.Linear`.

    What another layer gives is brought to the dtype of x, but for that of autocast.
    """
    if untouched(nn.Linear, layer):
        if not (onednn_linear.ONEDNN_IS_FASTER or x.is_cpu):
            return layer(x)
        return product(x, layer.weight, layer.bias, kernel=kernel)
    y = layer(x)
    return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def step_projection(layer: nn.Module, dt: Tensor, kernel: str = "auto") -> tuple[Tensor, Tensor | None]:
    """The step sizes before the softplus, and the bias that the scan is to add to them in float32.

    Of a layer that is not as built, the step sizes have the bias inside, and there is none to add.
    """
    if untouched(StepProjection, layer):
        return product(dt, layer.weight, kernel=kernel), layer.bias
    return layer(dt).to(dt.dtype), None


def bias(layer: nn.Module, dt: Tensor) -> Tensor:
    """The bias of a step projection, (e,) float32: what it gives for zeros."""
    if untouched(StepProjection, layer):
        return torch.zeros_like(layer.weight[:, 0], dtype=torch.float32) if layer.bias is None else layer.bias
    given = layer(dt.new_zeros(1, 1, dt.shape[-1]))[0, 0]
    return given if given.dtype == torch.float64 else given.float()


def convolution(
    layer: nn.Module, x: Tensor, state: Tensor, call: Call, kernel: str, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """The causal convolution with its activation, (b, l, e), and its state: the last k-1 inputs, (b, k-1, e)."""
    if not is_convolution(layer) or layer.kernel_size[0] != state.shape[1] + 1:
        return causal_conv.by_module(layer, x, state, call, activation)
    weight = layer.weight[:, 0]
    if call.one:
        y, state = causal_conv.causal_conv_step(x[:, 0], weight, layer.bias, activation=activation, state=state)
        return y[:, None], state
    return causal_conv.conv(call, x, weight, layer.bias, activation=activation, initial_state=state, kernel=kernel)


def is_convolution(layer: nn.Module) -> bool:
    """Whether this is an untouched causal convolution of each channel, with the padding of one that is built."""
    return (
        untouched(nn.Conv1d, layer)
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.padding == (layer.kernel_size[0] - 1,)
        and layer.stride == layer.dilation == (1,)
        and layer.padding_mode == "zeros"
    )
