"""The norm of Mamba-2 with its gate in Triton: one pass over y and z, and one for all gradients."""

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
# A group of a row is held in registers.
WIDEST = 8192


def reason(device: torch.device, width: int, *dtypes: torch.dtype) -> str | None:
    """Why it cannot run on that device, for groups of that width and tensors of those dtypes; None if it can."""
    if width > WIDEST:
        return f"a group has {width} channels, and it holds at most {WIDEST}"
    return triton.reason(device, *dtypes)


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, norm_before_gate: bool, dtype: torch.dtype
) -> Tensor:
    """The norm of y with the gate z, (..., e) each, in `dtype`. Its plain form is `ops.gated_norm.plain`."""
    return _gated_norm(y, z, weight, groups, eps, norm_before_gate, dtype)[0]


@torch.library.custom_op("mamba_core::gated_norm", mutates_args=())
def _forward(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, norm_before_gate: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(the norm, the factor of each group)."""
    refuse_tangents(y, z, weight)
    normed, factors = _empty_results(y, groups, dtype)
    gate_and_norm(y, z, weight, groups, eps, norm_before_gate, normed, factors)
    return normed, factors


def gate_and_norm(y, z, weight, groups, eps, norm_before_gate, normed, factors=None, overlap=False) -> None:
    """Writes the norm, and where they are asked for the factors; overlap: see `triton.overlapping`.

    The rows of y and of z, and those of `normed` where it has two axes, may lie apart.
    """
    y, z, weight = _rows(y), _rows(z), weight.contiguous()
    rows, e = y.shape
    block = power_of_2(e // groups)
    if rows:
        with launching(y):
            _gated_norm_kernel[(rows * groups,)](
                y,
                z,
                weight,
                normed,
                normed if factors is None else factors,
                eps,
                E=e,
                GROUPS=groups,
                Y_STRIDE=_stride(y),
                Z_STRIDE=_stride(z),
                STRIDE=_stride(normed.view(rows, e) if normed.is_contiguous() else normed),
                BEFORE=norm_before_gate,
                FACTORS=factors is not None,
                BLOCK=block,
                num_warps=_warps(block),
                **overlapping(overlap),
            )


@torch.library.custom_op("mamba_core::gated_norm_backward", mutates_args=())
def _backward(
    dnormed: Tensor,
    factors: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    groups: int,
    eps: float,
    norm_before_gate: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Of y, z and weight."""
    dy, dz = y.new_empty(y.shape), z.new_empty(z.shape)
    dnormed, y, z, weight = _rows(dnormed), _rows(y), _rows(z), weight.contiguous()
    rows, e = y.shape
    each = power_of_2(blocks_of(rows * groups, PROGRAMS))
    parts = factors.new_empty(blocks_of(rows, each), e)
    block = power_of_2(e // groups)
    if rows:
        with launching(y):
            _gated_norm_backward_kernel[(len(parts) * groups,)](
                dnormed,
                y,
                z,
                weight,
                factors,
                dy,
                dz,
                parts,
                rows,
                E=e,
                GROUPS=groups,
                EACH=each,
                STRIDE=_stride(dnormed),
                Y_STRIDE=_stride(y),
                Z_STRIDE=_stride(z),
                BEFORE=norm_before_gate,
                BLOCK=block,
                num_warps=_warps(block),
            )
    return [dy, dz, parts.sum(0).to(weight.dtype)]


@_forward.register_fake
def _(y, z, weight, groups, eps, norm_before_gate, dtype):
    return _empty_results(y, groups, dtype)


@_backward.register_fake
def _(dnormed, factors, y, z, weight, groups, eps, norm_before_gate, dtype):
    return [value.new_empty(value.shape) for value in (y, z, weight)]


_gated_norm = differentiable(_forward, _backward, results=1, kept=(1,))


def _empty_results(y, groups, dtype):
    return y.new_empty(y.shape, dtype=dtype), y.new_empty(*y.shape[:-1], groups, dtype=torch.float32)


def _rows(value: Tensor) -> Tensor:
    """(rows, e), adjacent in each row; a view where that is possible."""
    value = value if value.stride(-1) == 1 else value.contiguous()
    return value.reshape(-1, value.shape[-1])


def _stride(rows: Tensor) -> int:
    # Of one row it says nothing, and a kernel is compiled for each.
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]


def _warps(block):
    return min(16, max(1, block // 256))


# A row's stride is a constant of the kernel, because only of a known multiple of 8 can 16 bytes be read at once.
@jit
def _gated_norm_kernel(
    y,
    z,
    weight,
    normed,
    factors,
    eps,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    BEFORE: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_the_next_begin(OVERLAP)
    WIDTH: tl.constexpr = E // GROUPS
    row, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    k += group * WIDTH
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    after_the_last(OVERLAP)
    u = tl.load(y + row * Y_STRIDE + k, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + row * Z_STRIDE + k, mask=inside, other=0.0).to(tl.float32)
    gate = gate * tl.sigmoid(gate)
    if not BEFORE:
        u = u * gate
    factor = tl.rsqrt(tl.sum(u * u) / WIDTH + eps)
    u = u * factor * w
    if BEFORE:
        u = u * gate
    tl.store(normed + row * STRIDE + k, u.to(normed.dtype.element_ty), mask=inside)
    if FACTORS:
        tl.store(factors + tl.program_id(0), factor)


@jit
def _gated_norm_backward_kernel(
    dnormed,
    y,
    z,
    weight,
    factors,
    dy,
    dz,
    parts,
    rows,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WIDTH: tl.constexpr = E // GROUPS
    part, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    k += group * WIDTH
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for index in range(EACH):
        row = part * EACH + index
        here = inside & (row < rows)
        u = tl.load(y + row * Y_STRIDE + k, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(z + row * Z_STRIDE + k, mask=here, other=0.0).to(tl.float32)
        given = tl.load(dnormed + row * STRIDE + k, mask=here, other=0.0).to(tl.float32)
        factor = tl.load(factors + row * GROUPS + group, mask=row < rows, other=0.0)
        opened = tl.sigmoid(gate)
        slope, gate = opened * (1.0 + gate * (1.0 - opened)), gate * opened
        if BEFORE:
            n = u * factor
            dgate = given * n * w
            given = given * gate
        else:
            n = u * gate * factor
        dw += given * n
        given = given * w
        du = factor * (given - n * (tl.sum(given * n) / WIDTH))
        if not BEFORE:
            dgate = du * u
            du = du * gate
        tl.store(dy + row * E + k, du.to(dy.dtype.element_ty), mask=here)
        tl.store(dz + row * E + k, (dgate * slope).to(dz.dtype.element_ty), mask=here)
    tl.store(parts + part * E + k, dw, mask=inside)
