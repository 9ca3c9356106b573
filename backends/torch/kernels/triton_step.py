"""One position of a Mamba-1 block in Triton: few kernels, each bound by reading its weights.

With few rows a block is four kernels: norm, in_proj and the convolution; x_proj; dt_proj, the recurrence and the gate;
out_proj. See `triton_block` for more rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_block, triton_linear, triton_norm, triton_product
from mamba_core.backends.torch.kernels.triton import (
    INTERPRETED,
    after_the_last,
    blocks_of,
    jit,
    launching,
    let_the_next_begin,
    overlapping,
    power_of_2,
    softplus,
    tl,
)
from mamba_core.backends.torch.quantization import Packed


class Layer(NamedTuple):
    """The weights of a residual block; in_bias, conv_bias and out_bias may be None.

    selection_eps: above 0, each of dt, B and C is divided by its root mean square, with this added to the mean square.
    selection_norms: weights (r), (n), (n) by which they are then multiplied; None for none.
    """

    norm: Tensor
    eps: float
    in_proj: Tensor | Packed
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor | Packed
    out_bias: Tensor | None
    selection_eps: float = 0.0
    selection_norms: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def matrices(self) -> tuple[Tensor | Packed, ...]:
        """Those that are read as they lie in memory, in the dtype of the norm."""
        return self.in_proj, self.x_proj, self.dt_proj, self.out_proj

    def step(self, *arguments):
        return block(self, *arguments)


def block(layer: Layer, residual: Tensor, hidden: Tensor | None, conv_state, ssm_state, after, counters: Tensor):
    """The block of residual + hidden, (b, d) each: the residual stream, and the output that is still to be added to it.

    Either hidden may be None. The new conv_state (b, k-1, e) and ssm_state (b, e, n) are written to `after`, which may
    be the same two tensors. counters: see `triton_product.multiply`.
    """
    conv_after, ssm_after = after
    with launching(residual):
        x, beside, total = triton_block.enter(layer, residual, hidden, conv_state, conv_after, counters)
        dtbc = _selected(layer, x, counters)
        y = torch.empty_like(x)
        _recurrence(layer, x, beside[:, beside.shape[1] - x.shape[1] :], dtbc, ssm_state, ssm_after, y)
        return triton_block.leave(layer, y, total, counters)


def normed_linear(residual: Tensor, hidden: Tensor | None, norm: Tensor, eps: float, weight: Tensor | Packed) -> Tensor:
    """weight (v, d) times the norm of residual + hidden, (b, d) each, in float32."""
    with launching(residual):
        if hidden is None and len(residual) <= triton_linear.MOST_ROWS:
            outputs = len(weight.words if isinstance(weight, Packed) else weight)
            products = residual.new_empty(len(residual), outputs, dtype=torch.float32)
            triton_linear.multiply(residual, weight, None, products, norm=norm, eps=eps)
            return products
        normed, _, _ = triton_norm._forward(residual, hidden, norm, eps, norm.dtype)
        return F.linear(normed, triton_block.dense(weight, norm.dtype)).float()


def embed(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (b, d) of the embedding (v, d) in a dtype; NaN for a token outside of it."""
    (v, d), b = weight.shape, len(tokens)
    rows = torch.empty(b, d, dtype=dtype, device=weight.device)
    with launching(weight):
        _embed_kernel[(b,)](tokens, weight, rows, V=v, D=d, BLOCK=power_of_2(d))
    return rows


def _selected(layer, x, counters):
    """x_proj's output, (b, r + 2n)."""
    b, outputs = len(x), len(layer.x_proj)
    if triton_block.takes_few(x):
        dtbc = x.new_empty(b, outputs, dtype=torch.float32)
        triton_linear.multiply(x, layer.x_proj, None, dtbc)
        return dtbc
    if triton_block.takes_some(layer, x):
        dtbc = x.new_empty(b, outputs)
        triton_product.multiply(x, layer.x_proj, None, dtbc, counters)
        return dtbc
    return F.linear(x, layer.x_proj)


