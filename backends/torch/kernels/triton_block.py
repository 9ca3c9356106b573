"""The two ends of one position of a block in Triton: norm, in_proj and convolution, and out_proj with the residual sum.

With few rows each end is one kernel. With some dozens of rows the norm is a kernel of its own. With more rows, and in
float32, cuBLAS computes the products. A kernel may begin while the one before it ends: it reads its weights first, then
waits for the other's results (programmatic dependent launch).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_linear, triton_norm, triton_product
from mamba_core.backends.torch.kernels.triton import blocks_of, jit, power_of_2, tl
from mamba_core.backends.torch.quantization import Packed, unpack


def enter(layer, residual: Tensor, hidden: Tensor | None, conv_state, conv_after, counters, first: int = 0):
    """(x, beside, total) of residual + hidden, (b, d) each; hidden may be None, and is None of few rows.

    x (b, c) is the convolution with its SiLU of the outputs of in_proj from `first` on. beside (b, ...) begins with the
    outputs before these and ends with those after them; its rows may lie apart. total (b, d) is the sum.

    layer: its norm, eps, in_proj, in_bias, conv (c, k) and conv_bias are read. conv_state (b, k-1, c) may be the same
    tensor as conv_after. counters: see `triton_product.multiply`.
    """
    c, dtype = len(layer.conv), layer.norm.dtype
    if not (is_few := takes_few(residual)) and not takes_some(layer, residual):
        normed, total, _ = triton_norm._forward(residual, hidden, layer.norm, layer.eps, dtype)
        projected = F.linear(normed, dense(layer.in_proj, dtype), layer.in_bias)
        x = _convolved(projected[:, first : first + c], layer, conv_state, conv_after)
        return x, projected, total
    outputs = len(layer.in_proj.words if isinstance(layer.in_proj, Packed) else layer.in_proj)
    x, beside = (layer.norm.new_empty(len(residual), width) for width in (c, outputs - c))
    convolution = (layer.conv, layer.conv_bias, conv_state, conv_after, beside, first)
    weights = layer.in_proj, layer.in_bias, x
    if is_few:
        assert hidden is None, "with few rows `leave` gives none"
        triton_linear.multiply(residual, *weights, norm=layer.norm, eps=layer.eps, convolution=convolution)
        return x, beside, residual
    normed, total, _ = triton_norm.sum_and_norm(residual, hidden, layer.norm, layer.eps, dtype, overlap=True)
    triton_product.multiply(normed, *weights, counters, convolution)
    return x, beside, total


def project(layer, residual: Tensor, hidden: Tensor | None, counters) -> tuple[Tensor, Tensor]:
    """(in_proj of the norm of residual + hidden, that sum): `enter` without a convolution."""
    dtype = layer.norm.dtype
    if not (is_few := takes_few(residual)) and not takes_some(layer, residual):
        normed, total, _ = triton_norm._forward(residual, hidden, layer.norm, layer.eps, dtype)
        return F.linear(normed, dense(layer.in_proj, dtype), layer.in_bias), total
    projected = layer.norm.new_empty(len(residual), size_of(layer.in_proj)[0])
    if is_few:
        assert hidden is None, "with few rows `leave` gives none"
        weights = layer.in_proj, layer.in_bias, projected
        triton_linear.multiply(residual, *weights, norm=layer.norm, eps=layer.eps)
        return projected, residual
    normed, total, _ = triton_norm.sum_and_norm(residual, hidden, layer.norm, layer.eps, dtype, overlap=True)
    triton_product.multiply(normed, layer.in_proj, layer.in_bias, projected, counters)
    return projected, total


def leave(layer, y: Tensor, total: Tensor, counters: Tensor, norm: Tensor | None = None, eps: float = 0.0):
    """The residual stream, and what is still to be added to it or None, after out_proj of y (b, e).

    norm: of few rows, the weight of a norm of y that is taken with the product.
    """
    if takes_few(y):
        residual = total.new_empty(total.shape)
        triton_linear.multiply(y, layer.out_proj, layer.out_bias, residual, norm=norm, eps=eps, residual=total)
        return residual, None
    if takes_some(layer, y):
        hidden = y.new_empty(total.shape)
        triton_product.multiply(y, layer.out_proj, layer.out_bias, hidden, counters)
        return total, hidden
    return total, F.linear(y, dense(layer.out_proj, y.dtype), layer.out_bias)


def takes_few(rows: Tensor) -> bool:
    return len(rows) <= triton_linear.MOST_ROWS


def takes_some(layer, rows: Tensor) -> bool:
    packed = isinstance(layer.in_proj, Packed) or isinstance(layer.out_proj, Packed)
    return not packed and triton_product.reason(len(rows), layer.norm.dtype) is None


def size_of(weight: Tensor | Packed) -> tuple[int, int]:
    """(outputs, inputs)."""
    if not isinstance(weight, Packed):
        return tuple(weight.shape)
    outputs, words = weight.words.shape
    return outputs, words * 32 // weight.bits


def dense(weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    return unpack(weight, dtype) if isinstance(weight, Packed) else weight


def _convolved(x, layer, conv_state, conv_after):
    (b, c), channels = x.shape, min(64, power_of_2(x.shape[1]))
    y = x.new_empty(b, c)
    _conv_step_kernel[(b, blocks_of(c, channels))](
        x,
        layer.conv,
        layer.conv if layer.conv_bias is None else layer.conv_bias,
        conv_state,
        conv_after,
        y,
        layer.conv.stride(0),
        x.stride(0),
        CHANNELS=c,
        TAPS=layer.conv.shape[1],
        BIAS=layer.conv_bias is not None,
        BLOCK=channels,
        num_warps=1,
    )
    return y


@jit
def _conv_step_kernel(
    x,
    weight,
    bias,
    state,
    after,
    y,
    weight_stride,
    x_stride,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The convolution and its SiLU of one position."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < CHANNELS
    state += b * (TAPS - 1) * CHANNELS + c
    after += b * (TAPS - 1) * CHANNELS + c
    value = tl.load(x + b * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    total = value * tl.load(weight + c * weight_stride + TAPS - 1, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        before = tl.load(state + tap * CHANNELS, mask=inside, other=0.0).to(tl.float32)
        total += before * tl.load(weight + c * weight_stride + tap, mask=inside, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(after + (tap - 1) * CHANNELS, before.to(after.dtype.element_ty), mask=inside)
    if TAPS > 1:
        tl.store(after + (TAPS - 2) * CHANNELS, value.to(after.dtype.element_ty), mask=inside)
    tl.store(y + b * CHANNELS + c, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=inside)
