"""What is between the in_proj and the out_proj of a mixer with two directions as one operator.

Nothing is flipped in memory: the reverse direction's kernels walk in_proj's output, the gate and the arriving gradient
from the last position on, and its gradient of in_proj's output is added to that of the other direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_mixer
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents
from mamba_core.backends.torch.kernels.triton import blocks_of, jit, launching, tl
from mamba_core.backends.torch.kernels.triton_mixer import Weights

# Channels and positions of a program of the merging kernel.
CHANNELS, POSITIONS = 128, 8
WEIGHTS = len(Weights._fields) - 1


def merged(xz: Tensor, forwards: Weights, backwards: Weights, factor: float, restart, restart_b) -> Tensor:
    """The sum of the two directions times the factor, (b, l, e), from what in_proj gives, (b, l, 2e).

    Each direction begins from a state of zeros, and dt, B and C have no norms. restart (b, l) bool is of the positions
    as they lie, restart_b of them in reverse order. With `triton_mixer.inner` in plain operations:

        y, y_b = inner(xz, *forwards), inner(xz.flip(1), *backwards).flip(1)
        (y + y_b) * factor
    """
    tensors = (xz, *forwards[:-1], *backwards[:-1], restart, restart_b)
    keep = torch.is_grad_enabled() and any(is_float(value) and value.requires_grad for value in tensors)
    return _merged(*tensors, factor, keep)[0]


def _forward(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    delta_bias: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_b: Tensor,
    dt_proj_b: Tensor,
    delta_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    restart: Tensor | None,
    restart_b: Tensor | None,
    factor: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(the merged directions, x_proj's output and the scan's kept states of each)."""
    forwards = Weights(conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D)
    backwards = Weights(conv_weight_b, conv_bias_b, x_proj_b, dt_proj_b, delta_bias_b, A_b, D_b)
    refuse_tangents(xz, *forwards, *backwards)
    y, *_, dtbc, kept = triton_mixer.forward(xz, forwards, None, None, restart, 0.0, keep)
    y_b, *_, dtbc_b, kept_b = triton_mixer.forward(xz, backwards, None, None, restart_b, 0.0, keep, reverse=True)
    return _merge(y, y_b, factor), dtbc, kept, dtbc_b, kept_b


_operator = torch.library.custom_op("mamba_core::directions", mutates_args=())(_forward)


@torch.library.custom_op("mamba_core::directions_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dtbc: Tensor,
    kept: Tensor,
    dtbc_b: Tensor,
    kept_b: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    delta_bias: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_b: Tensor,
    dt_proj_b: Tensor,
    delta_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    restart: Tensor | None,
    restart_b: Tensor | None,
    factor: float,
    keep: bool,
) -> list[Tensor]:
    forwards = Weights(conv_weight, conv_bias, x_proj, dt_proj, delta_bias, A, D)
    backwards = Weights(conv_weight_b, conv_bias_b, x_proj_b, dt_proj_b, delta_bias_b, A_b, D_b)
    dy, dxz = dy * factor, torch.empty_like(xz)
    given = (dy, None, None, dtbc, kept, xz, forwards, None, None, restart, 0.0, keep, dxz)
    gradients = triton_mixer.backward(*given)
    given = (dy, None, None, dtbc_b, kept_b, xz, backwards, None, None, restart_b, 0.0, keep, dxz)
    return [dxz, *gradients, *triton_mixer.backward(*given, reverse=True, adds=True)]


@_operator.register_fake
def _(xz, *given):
    *tensors, _, keep = given
    parts = []
    for weights, restart in ((tensors[:WEIGHTS], tensors[-2]), (tensors[WEIGHTS : 2 * WEIGHTS], tensors[-1])):
        conv_weight, _, x_proj, dt_proj, delta_bias, A, D = weights
        zeros = xz.new_empty(len(xz), conv_weight.shape[1] - 1, len(A)), A.new_empty(len(xz), *A.shape)
        inputs = (xz, conv_weight, None, x_proj, dt_proj, delta_bias, A, D, None, *zeros, restart, 0.0, keep)
        y, _, _, *kept = triton_mixer.fake(*inputs)
        parts += kept
    return (y, *parts)


@_backward.register_fake
def _(dy, dtbc, kept, dtbc_b, kept_b, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_merged = differentiable(_operator, _backward, results=1, kept=(1, 2, 3, 4), function=_forward)


def _merge(y: Tensor, y_b: Tensor, factor: float) -> Tensor:
    """(y + y_b) * factor, of y_b in reverse order."""
    (b, l, e), out = y.shape, torch.empty_like(y)
    if out.numel():
        with launching(y):
            grid = blocks_of(e, CHANNELS), blocks_of(l, POSITIONS), b
            _merge_kernel[grid](y, y_b, out, factor, l, E=e, CHANNELS=CHANNELS, POSITIONS=POSITIONS)
    return out


@jit
def _merge_kernel(y, y_b, out, factor, l, E: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    row = tl.program_id(2).to(tl.int64) * l
    c = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None]
    s = (tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS))[:, None]
    there = (c < E) & (s < l)
    value = tl.load(y + (row + s) * E + c, mask=there, other=0.0).to(tl.float32)
    value += tl.load(y_b + (row + l - 1 - s) * E + c, mask=there, other=0.0).to(tl.float32)
    tl.store(out + (row + s) * E + c, (value * factor).to(out.dtype.element_ty), mask=there)
