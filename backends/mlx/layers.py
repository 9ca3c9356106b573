"""Layers of a mixer: as built, they are computed from their weights by our kernels; any other layer is called.

A layer that somebody replaced, subclassed, wrapped or patched is asked for nothing but its output.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.ops import causal_conv
from mamba_core.backends.mlx.ops.linear import linear as product
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call


class StepProjection(nn.Linear):
    """dt_proj. `nn.quantize` leaves it alone: its rank is small and seldom a multiple of a group."""

    def to_quantized(self, *_, **__) -> "StepProjection":
        return self


class DropPath(nn.Dropout):
    """In training, zeros for all of a row with that probability; the other rows are scaled to the same mean."""

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self._p_1 == 1:
            return x
        kept = mx.random.bernoulli(self._p_1, (len(x), *(1,) * (x.ndim - 1)))
        return x * kept.astype(x.dtype) / self._p_1


def linear(layer: Any, x: mx.array, kernel: str = "auto") -> mx.array:
    """layer(x), by a kernel where the layer is an untouched `nn.Linear`.

    Any other layer is called with (b, l, i), also where x is (b, i).
    """
    if not untouched(nn.Linear, layer):
        return layer(x[:, None])[:, 0] if x.ndim == 2 else layer(x)
    y = product(x, layer.weight, kernel)
    return y + layer.bias if "bias" in layer else y


def step_projection(layer: Any, dt: mx.array, kernel: str = "auto") -> tuple[mx.array, mx.array | None]:
    """The step sizes before the softplus, and the bias that the scan is to add to them in float32.

    Of a layer that is called, the step sizes have the bias inside, and there is none to add.
    """
    if not _is_step_projection(layer):
        return layer(dt), None
    return product(dt, layer.weight, kernel), layer.get("bias")


def bias(layer: Any, dt: mx.array) -> mx.array:
    """The bias of a step projection, (e,) float32: what it gives for zeros."""
    if _is_step_projection(layer) and "bias" in layer:
        return layer.bias.astype(mx.float32)
    return layer(mx.zeros((1, 1, dt.shape[-1]), dt.dtype))[0, 0].astype(mx.float32)


def _is_step_projection(layer: Any) -> bool:
    """Whether this is an untouched `StepProjection`, or the `nn.Linear` into which mlx-lm fuses its adapters."""
    return untouched(StepProjection, layer) or untouched(nn.Linear, layer)


def convolution(
    layer: Any, x: mx.array, state: mx.array, call: Call, kernel: str, name: str, activation: str | None = "silu"
) -> tuple[mx.array, mx.array]:
    """The causal convolution with its activation, (b, l, e), and its state: the last k-1 inputs, (b, k-1, e).

    name: of the layer, for errors. activation: "silu" or None.
    """
    if not is_convolution(layer, state.shape[1] + 1):
        return causal_conv.by_module(layer, x, state, call, activation, name)
    weight, bias = layer.weight[..., 0], layer.get("bias")
    if call.one:
        y, state = causal_conv.causal_conv_step(x[:, 0], weight, bias, activation=activation, state=state)
        return y[:, None], state
    how = {"activation": activation, "initial_state": state, "kernel": kernel}
    return causal_conv.conv(call, x, weight, bias, **how)


def is_convolution(layer: Any, taps: int | None = None) -> bool:
    """Whether this is an untouched causal convolution of each channel, with the padding of one that is built.

    taps: how many it has, where that is known.
    """
    if not untouched(nn.Conv1d, layer):
        return False
    channels, found, inputs = layer.weight.shape
    settings = (layer.stride, layer.dilation, layer.padding, layer.groups, inputs)
    return settings == (1, 1, found - 1, channels, 1) and taps in (None, found)
