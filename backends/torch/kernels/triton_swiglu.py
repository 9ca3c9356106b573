"""SwiGLU's product with its gate in Triton, as an operator that keeps only its input."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels.operator import differentiable, refuse_tangents
from mamba_core.backends.torch.kernels.triton import blocks_of, jit, launching, tl

# Entries of a row that a program computes.
BLOCK = 1024


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of gate | up (..., 2 i); computed in float32, in the dtype of x."""
    (y,) = _swiglu(x)
    return y


@torch.library.custom_op("mamba_core::swiglu", mutates_args=())
def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, nothing): an operator with one result would not be given its gradient in a row."""
    refuse_tangents(x)
    return _computed(x), x.new_empty(0)


def _computed(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if y.numel():
        rows, width = y.numel() // y.shape[-1], y.shape[-1]
        with launching(x):
            _swiglu_kernel[(rows, blocks_of(width, BLOCK))](x, y, WIDTH=width, BLOCK=BLOCK)
    return y


@torch.library.custom_op("mamba_core::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor) -> list[Tensor]:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if dy.numel():
        rows, width = dy.numel() // dy.shape[-1], dy.shape[-1]
        with launching(x):
            _swiglu_backward_kernel[(rows, blocks_of(width, BLOCK))](dy, x, dx, WIDTH=width, BLOCK=BLOCK)
    return [dx]


@_forward.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2), x.new_empty(0)


@_backward.register_fake
def _(dy, x):
    return [x.new_empty(x.shape)]


_swiglu = differentiable(_forward, _backward, results=1, kept=(), function=lambda x: (_computed(x),))


@jit
def _swiglu_kernel(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + k, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@jit
def _swiglu_backward_kernel(dy, x, dx, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, place = k < WIDTH, row * 2 * WIDTH + k
    arriving = tl.load(dy + row * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    dgate = arriving * up * opened * (1.0 + gate * (1.0 - opened))
    tl.store(dx + place, dgate.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + place + WIDTH, (arriving * gate * opened).to(dx.dtype.element_ty), mask=inside)
