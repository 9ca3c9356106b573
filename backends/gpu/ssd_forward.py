"""The step sizes of Mamba-2's recurrence, and its outputs.

`ssd_kernels` says what the arguments are.
"""

import triton.language as tl
from triton import jit

from mamba_core.backends.gpu import ssd_parts as parts
from mamba_core.backends.gpu.ssd_parts import GRID, LEAST_LOG, LEAST_RATE, LOG2_E, NEVER, ROUNDING, Q

if parts.RANGE is parts.whole_range:
    range = parts.RANGE


@jit
def steps(
    dt,
    A,
    bias,
    mask,
    restart,
    sizes,
    sums,
    rest,
    length,
    dt_batch,
    dt_row,
    HEADS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RESTART: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(b, h, chunks * Q): the step sizes, the sums of logarithms from each chunk's beginning, and their rest."""
    chunks = tl.cdiv(length, Q)
    chunk, batch = parts.places(chunks)
    at = chunk * Q + tl.arange(0, Q)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, there = at < length, head < HEADS
    both = inside[:, None] & there[None, :]
    dt += batch * dt_batch + chunk.to(tl.int64) * Q * dt_row
    raw = tl.load(dt + (tl.arange(0, Q) * dt_row)[:, None] + head[None, :], mask=both, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + head, mask=there, other=0.0)[None, :]
    step, _ = parts.step_of(raw, LEAST, MOST, SOFTPLUS)
    counts = inside
    if HAS_MASK:
        counts = counts & (tl.load(mask + batch * length + at, mask=inside, other=0) != 0)
    step = tl.where(counts[:, None] & there[None, :], step, 0.0)
    rate = tl.maximum(tl.load(A + head, mask=there, other=0.0), LEAST_RATE, tl.PropagateNan.ALL)
    log = tl.maximum(step * rate[None, :], LEAST_LOG, tl.PropagateNan.ALL)
    if HAS_RESTART:
        anew = tl.load(restart + batch * length + at, mask=inside, other=0) != 0
        log = tl.where(anew[:, None], LEAST_LOG, log)
    place = (batch * HEADS + head)[None, :] * (chunks * Q) + at[:, None]
    if EXACT:
        rounded = ((log * GRID + ROUNDING) - ROUNDING) / GRID
        sum_, rest_ = tl.cumsum(rounded, axis=0), tl.cumsum(log - rounded, axis=0)
    else:
        sum_ = tl.cumsum(log * LOG2_E, axis=0)
        rest_ = sum_ - tl.log2(step)
    tl.store(sizes + place, step, mask=there[None, :])
    tl.store(sums + place, sum_, mask=there[None, :])
    tl.store(rest + place, rest_, mask=there[None, :])


@jit
def forward(
    x,
    B,
    C,
    D,
    z,
    mask,
    sizes,
    sums,
    rest,
    begin,
    added,
    logs,
    y,
    last,
    length,
    chunks,
    of_segment,
    x_batch,
    x_row,
    B_batch,
    B_row,
    C_batch,
    C_row,
    z_batch,
    z_row,
    HEADS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PP: tl.constexpr,
    NN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    D_OF: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
    HAS_Z: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (b, l, h, p), and the last state (b, h, p, n).

    D_OF: how many values D has a head: 0, 1 or P.
    """
    segment = tl.program_id(1)
    head, batch = parts.places(HEADS)
    row = batch * HEADS + head
    q, n, p = tl.arange(0, Q), tl.arange(0, NN)[:, None], tl.arange(0, PP)
    cells, outer, exists = n * PP + p[None, :], p[None, :] * N + n, (n < N) & (p < P)[None, :]
    state = tl.zeros((NN, PP), tl.float32)
    if HAS_BEGIN:
        state = tl.load(begin + row * P * N + outer, mask=exists, other=0.0)
    if SEGMENTS > 1:
        state = parts.begun(state, added, logs, row, segment, cells, SEGMENTS, False, NN * PP, EXACT, PRECISION)
    skip = parts.skip(D, head, p, P, D_OF)
    x += batch * x_batch + head * P
    z += batch * z_batch + head * P
    y += batch * length * HEADS * P + head * P
    B += batch * B_batch + head // OF_GROUP * N
    C += batch * C_batch + head // OF_GROUP * N
    sizes += row * chunks * Q
    sums += row * chunks * Q
    rest += row * chunks * Q
    first = segment * of_segment
    for chunk in range(first, tl.minimum(first + of_segment, chunks)):
        at = chunk * Q + q
        inside = parts.counting(mask, batch, at, length, HAS_MASK)
        given = parts.tile(x, chunk, inside, x_row, P, PP, EVEN)
        keys = parts.tile(B, chunk, inside, B_row, N, NN, EVEN)
        queries = parts.tile(C, chunk, inside, C_row, N, NN, EVEN)
        own_sum, own_rest = tl.load(sums + at), tl.load(rest + at)
        end = chunk * Q + Q - 1
        end_sum, end_rest = tl.load(sums + end), tl.load(rest + end)

        weights = parts.sized(own_sum[:, None], own_rest[:, None], own_sum[None, :], own_rest[None, :], EXACT)
        weights = parts.power(tl.where(q[:, None] >= q[None, :], weights, NEVER), EXACT, PRECISION)
        weight = parts.power(parts.sized(end_sum, end_rest, own_sum, own_rest, EXACT), EXACT, PRECISION)[:, None]
        if EXACT:
            size = tl.load(sizes + at)
            weights *= size[None, :]
            weight *= size[:, None]
        weights *= parts.product(queries, tl.trans(keys), tl.zeros((Q, Q), tl.float32), PRECISION)
        start = parts.from_start(own_sum, own_rest, EXACT, PRECISION)[:, None]
        value = parts.product(queries, state.to(keys.dtype), tl.zeros((Q, PP), tl.float32), PRECISION)
        value = tl.where(start == 0.0, 0.0, value * start)
        value = parts.product(weights.to(given.dtype), given, value, PRECISION)
        if D_OF:
            value += skip[None, :] * given.to(tl.float32)
        if HAS_Z:
            gate = parts.tile(z, chunk, inside, z_row, P, PP, EVEN).to(tl.float32)
            value *= gate * parts.sigmoid(gate, EXACT, PRECISION)
        place = y + chunk.to(tl.int64) * Q * HEADS * P + (q * HEADS * P)[:, None] + p[None, :]
        tl.store(place, value.to(y.dtype.element_ty), mask=(at < length)[:, None] & (p < P)[None, :])

        ended = tl.where(weight == 0.0, 0.0, given.to(tl.float32) * weight)
        state = parts.carried(state, end_sum + end_rest if EXACT else end_sum, EXACT, PRECISION)
        state = parts.product(tl.trans(keys), ended.to(keys.dtype), state, PRECISION)
    if segment == SEGMENTS - 1:
        tl.store(last + row * P * N + outer, state, mask=exists)
