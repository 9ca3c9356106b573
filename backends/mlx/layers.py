"""Layers of a mixer: by our kernels as they were built, else called, so that whatever stands in their place acts.

A layer that was replaced, subclassed, wrapped or patched is asked for nothing but its output. `ops.linear.call` is the
same for linear layers.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.ops import causal_conv as conv
from mamba_core.backends.mlx.ops import linear
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call


class StepProjection(nn.Linear):
    """dt_proj. `nn.quantize` leaves it alone: its rank is small and seldom a multiple of a group."""

    def to_quantized(self, *_, **__) -> "StepProjection":
        return self


def step_projection(layer: Any, dt: mx.array, kernel: str = "auto") -> tuple[mx.array, mx.array | None]:
    """delta (b, l, e), and the bias that the scan still has to add to it in float32.

    A layer that is called adds its bias itself, and there is none left.
    """
    if not is_built_as_linear(layer):
        return layer(dt), None
    return linear.linear(dt, layer.weight, kernel), layer.get("bias")


def step_bias(layer: Any, dt: mx.array) -> mx.array:
    """The bias (e,) of a step projection, float32: of a layer that is called, what it gives for zeros."""
    if is_built_as_linear(layer) and "bias" in layer:
        return layer.bias.astype(mx.float32)
    return layer(mx.zeros((1, 1, dt.shape[-1]), dt.dtype))[0, 0].astype(mx.float32)


def is_built_as_linear(layer: Any) -> bool:
    """Whether the layer's weights may be read in its place: `mlx_lm` fuses a `StepProjection` to an `nn.Linear`."""
    return untouched(StepProjection, layer) or untouched(nn.Linear, layer)


def causal_conv(
    layer: Any, x: mx.array, state: mx.array, call: Call, kernel: str, name: str
) -> tuple[mx.array, mx.array]:
    """The convolution and its SiLU; x (b, l, e), state (b, k-1, e) -> (b, l, e) and the new state.

    name: of the layer, for errors.
    """
    if not _is_built_as_causal_conv(layer, state.shape[1] + 1):
        y, state = called_conv(layer, x, state, call, name)
        return nn.silu(y.astype(mx.float32)).astype(x.dtype), state
    weight, bias = layer.weight[..., 0], layer.get("bias")
    if call.one:
        y, state = conv.causal_conv_step(x[:, 0], weight, bias, activation="silu", state=state)
        return y[:, None], state
    return conv.conv(call, x, weight, bias, activation="silu", initial_state=state, kernel=kernel)


def called_conv(layer: Any, x: mx.array, state: mx.array, call: Call, name: str) -> tuple[mx.array, mx.array]:
    """What a convolution gives when it is called, without a SiLU; as `causal_conv`.

    Where segments begin, it is shown the k inputs of each position as a row of their own, zero where they belong to
    another segment: k times the work, and right for any layer.

    Raises:
        TypeError: it reaches further back than the state, or gives another number of positions.
    """
    carried = state.shape[1]
    _check_reach(layer, carried + 1, name)

    def compute(inputs, runs):
        if runs is None:
            return _valid(layer(inputs), inputs.shape[1], carried, name)
        windows = mx.stack(conv.taps_in_run(inputs, runs, carried), axis=2)
        batch, length, taps, channels = windows.shape
        y = _valid(layer(windows.reshape(batch * length, taps, channels)), taps, carried, name)
        return y.reshape(batch, length, -1)

    return conv.in_order(call, x, state, carried, compute)


def _is_built_as_causal_conv(layer, taps: int) -> bool:
    if not untouched(nn.Conv1d, layer):
        return False
    shape = layer.weight.shape
    settings = (layer.stride, layer.dilation, layer.padding, layer.groups)
    return settings == (1, 1, taps - 1, shape[0]) and shape[1:] == (taps, 1)


def _check_reach(layer, taps: int, name: str) -> None:
    """Check that no convolution inside reaches further back than the inputs that a state carries."""
    inside = layer.modules() if isinstance(layer, nn.Module) else []
    for module in inside:
        if isinstance(module, nn.Conv1d):
            settings = {"stride": (module.stride, 1), "dilation": (module.dilation, 1)}
            for setting, (found, expected) in settings.items():
                if found != expected:
                    raise TypeError(f"{name} has a convolution with {setting} {found}; expected {setting} {expected}")
            if module.weight.shape[1] > taps:
                raise TypeError(
                    f"{name} has a convolution of {module.weight.shape[1]} taps; expected at most {taps}, which is "
                    "as far as the model's state reaches back"
                )


def _valid(y, length: int, carried: int, name: str) -> mx.array:
    """Of what a convolution gives for `length` inputs, the positions that have all of their inputs among them."""
    if y.ndim == 3 and y.shape[1] in (length + carried, length):
        return y[:, carried:length]
    if y.ndim != 3 or y.shape[1] != length - carried:
        raise TypeError(
            f"{name} gives shape {y.shape} for {length} positions; expected (b, l, e) with {length} positions (padded "
            f"in front), {length + carried} (padded on both sides) or {length - carried} (not padded)"
        )
    return y
