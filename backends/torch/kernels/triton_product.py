"""Weights times some dozens of rows in Triton, on the matrix units: as fast as the weights are read.

The bias and a position of the convolution are taken with the product. A program begins to fetch its weights while the
kernel before it ends, which cuBLAS does not do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels.triton import (
    INTERPRETED,
    after_the_last,
    blocks_of,
    fetch,
    jit,
    let_the_next_begin,
    overlapping,
    power_of_2,
    shared_memory,
    tl,
)

# With more rows a product takes longer to compute than its weights to be read, and cuBLAS is faster.
MOST_ROWS = 128
DTYPES = (torch.bfloat16, torch.float16)
# Outputs of a program where there are many, and where there are not. Inputs that it multiplies at a time.
BLOCK, SMALL_BLOCK, FEW_OUTPUTS, STEP = 64, 16, 512, 128
# Programs that fill a GPU: with fewer blocks of outputs, several programs share the inputs of one.
PROGRAMS = 120
# Inputs whose weights are brought to the second cache before the kernel waits.
AHEAD = 512
# Elements of a line of it.
LINE = 64
# As many steps' inputs are on their way at once as shared memory has room for, but no more.
STAGES = 6
# Bytes of it that are left to Triton.
RESERVED = 4096


def reason(rows: int, dtype: torch.dtype) -> str | None:
    """Why it does not multiply so many rows of that dtype on the current device; None if it does."""
    if rows > MOST_ROWS:
        return f"there are {rows} rows, and it takes at most {MOST_ROWS}"
    if not (overlapping()["OVERLAP"] or INTERPRETED):
        return "a kernel cannot begin here while the one before it ends, and cuBLAS is as fast"
    if dtype not in DTYPES:
        return f"x is {str(dtype).removeprefix('torch.')}, and it computes bfloat16 and float16"
    return None


def new_counters(device: torch.device) -> Tensor:
    """By which programs that share a product know who is the last: zero before and after each."""
    return torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, counters: Tensor, convolution=None) -> None:
    """y = weight (n, k) times x (b, k), plus the bias.

    counters: `new_counters`, for one product at a time.
    convolution: see `triton_linear.multiply`.
    """
    (n, length), rows = weight.shape, len(x)
    block, steps = BLOCK if n > FEW_OUTPUTS else SMALL_BLOCK, blocks_of(length, STEP)
    blocks = blocks_of(n, block)
    count = blocks_of(steps, min(steps, blocks_of(PROGRAMS, blocks)))
    shares = blocks_of(steps, count)
    tile = max(16, power_of_2(rows))
    parts = x if shares == 1 else x.new_empty(blocks, shares, tile, block, dtype=torch.float32)
    conv_weight, conv_bias, conv_state, conv_after, beside, first = convolution or (weight, None, x, x, x, 0)
    _product_kernel[(blocks, shares)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        parts,
        counters,
        conv_weight,
        weight if conv_bias is None else conv_bias,
        conv_state,
        conv_after,
        beside,
        rows,
        conv_weight.stride(0),
        N=n,
        LENGTH=length,
        ROWS=tile,
        BLOCK=block,
        STEP=STEP,
        COUNT=count,
        SHARES=shares,
        BIAS=bias is not None,
        CONV=convolution is not None,
        CONV_BIAS=conv_bias is not None,
        TAPS=conv_state.shape[1] + 1,
        FIRST=first,
        CHANNELS=len(conv_weight),
        LINES=AHEAD // LINE,
        LINE=LINE,
        # The interpreter multiplies matrices of bfloat16 as if they were whole numbers.
        WIDENS=INTERPRETED,
        num_warps=4,
        num_stages=max(2, min(STAGES, (shared_memory() - RESERVED) // ((tile + block) * STEP * x.element_size()))),
        **overlapping(),
    )


@jit
def _fetch(weight, n, first, N: tl.constexpr, LENGTH: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr):
    """Asks for so many lines of each output's weights, from an input on, into the second cache."""
    k = tl.minimum(first + tl.arange(0, LINES) * LINE, LENGTH - 1)
    fetch(weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * LENGTH + k[None, :])