def _recurrence(layer, x, z, dtbc, ssm_state, ssm_after, y):
    b, e, n = ssm_state.shape
    r = layer.dt_proj.shape[1]
    few = b <= triton_linear.MOST_ROWS
    kernel, channels, rows, warps = (_recurrence_kernel, 16, b, 2) if few else (_recurrences_kernel, 32, 16, 4)
    kernel[(blocks_of(e, channels), blocks_of(b, rows))](
        x,
        z,
        dtbc,
        layer.dt_proj,
        layer.dt_bias,
        layer.A_log,
        layer.D,
        ssm_state,
        ssm_after,
        y,
        *(layer.selection_norms or (layer.D,) * 3),
        z.stride(0),
        b,
        E=e,
        STATES=n,
        RANK=r,
        ROWS=rows,
        BLOCK=channels,
        BLOCK_STATES=power_of_2(n),
        BLOCK_RANK=max(16, power_of_2(r)),
        SELECTION_EPS=layer.selection_eps,
        WEIGHTED=layer.selection_norms is not None,
        # The interpreter multiplies matrices of bfloat16 as if they were whole numbers.
        WIDENS=INTERPRETED,
        num_warps=warps,
        **overlapping(),
    )


@jit
def _embed_kernel(tokens, weight, rows, V: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    token = tl.load(tokens + b).to(tl.int64)
    k = tl.arange(0, BLOCK)
    known = (token >= 0) & (token < V)
    value = tl.load(weight + token * D + k, mask=(k < D) & known, other=float("nan"))
    tl.store(rows + b * D + k, value.to(rows.dtype.element_ty), mask=k < D)


@jit
def _recurrence_kernel(
    x,
    z,
    dtbc,
    dt_proj,
    dt_bias,
    A_log,
    D,
    state,
    after,
    y,
    dt_norm,
    B_norm,
    C_norm,
    z_stride,
    batch,
    E: tl.constexpr,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    SELECTION_EPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OVERLAP: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """One position of the recurrence (equations 2a and 2b), dt_proj before it and the gate after it, of few rows."""
    let_the_next_begin(OVERLAP)
    first = tl.program_id(1).to(tl.int64) * ROWS
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_STATES)
    r = tl.arange(0, BLOCK_RANK)
    inside = c < E
    cell = c[:, None] * STATES + n[None, :]
    within = inside[:, None] & (n < STATES)[None, :]
    place = dt_proj + c[:, None] * RANK + r[None, :]
    own = tl.load(place, mask=inside[:, None] & (r < RANK)[None, :], other=0.0).to(tl.float32)
    A = -tl.exp(tl.load(A_log + cell, mask=within, other=0.0))
    bias = tl.load(dt_bias + c, mask=inside, other=0.0)
    skip = tl.load(D + c, mask=inside, other=0.0)
    after_the_last(OVERLAP)
    # All that is large is asked for before anything is written.
    states = ()
    for index in tl.static_range(ROWS):
        b = first + index
        states = states + (tl.load(state + b * E * STATES + cell, mask=within & (b < batch), other=0.0),)
    for index in tl.static_range(ROWS):
        b = first + index
        here = inside & (b < batch)
        row = dtbc + b * (RANK + 2 * STATES)
        dt = tl.load(row + r, mask=(r < RANK) & (b < batch), other=0.0).to(tl.float32)
        B = tl.load(row + RANK + n, mask=(n < STATES) & (b < batch), other=0.0).to(tl.float32)
        C = tl.load(row + RANK + STATES + n, mask=(n < STATES) & (b < batch), other=0.0).to(tl.float32)
        if SELECTION_EPS > 0:
            dt = triton_norm.unit_normed(dt, SELECTION_EPS, RANK)
            B = triton_norm.unit_normed(B, SELECTION_EPS, STATES)
            C = triton_norm.unit_normed(C, SELECTION_EPS, STATES)
        if WEIGHTED:
            dt *= tl.load(dt_norm + r, mask=r < RANK, other=0.0).to(tl.float32)
            B *= tl.load(B_norm + n, mask=n < STATES, other=0.0).to(tl.float32)
            C *= tl.load(C_norm + n, mask=n < STATES, other=0.0).to(tl.float32)
        u = tl.load(x + b * E + c, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(z + b * z_stride + c, mask=here, other=0.0).to(tl.float32)
        step = softplus(tl.sum(own * dt[None, :], 1) + bias)
        h = tl.exp(step[:, None] * A) * states[index] + (step * u)[:, None] * B[None, :]
        tl.store(after + b * E * STATES + cell, h, mask=within & (b < batch))
        value = tl.sum(h * C[None, :], 1) + skip * u
        tl.store(y + b * E + c, (value * gate * tl.sigmoid(gate)).to(y.dtype.element_ty), mask=here)


@jit
def _recurrences_kernel(
    x,
    z,
    dtbc,
    dt_proj,
    dt_bias,
    A_log,
    D,
    state,
    after,
    y,
    dt_norm,
    B_norm,
    C_norm,
    z_stride,
    batch,
    E: tl.constexpr,
    STATES: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    SELECTION_EPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OVERLAP: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """The same of many rows: (rows, channels) and (rows, channels, states) at a time, dt_proj on the matrix units."""
    let_the_next_begin(OVERLAP)
    b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, BLOCK_STATES)
    r = tl.arange(0, BLOCK_RANK)
    channel, state_of = c < E, n < STATES
    here = (b < batch)[:, None] & channel[None, :]
    cell = c[:, None] * STATES + n[None, :]
    place = dt_proj + c[None, :] * RANK + r[:, None]
    own = tl.load(place, mask=channel[None, :] & (r < RANK)[:, None], other=0.0)
    A = -tl.exp(tl.load(A_log + cell, mask=channel[:, None] & state_of[None, :], other=0.0))
    bias = tl.load(dt_bias + c, mask=channel, other=0.0)
    skip = tl.load(D + c, mask=channel, other=0.0)
    after_the_last(OVERLAP)
    cells = (b * E * STATES)[:, None, None] + cell[None, :, :]
    within = here[:, :, None] & state_of[None, None, :]
    h = tl.load(state + cells, mask=within, other=0.0)
    row = dtbc + (b * (RANK + 2 * STATES))[:, None]
    dt = tl.load(row + r[None, :], mask=(b < batch)[:, None] & (r < RANK)[None, :], other=0.0)
    given = (b < batch)[:, None] & state_of[None, :]
    B = tl.load(row + RANK + n[None, :], mask=given, other=0.0).to(tl.float32)
    C = tl.load(row + RANK + STATES + n[None, :], mask=given, other=0.0).to(tl.float32)
    if SELECTION_EPS > 0:
        dt = triton_norm.unit_normed(dt.to(tl.float32), SELECTION_EPS, RANK).to(dt.dtype)
        B = triton_norm.unit_normed(B, SELECTION_EPS, STATES)
        C = triton_norm.unit_normed(C, SELECTION_EPS, STATES)
    if WEIGHTED:
        dt = (dt.to(tl.float32) * tl.load(dt_norm + r, mask=r < RANK, other=0.0).to(tl.float32)[None, :]).to(dt.dtype)
        B *= tl.load(B_norm + n, mask=n < STATES, other=0.0).to(tl.float32)[None, :]
        C *= tl.load(C_norm + n, mask=n < STATES, other=0.0).to(tl.float32)[None, :]
    u = tl.load(x + (b * E)[:, None] + c[None, :], mask=here, other=0.0).to(tl.float32)
    gate = tl.load(z + (b * z_stride)[:, None] + c[None, :], mask=here, other=0.0).to(tl.float32)
    if WIDENS:
        dt, own = dt.to(tl.float32), own.to(tl.float32)
    # Not in TF32, which would round float32.
    step = softplus(tl.dot(dt, own, input_precision="ieee") + bias[None, :])
    h = tl.exp(step[:, :, None] * A[None, :, :]) * h + (step * u)[:, :, None] * B[:, None, :]
    tl.store(after + cells, h, mask=within)
    value = tl.sum(h * C[:, None, :], 2) + skip[None, :] * u
    tl.store(y + (b * E)[:, None] + c[None, :], (value * gate * tl.sigmoid(gate)).to(y.dtype.element_ty), mask=here)
