"""Weights times few rows of inputs in Triton, as fast as the weights are read: dense ones, or of 8 or 4 bits.

The norm before a product, the bias and the residual after it and a position of the convolution are taken with it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

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

# With more rows cuBLAS is faster.
MOST_ROWS = 4
# A thread reads so many bytes of each of its weights' rows at once.
VECTOR = 16
# Lines on their way from memory at once, at most: more take registers, and leave room for fewer warps. A line of packed
# weights has more numbers.
LINES, PACKED_LINES = 6, 3
# With fewer outputs than warps that fill a GPU, several warps share one.
FEW_OUTPUTS = 512


class Packed(NamedTuple):
    """A weight (n, k) in words of 32 bits: see `quantized`.

    words: (n, k * bits / 32) int32. scales: (n, k / group).
    """

    words: Tensor
    scales: Tensor
    bits: int
    group: int


def linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """weight (n, k) times x (b, k), plus the bias, in the dtype of x, for at most MOST_ROWS rows."""
    stored = weight.words if isinstance(weight, Packed) else weight
    y = x.new_empty(len(x), len(stored))
    with launching(x):
        multiply(x.contiguous(), weight, bias, y)
    return y


def multiply(x, weight, bias, y, *, norm=None, eps=0.0, residual=None, convolution=None, swiglu=False):
    """y = weight (n, k), dense or packed, times x (b, k), or times the norm of x; plus the residual.

    swiglu: y (b, n / 2) is silu of the first half of the outputs times the second half.
    convolution: (weight (c, taps), bias, state (b, taps - 1, c), state after it, beside, first). The c outputs from
    `first` on go through it to y (b, c), the others, in their order, to `beside` (b, n - c).
    """
    packed = weight if isinstance(weight, Packed) else Packed(weight, weight, 0, 1)
    stored = packed.words
    (n, length), rows = stored.shape, len(x)
    warps = 4 if n < FEW_OUTPUTS else 1
    vector = VECTOR // stored.element_size()
    threads = min(32 * warps, power_of_2(blocks_of(length, vector)))
    count = blocks_of(length, threads * vector)
    outputs = max(2 if swiglu else 1, _outputs_of_program(n, rows))
    most = (PACKED_LINES if packed.bits else LINES) // outputs
    at_once = max(each for each in range(1, max(1, most) + 1) if count % each == 0)
    conv_weight, conv_bias, conv_state, conv_after, beside, first = convolution or (stored, None, x, x, x, 0)
    _linear_kernel[(blocks_of(n, outputs),)](
        x,
        stored if norm is None else norm,
        stored,
        packed.scales,
        stored if bias is None else bias,
        x if residual is None else residual,
        y,
        conv_weight,
        stored if conv_bias is None else conv_bias,
        conv_state,
        conv_after,
        beside,
        eps,
        conv_weight.stride(0),
        N=n,
        LENGTH=length,
        ROWS=rows,
        BITS=packed.bits,
        STRIPS=32 // packed.bits if packed.bits else 1,
        GROUP=packed.group,
        NORM=norm is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        CONV=convolution is not None,
        CONV_BIAS=conv_bias is not None,
        TAPS=conv_state.shape[1] + 1,
        FIRST=first,
        CHANNELS=len(conv_weight),
        HALF=n // 2 if swiglu else 0,
        OUTPUTS=outputs,
        THREADS=threads,
        VECTOR=vector,
        COUNT=count,
        AT_ONCE=at_once,
        num_warps=warps,
        **overlapping(),
    )


def _outputs_of_program(n, rows):
    """As many as leave some warps to each multiprocessor, and fit in registers beside their sums for each row."""
    most = max(1, 4 // rows)
    while most > 1 and n // most < 2000:
        most //= 2
    return most


@jit
def _unpacked(words, STRIP: tl.constexpr, BITS: tl.constexpr):
    """Whole numbers around zero: as the last bits of 2^23 + number, for conversions are slow."""
    number = ((words >> (STRIP * BITS)) & ((1 << BITS) - 1)) | 0x4B000000
    return number.to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))


@jit
def _row_of(first, output: tl.constexpr, HALF: tl.constexpr):
    """The weight's row of a program's output. With HALF, a row of the first half is followed by that of the second."""
    return first // 2 + output // 2 + output % 2 * HALF if HALF else first + output


@jit
def _lines(
    weight,
    start,
    first,
    lane,
    N: tl.constexpr,
    LENGTH: tl.constexpr,
    HALF: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """So many lines of the weights of each output, from a place in their rows on."""
    found = ()
    for line in tl.static_range(AT_ONCE):
        place = start + line * SIZE + lane
        for output in tl.static_range(OUTPUTS):
            own = weight + _row_of(first, output, HALF).to(tl.int64) * LENGTH + place
            found = found + (tl.load(own, mask=(place < LENGTH) & (first + output < N), other=0),)
    return found


@jit
def _linear_kernel(
    x,
    norm,
    weight,
    scales,
    bias,
    residual,
    y,
    conv_weight,
    conv_bias,
    conv_state,
    conv_after,
    beside,
    eps,
    conv_stride,
    N: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    STRIPS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CONV: tl.constexpr,
    CONV_BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    OUTPUTS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    COUNT: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_the_next_begin(OVERLAP)
    WIDTH: tl.constexpr = LENGTH * STRIPS
    first = tl.program_id(0) * OUTPUTS
    SIZE: tl.constexpr = THREADS * VECTOR
    thread = tl.arange(0, THREADS)[:, None]
    lane = thread * VECTOR + tl.arange(0, VECTOR)[None, :]
    # The norm's factor is the same for the whole row, so that it multiplies the finished sums.
    sums, squares = (), ()
    for _ in tl.static_range(ROWS * OUTPUTS):
        sums = sums + (tl.zeros((THREADS, VECTOR if BITS == 0 else 1), tl.float32),)
    for _ in tl.static_range(ROWS):
        squares = squares + (tl.zeros((THREADS, VECTOR), tl.float32),)
    weights = _lines(weight, 0, first, lane, N, LENGTH, HALF, OUTPUTS, SIZE, AT_ONCE)
    after_the_last(OVERLAP)
    for block in range(COUNT // AT_ONCE):
        following = _lines(weight, (block + 1) * AT_ONCE * SIZE, first, lane, N, LENGTH, HALF, OUTPUTS, SIZE, AT_ONCE)
        for line in tl.static_range(AT_ONCE):
            start = (block * AT_ONCE + line) * SIZE
            inside = start + lane < LENGTH
            for strip in tl.static_range(STRIPS):
                k = strip * LENGTH + start + lane
                if NORM:
                    scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
                values, squared = (), ()
                for row in tl.static_range(ROWS):
                    value = tl.load(x + row * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
                    if NORM:
                        squared = squared + (squares[row] + value * value,)
                        value = value * scale
                    values = values + (value,)
                if NORM:
                    squares = squared
                added = ()
                for output in tl.static_range(OUTPUTS):
                    own = weights[line * OUTPUTS + output]
                    if BITS == 0:
                        for row in tl.static_range(ROWS):
                            added = added + (sums[output * ROWS + row] + own.to(tl.float32) * values[row],)
                    else:
                        # What a thread reads at once is of one group, and scaled when it is added up.
                        group = (strip * LENGTH + start + thread * VECTOR) // GROUP
                        place = scales + _row_of(first, output, HALF).to(tl.int64) * (WIDTH // GROUP) + group
                        counts = (start + thread * VECTOR < LENGTH) & (first + output < N)
                        factor = tl.load(place, mask=counts, other=0.0).to(tl.float32)
                        numbers = _unpacked(own, strip, BITS)
                        for row in tl.static_range(ROWS):
                            part = tl.sum(numbers * values[row], 1, keep_dims=True)
                            added = added + (sums[output * ROWS + row] + factor * part,)
                sums = added
        weights = following
    for row in tl.static_range(ROWS):
        scaling = 1.0
        if NORM:
            scaling = tl.rsqrt(tl.sum(tl.sum(squares[row], 1), 0) / WIDTH + eps)
        if HALF:
            for pair in tl.static_range(OUTPUTS // 2):
                n = first // 2 + pair
                gate = tl.sum(tl.sum(sums[2 * pair * ROWS + row], 1), 0) * scaling
                value = tl.sum(tl.sum(sums[(2 * pair + 1) * ROWS + row], 1), 0) * scaling
                if BIAS:
                    gate += tl.load(bias + n, mask=n < HALF, other=0.0).to(tl.float32)
                    value += tl.load(bias + HALF + n, mask=n < HALF, other=0.0).to(tl.float32)
                value *= gate * tl.sigmoid(gate)
                tl.store(y + row * HALF + n, value.to(y.dtype.element_ty), mask=n < HALF)
        for output in tl.static_range(0 if HALF else OUTPUTS):
            n = first + output
            value = tl.sum(tl.sum(sums[output * ROWS + row], 1), 0) * scaling
            if BIAS:
                value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            if CONV:
                c = n - FIRST
                if (c >= 0) & (c < CHANNELS):
                    # The state holds what the input was rounded to.
                    value = value.to(conv_after.dtype.element_ty).to(tl.float32)
                    state = conv_state + row * (TAPS - 1) * CHANNELS + c
                    after = conv_after + row * (TAPS - 1) * CHANNELS + c
                    taps = conv_weight + c * conv_stride
                    filtered = value * tl.load(taps + TAPS - 1).to(tl.float32)
                    if CONV_BIAS:
                        filtered += tl.load(conv_bias + c).to(tl.float32)
                    for tap in tl.static_range(TAPS - 1):
                        before = tl.load(state + tap * CHANNELS).to(tl.float32)
                        filtered += before * tl.load(taps + tap).to(tl.float32)
                        if tap > 0:
                            tl.store(after + (tap - 1) * CHANNELS, before.to(conv_after.dtype.element_ty))
                    if TAPS > 1:
                        tl.store(after + (TAPS - 2) * CHANNELS, value.to(conv_after.dtype.element_ty))
                    filtered = filtered * tl.sigmoid(filtered)
                    tl.store(y + row * CHANNELS + c, filtered.to(y.dtype.element_ty))
                elif n < N:
                    place = tl.where(c < 0, n, n - CHANNELS)
                    tl.store(beside + row * (N - CHANNELS) + place, value.to(beside.dtype.element_ty))
            else:
                if RESIDUAL:
                    value += tl.load(residual + row * N + n, mask=n < N, other=0.0).to(tl.float32)
                tl.store(y + row * N + n, value.to(y.dtype.element_ty), mask=n < N)