@jit
def _product_kernel(
    x,
    weight,
    bias,
    y,
    parts,
    counters,
    conv_weight,
    conv_bias,
    conv_state,
    conv_after,
    beside,
    rows,
    conv_stride,
    N: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    SHARES: tl.constexpr,
    BIAS: tl.constexpr,
    CONV: tl.constexpr,
    CONV_BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    WIDENS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_the_next_begin(OVERLAP)
    first = tl.program_id(1) * COUNT * STEP
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m, k = tl.arange(0, ROWS), tl.arange(0, STEP)
    if OVERLAP:
        _fetch(weight, n, first, N, LENGTH, LINES, LINE)
    after_the_last(OVERLAP)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(COUNT):
        at = first + step * STEP + k
        inside = (at < LENGTH)[None, :]
        given = tl.load(x + m[:, None] * LENGTH + at[None, :], mask=(m < rows)[:, None] & inside, other=0.0)
        place = weight + n.to(tl.int64)[:, None] * LENGTH + at[None, :]
        own = tl.load(place, mask=(n < N)[:, None] & inside, other=0.0)
        if WIDENS:
            given, own = given.to(tl.float32), own.to(tl.float32)
        total = tl.dot(given, own.T, total)
    if SHARES > 1:
        parts += tl.program_id(0) * SHARES * ROWS * BLOCK + m[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(parts + tl.program_id(1) * ROWS * BLOCK, total)
        # The whole part is written before it counts.
        tl.debug_barrier()
        if tl.atomic_add(counters + tl.program_id(0), 1) != SHARES - 1:
            return
        tl.store(counters + tl.program_id(0), 0)
        # In their order, whichever came last: the same inputs give the same bits.
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for share in range(SHARES):
            total += tl.load(parts + share * ROWS * BLOCK, cache_modifier=".cg")
    here = (m < rows)[:, None] & (n < N)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if CONV:
        c = n - FIRST
        passes = (c >= 0) & (c < CHANNELS)
        others = beside + m[:, None] * (N - CHANNELS) + tl.where(c < 0, n, n - CHANNELS)[None, :]
        tl.store(others, total.to(beside.dtype.element_ty), mask=here & ~passes[None, :])
        here = here & passes[None, :]
        cells = (m * (TAPS - 1) * CHANNELS)[:, None] + c[None, :]
        taps, state, after = conv_weight + c * conv_stride, conv_state + cells, conv_after + cells
        total = _convolve(total, taps, state, after, passes, here, CHANNELS, TAPS)
        if CONV_BIAS:
            total += tl.load(conv_bias + c, mask=passes, other=0.0).to(tl.float32)[None, :]
        total = total * tl.sigmoid(total)
        tl.store(y + m[:, None] * CHANNELS + c[None, :], total.to(y.dtype.element_ty), mask=here)
    else:
        tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=here)


@jit
def _convolve(x, taps, state, after, passes, here, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """The convolution's sums of one position, and the state after it, which may be in the memory of that before."""
    # The state holds what the input was rounded to.
    x = x.to(after.dtype.element_ty)
    window = ()
    for tap in tl.static_range(TAPS - 1):
        window = window + (tl.load(state + tap * CHANNELS, mask=here, other=0.0),)
    window = window + (x,)
    # All of it is read before any is written.
    tl.debug_barrier()
    total = tl.zeros(x.shape, tl.float32)
    for tap in tl.static_range(TAPS):
        total += window[tap].to(tl.float32) * tl.load(taps + tap, mask=passes, other=0.0).to(tl.float32)[None, :]
        if tap > 0:
            tl.store(after + (tap - 1) * CHANNELS, window[tap], mask=here)
    return total
