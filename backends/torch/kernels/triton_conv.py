"""The causal convolution and its SiLU in Triton: each input from memory once, forward and backward, no copy of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels import triton
from mamba_core.backends.torch.kernels.native_tensors import rows
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents
from mamba_core.backends.torch.kernels.triton import blocks_of, jit, launching, tl
from mamba_core.call import Call


class Walk(NamedTuple):
    """A program is one warp, which walks along the positions of its channels with the last inputs in registers.

    channels, steps: how many of them, and how far. at_once: positions whose inputs are on their way from memory while
    as many are computed.
    """

    channels: int
    steps: int
    at_once: int


FORWARD, BACKWARD = Walk(128, 32, 4), Walk(128, 64, 4)
# A wider filter's inputs would not fit in registers.
WIDEST = 4


def reason(device: torch.device, dtype: torch.dtype | None, width: int | None) -> str | None:
    """Why it cannot run on that device, for x of that dtype and so many taps; None if it can."""
    if width is not None and width > WIDEST:
        return f"the filter has {width} taps, and it holds at most {WIDEST}"
    return triton.reason(device, *([] if dtype is None else [dtype]))


def cuda(x, weight, bias, activation, state, call: Call):
    """(y, final state), for a call without a mask."""
    return _conv(x, weight, bias, state, runs_of(call.restart), activation == "silu")


def runs_of(restart):
    """(b, l) int32: how many restarts lie at or before each position."""
    return None if restart is None else restart.cumsum(1, dtype=torch.int32)


@torch.library.custom_op("mamba_core::triton_conv", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, runs: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    refuse_tangents(x, weight, bias, state)
    return conv(x, weight, bias, state, runs, silu)


@torch.library.custom_op("mamba_core::triton_conv_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    runs: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    dx = x.new_empty(x.shape)
    return [dx, *conv_backward(dy, dfinal_state, x, weight, bias, state, runs, silu, dx)]


def conv(x, weight, bias, state, runs, silu, reverse=False) -> tuple[Tensor, Tensor]:
    """(y, final state): `_forward` outside of the dispatcher. reverse: of x with its positions in reverse order."""
    x = rows(x)
    (b, l, e), k = x.shape, weight.shape[1]
    start, stride = walked(x, reverse)
    y, final_state = x.new_empty(x.shape), x.new_empty(b, k - 1, e)
    with launching(x):
        _conv_kernel[_grid(x, FORWARD.channels, FORWARD.steps)](
            start,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            x if state is None else state.contiguous(),
            x if runs is None else runs,
            y,
            final_state,
            x.stride(0),
            stride,
            l,
            E=e,
            K=k,
            BIAS=bias is not None,
            STATE=state is not None,
            RUNS=runs is not None,
            SILU=silu,
            STEPS=FORWARD.steps,
            AT_ONCE=FORWARD.at_once,
            BLOCK=FORWARD.channels,
            num_warps=1,
        )
    return y, final_state


def walked(x: Tensor, reverse: bool) -> tuple[Tensor, int]:
    """Where the positions of x (b, l, ...) begin in memory, and how far it is from each to the next."""
    return (x[:, -1:], -x.stride(1)) if reverse and x.shape[1] else (x, x.stride(1))


def conv_backward(
    dy, dfinal_state, x, weight, bias, state, runs, silu, dx, beside=None, reverse=False, adds=False
) -> list[Tensor]:
    """Fills dx, its channels side by side, and gives the gradients of weight, and of bias and state where given.

    beside: (b, l, e), copied to where in memory the channels after those of dx are. reverse: dy and beside are of
    positions in reverse order, x and dx lie as they are. adds: to what dx and the channels after it hold.
    """
    x, dy = rows(x), rows(dy)
    (b, l, e), k = x.shape, weight.shape[1]
    (x_start, x_stride), (dx_start, dx_stride) = walked(x, reverse), walked(dx, reverse)
    # The gradients of its last inputs are those of k-1 steps more.
    grid = _grid(x, BACKWARD.channels, BACKWARD.steps - (k - 1))
    # Of the taps and then of the bias.
    parts = torch.empty(b * grid[1], k + 1, e, dtype=torch.float32, device=x.device)
    dstate = None if state is None else state.new_empty(state.shape)
    with launching(x):
        _conv_backward_kernel[grid](
            dy,
            x if dfinal_state is None else dfinal_state.contiguous(),
            x_start,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            x if state is None else state.contiguous(),
            x if runs is None else runs,
            dx_start,
            x if state is None else dstate,
            parts,
            dx if beside is None else rows(beside),
            dy.stride(0),
            dy.stride(1),
            x.stride(0),
            x_stride,
            dx.stride(0),
            dx_stride,
            0 if beside is None else rows(beside).stride(0),
            0 if beside is None else rows(beside).stride(1),
            l,
            E=e,
            K=k,
            BIAS=bias is not None,
            STATE=state is not None,
            DFINAL=dfinal_state is not None,
            BESIDE=beside is not None,
            ADDS=adds,
            RUNS=runs is not None,
            SILU=silu,
            STEPS=BACKWARD.steps,
            AT_ONCE=BACKWARD.at_once,
            BLOCK=BACKWARD.channels,
            num_warps=1,
        )
    # Each in memory of its own, as an operator's results must be.
    parts = parts.sum(0)
    dweight = parts[:k].mT.clone(memory_format=torch.contiguous_format).to(weight.dtype)
    given = [] if bias is None else [parts[k].clone().to(bias.dtype)]
    given += [] if state is None else [dstate]
    return [dweight, *given]


@_forward.register_fake
def _(x, weight, bias, state, runs, silu):
    b, _, e = x.shape
    return x.new_empty(x.shape), x.new_empty(b, weight.shape[1] - 1, e)


@_backward.register_fake
def _(dy, dfinal_state, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_conv = differentiable(_forward, _backward, kept=())


def _grid(x, channels, positions):
    """Channels, positions and rows; of no positions too there is a final state."""
    b, l, e = x.shape
    return blocks_of(e, channels), max(1, blocks_of(l, positions)), b


@jit
def _input(x, state, s, c, stride, l, E: tl.constexpr, K: tl.constexpr, STATE: tl.constexpr):
    """The inputs at position s, before 0 those of the initial state; zero where there is none."""
    value = tl.load(x + s * stride + c, mask=(c < E) & (s >= 0) & (s < l), other=0.0).to(tl.float32)
    if STATE:
        before = (c < E) & (s < 0) & (s >= 1 - K)
        value += tl.load(state + (s + K - 1) * E + c, mask=before, other=0.0).to(tl.float32)
    return value


@jit
def _inputs(x, state, first, c, stride, l, E: tl.constexpr, K: tl.constexpr, STATE: tl.constexpr):
    """Those of the k-1 positions before the first."""
    window = ()
    for j in tl.static_range(K - 1):
        window = window + (_input(x, state, first - (K - 1) + j, c, stride, l, E, K, STATE),)
    return window


@jit
def _ahead(values, first, end, c, stride, E: tl.constexpr, AT_ONCE: tl.constexpr):
    """The values at so many positions from the first on, as they are in memory; zero from the end on."""
    found = ()
    for j in tl.static_range(AT_ONCE):
        found = found + (tl.load(values + (first + j) * stride + c, mask=(c < E) & (first + j < end), other=0.0),)
    return found


@jit
def _taps(weight, c, E: tl.constexpr, K: tl.constexpr):
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + c * K + j, mask=c < E, other=0.0).to(tl.float32),)
    return taps


@jit
def _bias(bias, c, E: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    value = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        value += tl.load(bias + c, mask=c < E, other=0.0).to(tl.float32)
    return value


@jit
def _same(runs, s, t, l):
    """Whether two positions are of the same run; the initial state is of the first."""
    one = tl.load(runs + s, mask=(s >= 0) & (s < l), other=0)
    return one == tl.load(runs + t, mask=(t >= 0) & (t < l), other=0)


@jit
def _put(place, value, counts, ADDS: tl.constexpr):
    """The value, or its sum with what is there."""
    if ADDS:
        value = value.to(tl.float32) + tl.load(place, mask=counts, other=0.0).to(tl.float32)
    tl.store(place, value.to(place.dtype.element_ty), mask=counts)


@jit
def _conv_kernel(
    x,
    weight,
    bias,
    state,
    runs,
    y,
    final_state,
    stride_b,
    stride_l,
    l,
    E: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    RUNS: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x += b * stride_b
    y += b * l * E
    state += b * (K - 1) * E
    final_state += b * (K - 1) * E
    runs += b * l
    begin = tl.program_id(1) * STEPS
    taps, own_bias = _taps(weight, c, E, K), _bias(bias, c, E, BLOCK, BIAS)
    window = _inputs(x, state, begin, c, stride_l, l, E, K, STATE)
    stop = tl.minimum(begin + STEPS, l)
    following = _ahead(x, begin, stop, c, stride_l, E, AT_ONCE)
    for block in range(STEPS // AT_ONCE):
        arriving = following
        following = _ahead(x, begin + (block + 1) * AT_ONCE, stop, c, stride_l, E, AT_ONCE)
        for index in tl.static_range(AT_ONCE):
            s = begin + block * AT_ONCE + index
            window = window + (arriving[index].to(tl.float32),)
            total = own_bias
            for j in tl.static_range(K):
                value = window[j]
                if RUNS:
                    value = tl.where(_same(runs, s - (K - 1 - j), s, l), value, 0.0)
                total += value * taps[j]
            if SILU:
                total = total * tl.sigmoid(total)
            tl.store(y + s * E + c, total.to(y.dtype.element_ty), mask=(c < E) & (s < l))
            window = window[1:]
    if tl.program_id(1) == tl.num_programs(1) - 1:
        for j in tl.static_range(K - 1):
            s = l - (K - 1) + j
            value = _input(x, state, s, c, stride_l, l, E, K, STATE)
            if RUNS:
                value = tl.where(_same(runs, s, l - 1, l), value, 0.0)
            tl.store(final_state + j * E + c, value.to(final_state.dtype.element_ty), mask=c < E)


@jit
def _conv_backward_kernel(
    dy,
    dfinal_state,
    x,
    weight,
    bias,
    state,
    runs,
    dx,
    dstate,
    parts,
    beside,
    dy_stride_b,
    dy_stride_l,
    x_stride_b,
    x_stride_l,
    dx_stride_b,
    dx_stride_l,
    beside_stride_b,
    beside_stride_l,
    l,
    E: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    DFINAL: tl.constexpr,
    BESIDE: tl.constexpr,
    ADDS: tl.constexpr,
    RUNS: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x += b * x_stride_b
    dy += b * dy_stride_b
    dx += b * dx_stride_b
    beside += b * beside_stride_b
    state += b * (K - 1) * E
    dfinal_state += b * (K - 1) * E
    dstate += b * (K - 1) * E
    runs += b * l
    begin = tl.program_id(1) * (STEPS - (K - 1))
    end = begin + STEPS - (K - 1)
    taps, own_bias = _taps(weight, c, E, K), _bias(bias, c, E, BLOCK, BIAS)
    window = _inputs(x, state, begin, c, x_stride_l, l, E, K, STATE)
    # The gradients before the activation at the last positions; of the taps, and then of the bias.
    gradients, dtaps = (), ()
    for _ in tl.static_range(K - 1):
        gradients = gradients + (tl.zeros((BLOCK,), tl.float32),)
    for _ in tl.static_range(K + 1):
        dtaps = dtaps + (tl.zeros((BLOCK,), tl.float32),)
    stop = tl.minimum(begin + STEPS, l)
    following = _ahead(x, begin, stop, c, x_stride_l, E, AT_ONCE)
    dfollowing = _ahead(dy, begin, stop, c, dy_stride_l, E, AT_ONCE)
    for block in range(STEPS // AT_ONCE):
        arriving, darriving = following, dfollowing
        following = _ahead(x, begin + (block + 1) * AT_ONCE, stop, c, x_stride_l, E, AT_ONCE)
        dfollowing = _ahead(dy, begin + (block + 1) * AT_ONCE, stop, c, dy_stride_l, E, AT_ONCE)
        if BESIDE:
            copied = _ahead(beside, begin + block * AT_ONCE, stop, c, beside_stride_l, E, AT_ONCE)
            for index in tl.static_range(AT_ONCE):
                s = begin + block * AT_ONCE + index
                _put(dx + s * dx_stride_l + E + c, copied[index], (c < E) & (s < tl.minimum(end, l)), ADDS)
        for index in tl.static_range(AT_ONCE):
            s = begin + block * AT_ONCE + index
            window = window + (arriving[index].to(tl.float32),)
            tapped, total = (), own_bias
            for j in tl.static_range(K):
                value = window[j]
                if RUNS:
                    value = tl.where(_same(runs, s - (K - 1 - j), s, l), value, 0.0)
                total += value * taps[j]
                tapped = tapped + (value,)
            g = darriving[index].to(tl.float32)
            if SILU:
                gate = tl.sigmoid(total)
                g *= gate * (1.0 + total * (1.0 - gate))
            # The steps from the end on are another program's too.
            own = tl.where(s < end, g, 0.0)
            added = ()
            for j in tl.static_range(K):
                added = added + (dtaps[j] + own * tapped[j],)
            dtaps = added + (dtaps[K] + own,)
            # All outputs whose windows hold the position t are known now.
            t = s - (K - 1)
            gradients = gradients + (g,)
            total = tl.zeros((BLOCK,), tl.float32)
            for j in tl.static_range(K):
                value = gradients[j]
                if RUNS:
                    value = tl.where(_same(runs, t + j, t, l), value, 0.0)
                total += value * taps[K - 1 - j]
            if DFINAL:
                first = l - (K - 1)
                kept = (c < E) & (t >= first) & (t < l)
                value = tl.load(dfinal_state + (t - first) * E + c, mask=kept, other=0.0).to(tl.float32)
                if RUNS:
                    value = tl.where(_same(runs, t, l - 1, l), value, 0.0)
                total += value
            counts = (c < E) & (t >= begin) & (t < l)
            _put(dx + t * dx_stride_l + c, total, counts, ADDS)
            if STATE:
                if t < 0:
                    tl.store(dstate + (t + K - 1) * E + c, total.to(dstate.dtype.element_ty), mask=c < E)
            window, gradients = window[1:], gradients[1:]
    parts += (b * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * E + c
    for j in tl.static_range(K + 1):
        tl.store(parts + j * E, dtaps[j], mask=c < E)
