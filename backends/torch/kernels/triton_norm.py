"""Norms in Triton: of the sum of a residual block, in one pass over the residual stream, and of dt, B and C."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels import triton
from mamba_core.backends.torch.kernels.operator import differentiable, refuse_tangents
from mamba_core.backends.torch.kernels.triton import (
    after_the_last,
    blocks_of,
    jit,
    launching,
    let_the_next_begin,
    overlapping,
    power_of_2,
    tl,
)

# Rows are dealt out to so many programs, each with its own sum of the weight's gradient: no atomics, the same bits.
PROGRAMS = 1024
# A row is held in registers.
WIDEST = 16384
# Entries of dt, or of B and C, that a program holds at once.
ENTRIES = 1024


def reason(device: torch.device, dtype: torch.dtype | None, d: int) -> str | None:
    """Why it cannot run on that device, for rows of that dtype and width; None if it can."""
    if d > WIDEST:
        return f"rows have {d} entries, and it holds at most {WIDEST}"
    return triton.reason(device, *([] if dtype is None else [dtype]))


def add_norm(residual: Tensor, hidden: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
    """(norm(residual + hidden), residual + hidden), as `blocks.RMSNorm` and the sum before it compute them.

    residual (..., d) and the sum are in one dtype, the norm in `dtype`; hidden may be None. Plain operations:

        total = residual + hidden
        total.float() * rsqrt(mean(total.float()^2) + eps) * weight.float()
    """
    return _add_norm(residual, hidden, weight, eps, dtype)


@torch.library.custom_op("mamba_core::add_norm", mutates_args=())
def _forward(
    residual: Tensor, hidden: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual + hidden, the factor of each row)."""
    refuse_tangents(residual, hidden, weight)
    return sum_and_norm(residual, hidden, weight, eps, dtype)


def sum_and_norm(residual, hidden, weight, eps, dtype, overlap=False) -> tuple[Tensor, Tensor, Tensor]:
    """`_forward` outside of the dispatcher; overlap: see `triton.overlapping`."""
    residual, weight = residual.contiguous(), weight.contiguous()
    normed, total, scale = _empty_results(residual, dtype)
    d = residual.shape[-1]
    if rows := residual.numel() // d:
        block = power_of_2(d)
        with launching(residual):
            _add_norm_kernel[(rows,)](
                residual,
                residual if hidden is None else hidden.contiguous(),
                weight,
                normed,
                total,
                scale,
                eps,
                D=d,
                HIDDEN=hidden is not None,
                BLOCK=block,
                num_warps=_warps(block),
                **overlapping(overlap),
            )
    return normed, total, scale


@torch.library.custom_op("mamba_core::add_norm_backward", mutates_args=())
def _backward(
    dnormed: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    scale: Tensor,
    residual: Tensor,
    hidden: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Of residual, hidden where given, and weight."""
    weight = weight.contiguous()
    dresidual = torch.empty_like(total)
    dhidden = dresidual if hidden is None else hidden.new_empty(hidden.shape)
    d = total.shape[-1]
    rows = total.numel() // d
    each = power_of_2(blocks_of(rows, PROGRAMS))
    parts = scale.new_empty(blocks_of(rows, each), d)
    if rows:
        block = power_of_2(d)
        with launching(total):
            _add_norm_backward_kernel[(len(parts),)](
                dnormed.contiguous(),
                dnormed if dtotal is None else dtotal.contiguous(),
                total,
                weight,
                scale,
                dresidual,
                dhidden,
                parts,
                rows,
                D=d,
                EACH=each,
                DTOTAL=dtotal is not None,
                HIDDEN=hidden is not None,
                BLOCK=block,
                num_warps=_warps(block),
            )
    given = [] if hidden is None else [dhidden]
    return [dresidual, *given, parts.sum(0).to(weight.dtype)]


@_forward.register_fake
def _(residual, hidden, weight, eps, dtype):
    return _empty_results(residual, dtype)


@_backward.register_fake
def _(dnormed, dtotal, total, scale, residual, hidden, weight, eps, dtype):
    return [value.new_empty(value.shape) for value in (residual, hidden, weight) if value is not None]


# The residual stream is kept once, as the sum.
_add_norm = differentiable(_forward, _backward, kept=(1, 2), unread=(0, 1))


def unit_norms(dtbc: Tensor, states: int, eps: float, weights: Tensor | None = None) -> Tensor:
    """dt, B and C, which lie side by side in dtbc (..., r + 2n), each times rsqrt(mean(itself^2) + eps).

    weights: (r + 2n), by which they are then multiplied, in float32; None for none.
    """
    normed = torch.empty_like(dtbc)
    _on_parts(_unit_norms_kernel, (dtbc, normed), weights, None, states, eps)
    return normed


def unit_norms_backward_(
    dnormed: Tensor, dtbc: Tensor, states: int, eps: float, weights: Tensor | None = None
) -> Tensor | None:
    """Makes the gradient of `unit_norms` of its result's gradient, in its memory; returns that of the weights."""
    width = dtbc.shape[-1]
    parts = None if weights is None else dtbc.new_empty(*_programs_of_parts(dtbc, states), width, dtype=torch.float32)
    _on_parts(_unit_norms_backward_kernel, (dtbc, dnormed), weights, parts, states, eps)
    return None if parts is None else parts.sum(0)


def _programs_of_parts(dtbc: Tensor, states: int) -> tuple[int]:
    width = dtbc.shape[-1]
    return (blocks_of(dtbc.numel() // width, _rows_of_parts(width, states)),)


def _rows_of_parts(width: int, states: int) -> int:
    """Rows of a program."""
    return max(1, ENTRIES // power_of_2(max(width - 2 * states, states)))


def _on_parts(kernel, arrays, weights, parts, states, eps):
    """Launches a kernel on the rows of contiguous arrays."""
    width = arrays[0].shape[-1]
    rank, rows = width - 2 * states, arrays[0].numel() // width
    if rows:
        with launching(arrays[0]):
            kernel[_programs_of_parts(arrays[0], states)](
                *arrays,
                *(arrays[0] if value is None else value for value in (weights, parts)),
                rows,
                eps,
                RANK=rank,
                STATES=states,
                WEIGHTED=weights is not None,
                ROWS=_rows_of_parts(width, states),
                BLOCK_RANK=power_of_2(rank),
                BLOCK_STATES=power_of_2(states),
            )


def _empty_results(residual, dtype):
    shape = residual.shape
    scale = residual.new_empty(shape[:-1], dtype=torch.float32)
    return residual.new_empty(shape, dtype=dtype), residual.new_empty(shape), scale


def _warps(block):
    return min(8, max(1, block // 256))


@jit
def _add_norm_kernel(
    residual,
    hidden,
    weight,
    normed,
    total,
    scale,
    eps,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_the_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < D
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    after_the_last(OVERLAP)
    x = tl.load(residual + row * D + k, mask=inside, other=0.0)
    if HIDDEN:
        more = tl.load(hidden + row * D + k, mask=inside, other=0.0)
        # Rounded as the stream is kept, before it is normalised.
        x = (x.to(tl.float32) + more.to(tl.float32)).to(total.dtype.element_ty)
    tl.store(total + row * D + k, x, mask=inside)
    x = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x) / D + eps)
    tl.store(scale + row, factor)
    tl.store(normed + row * D + k, (x * factor * w).to(normed.dtype.element_ty), mask=inside)


@jit
def _add_norm_backward_kernel(
    dnormed,
    dtotal,
    total,
    weight,
    scale,
    dresidual,
    dhidden,
    parts,
    rows,
    D: tl.constexpr,
    EACH: tl.constexpr,
    DTOTAL: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < D
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for index in range(EACH):
        row = (program * EACH + index).to(tl.int64)
        here = inside & (row < rows)
        x = tl.load(total + row * D + k, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dnormed + row * D + k, mask=here, other=0.0).to(tl.float32)
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
        x = x * factor
        dw += dy * x
        dy = dy * w
        dx = factor * (dy - x * (tl.sum(dy * x) / D))
        if DTOTAL:
            dx += tl.load(dtotal + row * D + k, mask=here, other=0.0).to(tl.float32)
        tl.store(dresidual + row * D + k, dx.to(dresidual.dtype.element_ty), mask=here)
        if HIDDEN:
            tl.store(dhidden + row * D + k, dx.to(dhidden.dtype.element_ty), mask=here)
    tl.store(parts + program * D + k, dw, mask=inside)


@jit
def unit_normed(x, eps, COUNT: tl.constexpr):
    """x in float32 times rsqrt(mean(x^2) + eps) along its last axis, of COUNT entries and zeros after them."""
    return x * tl.rsqrt(tl.sum(x * x, -1, keep_dims=True) / COUNT + eps)


@jit
def _unit_norms_kernel(
    dtbc,
    normed,
    weights,
    parts,
    rows,
    eps,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place, known = row * (RANK + 2 * STATES), row < rows
    _norm_part(dtbc, normed, weights, 0, place, known, eps, RANK, BLOCK_RANK, WEIGHTED)
    _norm_part(dtbc, normed, weights, RANK, place, known, eps, STATES, BLOCK_STATES, WEIGHTED)
    _norm_part(dtbc, normed, weights, RANK + STATES, place, known, eps, STATES, BLOCK_STATES, WEIGHTED)


@jit
def _norm_part(
    values,
    normed,
    weights,
    first,
    place,
    known,
    eps,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    k = first + tl.arange(0, BLOCK)[None, :]
    inside = known & (k < first + COUNT)
    x = tl.load(values + place + k, mask=inside, other=0.0).to(tl.float32)
    x = unit_normed(x, eps, COUNT)
    if WEIGHTED:
        x *= tl.load(weights + k, mask=k < first + COUNT, other=0.0).to(tl.float32)
    tl.store(normed + place + k, x.to(normed.dtype.element_ty), mask=inside)


@jit
def _unit_norms_backward_kernel(
    dtbc,
    gradient,
    weights,
    parts,
    rows,
    eps,
    RANK: tl.constexpr,
    STATES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
):
    """parts: (programs, r + 2n) float32, each program's share of the weights' gradient."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place, known = row * (RANK + 2 * STATES), row < rows
    parts += tl.program_id(0) * (RANK + 2 * STATES)
    _norm_part_backward(dtbc, gradient, weights, parts, 0, place, known, eps, RANK, BLOCK_RANK, WEIGHTED)
    _norm_part_backward(dtbc, gradient, weights, parts, RANK, place, known, eps, STATES, BLOCK_STATES, WEIGHTED)
    _norm_part_backward(
        dtbc, gradient, weights, parts, RANK + STATES, place, known, eps, STATES, BLOCK_STATES, WEIGHTED
    )


@jit
def _norm_part_backward(
    values,
    gradient,
    weights,
    parts,
    first,
    place,
    known,
    eps,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    k = first + tl.arange(0, BLOCK)[None, :]
    inside = known & (k < first + COUNT)
    x = tl.load(values + place + k, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(gradient + place + k, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, -1, keep_dims=True) / COUNT + eps)
    x = x * factor
    if WEIGHTED:
        tl.store(parts + k, tl.sum(dy * x, 0, keep_dims=True), mask=k < first + COUNT)
        dy *= tl.load(weights + k, mask=k < first + COUNT, other=0.0).to(tl.float32)
    dx = factor * (dy - x * (tl.sum(dy * x, -1, keep_dims=True) / COUNT))
    tl.store(gradient + place + k, dx.to(gradient.dtype.element_ty), mask=inside)
