"""The gradients of Mamba-2's recurrence, from the states around each chunk.

`ssd_kernels` says what the arguments are.
"""

import triton.language as tl
from triton import jit

from mamba_core.backends.gpu import ssd_parts as parts
from mamba_core.backends.gpu.ssd_parts import LEAST_RATE, NEVER, ROWS, ZERO_LOG, Q

if parts.RANGE is parts.whole_range:
    range = parts.RANGE


@jit
def gates(
    linear,
    z,
    dy,
    mask,
    dz,
    dlinear,
    length,
    z_batch,
    z_row,
    dy_batch,
    dy_row,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the gate z and of what it multiplies, all (b, l, h, p)."""
    head = tl.program_id(1)
    chunk, batch = parts.places(tl.cdiv(length, Q))
    q, p = tl.arange(0, Q), tl.arange(0, PP)
    inside = parts.counting(mask, batch, chunk * Q + q, length, HAS_MASK)
    first = batch * length * HEADS * P + head * P
    arriving = parts.tile(dy + batch * dy_batch + head * P, chunk, inside, dy_row, P, PP, EVEN).to(tl.float32)
    gate = parts.tile(z + batch * z_batch + head * P, chunk, inside, z_row, P, PP, EVEN).to(tl.float32)
    value = parts.tile(linear + first, chunk, inside, HEADS * P, P, PP, EVEN).to(tl.float32)
    sigmoid = parts.sigmoid(gate, EXACT, PRECISION)
    place = first + chunk.to(tl.int64) * Q * HEADS * P + (q * HEADS * P)[:, None] + p[None, :]
    here = (chunk * Q + q < length)[:, None] & (p < P)[None, :]
    value = arriving * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dz + place, value.to(dz.dtype.element_ty), mask=here)
    tl.store(dlinear + place, (arriving * gate * sigmoid).to(dlinear.dtype.element_ty), mask=here)


@jit
def of_queries(
    C,
    mask,
    sums,
    rest,
    before,
    after,
    dy,
    dC,
    started,
    passed,
    length,
    chunks,
    C_batch,
    C_row,
    dy_batch,
    dy_row,
    HEADS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PP: tl.constexpr,
    NN: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient that C has through the state before a chunk, for TOGETHER heads of a group.

    dC: (parts, b, l, g, n) in float32, each program's share of the heads.
    started: (b, h, chunks * Q), the gradient of the decay from the chunk's beginning to each position; passed: (b, h,
        chunks), that of the decay through the chunk.
    """
    part = tl.program_id(1)
    chunk, batch = parts.places(chunks)
    group = part // (OF_GROUP // TOGETHER)
    at = chunk * Q + tl.arange(0, Q)
    inside = parts.counting(mask, batch, at, length, HAS_MASK)
    queries = parts.tile(C + batch * C_batch + group * N, chunk, inside, C_row, N, NN, EVEN)
    total, p = tl.zeros((Q, NN), tl.float32), tl.arange(0, PP)
    dy += batch * dy_batch
    for index in range(TOGETHER):
        head = part * TOGETHER + index
        place = (batch * HEADS + head) * chunks * Q + at
        cells = _state(batch, chunk, head, chunks, HEADS, PP, NN)
        state, dstate = tl.load(before + cells), tl.load(after + cells)
        arriving = parts.tile(dy + head * P, chunk, inside, dy_row, P, PP, EVEN)
        start = parts.from_start(tl.load(sums + place), tl.load(rest + place), EXACT, PRECISION)[:, None]
        value = parts.product(arriving, tl.trans(state), tl.zeros((Q, NN), tl.float32), PRECISION)
        value = tl.where(start == 0.0, 0.0, value * start)
        tl.store(started + place, tl.sum(value * queries.to(tl.float32), 1))
        total += value
        end = (batch * HEADS + head) * chunks * Q + chunk * Q + Q - 1
        through = tl.load(sums + end) + tl.load(rest + end) if EXACT else tl.load(sums + end)
        through = parts.power(through, EXACT, PRECISION)
        # As a trace, because what the matrix units do not read would pass through registers.
        square = parts.product(tl.trans(state), dstate, tl.zeros((PP, PP), tl.float32), PRECISION)
        passing = tl.sum(tl.sum(tl.where(p[:, None] == p[None, :], square, 0.0), 1), 0)
        passing = tl.where(through == 0.0, 0.0, passing * through)
        tl.store(passed + (batch * HEADS + head) * chunks + chunk, passing)
    cells, exists = _shares(part, batch, chunk, chunks, length, HEADS, OF_GROUP, TOGETHER, N, NN)
    tl.store(dC + cells, total, mask=exists)


@jit
def of_keys(
    x,
    B,
    C,
    D,
    mask,
    sizes,
    sums,
    rest,
    after,
    dy,
    dC_started,
    dx,
    dB,
    dC,
    inner,
    leaving,
    spanning,
    skipped,
    length,
    chunks,
    x_batch,
    x_row,
    B_batch,
    B_row,
    C_batch,
    C_row,
    dy_batch,
    dy_row,
    HEADS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PP: tl.constexpr,
    NN: tl.constexpr,
    D_OF: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of x, B and C of a chunk, for TOGETHER heads of a group, and what `of_steps` needs.

    after: the gradient of the state after the chunk, (b, chunks, h, NN, PP).
    dC_started: of `of_queries`.
    dB, dC: (parts, b, l, g, n), each program's share of the heads.
    inner, leaving: (b, h, chunks * Q), the gradient of each step size as x's factor: inside the chunk, and by the state
        after.
    spanning: (b, h, chunks * Q). EXACT: the gradient of each logarithm by what spans it inside the chunk. Otherwise
        that of what arrives at each position, from which the gradient is a difference of sums: faster, but it loses
        what long steps make small.
    skipped: (b, chunks, h, D_OF), the gradient of D.
    """
    part = tl.program_id(1)
    chunk, batch = parts.places(chunks)
    group = part // (OF_GROUP // TOGETHER)
    q, p = tl.arange(0, Q), tl.arange(0, PP)
    at = chunk * Q + q
    inside = parts.counting(mask, batch, at, length, HAS_MASK)
    keys = parts.tile(B + batch * B_batch + group * N, chunk, inside, B_row, N, NN, EVEN)
    queries = parts.tile(C + batch * C_batch + group * N, chunk, inside, C_row, N, NN, EVEN)
    # Rows are j, columns i.
    later = q[None, :] >= q[:, None]
    scores = parts.product(keys, tl.trans(queries), tl.zeros((Q, Q), tl.float32), PRECISION)
    dscores = tl.zeros((Q, Q), tl.float32)
    dkeys = tl.zeros((Q, NN), tl.float32)
    x += batch * x_batch
    dy += batch * dy_batch
    dx += (batch * length + chunk.to(tl.int64) * Q) * HEADS * P
    here = (at < length)[:, None] & (p < P)[None, :]
    places = (q * HEADS * P)[:, None] + p[None, :]
    for index in range(TOGETHER):
        head = part * TOGETHER + index
        place = (batch * HEADS + head) * chunks * Q + at
        size = tl.load(sizes + place)
        own_sum, own_rest = tl.load(sums + place), tl.load(rest + place)
        end = (batch * HEADS + head) * chunks * Q + chunk * Q + Q - 1
        end_sum, end_rest = tl.load(sums + end), tl.load(rest + end)
        dstate = tl.load(after + _state(batch, chunk, head, chunks, HEADS, PP, NN))
        given = parts.tile(x + head * P, chunk, inside, x_row, P, PP, EVEN)
        arriving = parts.tile(dy + head * P, chunk, inside, dy_row, P, PP, EVEN)
        to_end = parts.power(parts.between(end_sum, end_rest, own_sum, own_rest, EXACT), EXACT, PRECISION)[:, None]
        between = parts.between(own_sum[None, :], own_rest[None, :], own_sum[:, None], own_rest[:, None], EXACT)
        decay = parts.power(tl.where(later, between, NEVER), EXACT, PRECISION)
        weights = (scores * decay * size[:, None]).to(given.dtype)

        # What passes between positions of the chunk.
        of_pairs = parts.product(given, tl.trans(arriving), tl.zeros((Q, Q), tl.float32), PRECISION)
        wide, arriving_wide = given.to(tl.float32), arriving.to(tl.float32)
        if D_OF > 1:
            of_D = tl.sum(arriving_wide * wide, 0)
            tl.store(skipped + ((batch * chunks + chunk) * HEADS + head) * D_OF + p, of_D, mask=p < P)
        elif D_OF == 1:
            of_D = tl.sum(tl.sum(arriving_wide * wide, 1), 0)
            tl.store(skipped + (batch * chunks + chunk) * HEADS + head, of_D)
        of_pairs *= decay
        dscores += of_pairs * size[:, None]
        of_pairs *= scores
        tl.store(inner + place, tl.sum(of_pairs, 1))
        of_pairs *= size[:, None]
        if EXACT:
            # What passes no decay is no part of its gradient. Of (k, i): the sum over j < k, for k <= i.
            of_pairs = tl.where(q[None, :] > q[:, None], of_pairs, 0.0)
            tl.store(spanning + place, tl.sum(tl.where(later, tl.cumsum(of_pairs, 0) - of_pairs, 0.0), 1))
        else:
            tl.store(spanning + place, tl.sum(of_pairs, 0))

        # What goes to the state after. Triton would make one product of a sum of two and lay it out worse, but not of
        # an fma.
        dgiven = parts.product(weights, arriving, tl.zeros((Q, PP), tl.float32), PRECISION)
        value = parts.product(keys, dstate, tl.zeros((Q, PP), tl.float32), PRECISION)
        value = tl.where(to_end == 0.0, 0.0, value * to_end)
        tl.store(leaving + place, tl.sum(value * wide, 1))
        ended = tl.where(to_end == 0.0, 0.0, wide * (to_end * size[:, None])).to(given.dtype)
        dkeys = parts.product(ended, tl.trans(dstate), dkeys, PRECISION)
        value = tl.fma(value, tl.broadcast_to(size[:, None], (Q, PP)), dgiven)
        if D_OF:
            value += parts.skip(D, head, p, P, D_OF)[None, :] * arriving_wide
        tl.store(dx + head * P + places, value.to(dx.dtype.element_ty), mask=here)
    cells, exists = _shares(part, batch, chunk, chunks, length, HEADS, OF_GROUP, TOGETHER, N, NN)
    dscores = dscores.to(keys.dtype)
    dkeys = parts.product(dscores, queries, dkeys, PRECISION)
    tl.store(dB + cells, dkeys.to(dB.dtype.element_ty), mask=exists)
    dqueries = tl.load(dC_started + cells, mask=exists, other=0.0)
    dqueries = parts.product(tl.trans(dscores), keys, dqueries, PRECISION)
    tl.store(dC + cells, dqueries.to(dC.dtype.element_ty), mask=exists)


@jit
def of_steps(
    dt,
    A,
    bias,
    mask,
    sizes,
    started,
    passed,
    inner,
    leaving,
    spanning,
    ddt,
    shares,
    length,
    dt_batch,
    dt_row,
    HEADS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of dt, and what each chunk adds to those of A and the bias: shares (b, chunks, 2, h)."""
    chunks = tl.cdiv(length, Q)
    chunk, batch = parts.places(chunks)
    q = tl.arange(0, Q)
    at = chunk * Q + q
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (head < HEADS)[None, :]
    inside = parts.counting(mask, batch, at, length, HAS_MASK)
    place = (batch * HEADS + head)[None, :] * (chunks * Q) + at[:, None]
    size = tl.load(sizes + place, mask=there, other=0.0)
    leaves = tl.load(leaving + place, mask=there, other=0.0)
    direct = tl.load(inner + place, mask=there, other=0.0)
    start = tl.load(started + place, mask=there, other=0.0)
    spans = tl.load(spanning + place, mask=there, other=0.0)
    # The gradient of a logarithm is the sum of what spans its position.
    if EXACT:
        dlog = spans + tl.cumsum(start, 0, reverse=True)
    else:
        dlog = tl.cumsum(start + spans - direct * size, 0, reverse=True)
    ended = leaves * size
    dlog += tl.cumsum(ended, 0) - ended
    dlog += tl.load(passed + (batch * HEADS + head) * chunks + chunk, mask=head < HEADS, other=0.0)[None, :]
    rate = tl.load(A + head, mask=head < HEADS, other=0.0)
    rate = tl.maximum(rate, LEAST_RATE, tl.PropagateNan.ALL)[None, :]
    dlog = tl.where(size * rate <= ZERO_LOG, 0.0, dlog)
    own = dt + batch * dt_batch + chunk.to(tl.int64) * Q * dt_row + (q * dt_row)[:, None] + head[None, :]
    raw = tl.load(own, mask=(at < length)[:, None] & there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + head, mask=head < HEADS, other=0.0)[None, :]
    _, within = parts.step_of(raw, LEAST, MOST, SOFTPLUS)
    dsize = direct + leaves + dlog * rate
    if SOFTPLUS:
        dsize *= tl.sigmoid(raw)
    dsize = tl.where(inside[:, None] & within & there, dsize, 0.0)
    to = ddt + (batch * length + chunk.to(tl.int64) * Q) * HEADS + (q * HEADS)[:, None] + head[None, :]
    tl.store(to, dsize.to(ddt.dtype.element_ty), mask=(at < length)[:, None] & there)
    share = shares + (batch * chunks + chunk) * 2 * HEADS + head
    tl.store(share, tl.sum(dlog * size, 0), mask=head < HEADS)
    tl.store(share + HEADS, tl.sum(dsize, 0), mask=head < HEADS)


@jit
def totals(shares, skipped, dA, dbias, dD, rows, HEADS: tl.constexpr, D_OF: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of A (h), the bias (h) and D (h, D_OF): of shares (rows, 2, h) and skipped (rows, h, D_OF)."""
    kind, place = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values, result, width, count = shares + kind * HEADS, dA, 2 * HEADS, HEADS
    if kind == 1:
        result = dbias
    if kind == 2:
        values, result, width, count = skipped, dD, HEADS * D_OF, HEADS * D_OF
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, rows, ROWS):
        there = ((first + row) < rows)[:, None] & (place < count)[None, :]
        total += tl.load(values + ((first + row).to(tl.int64) * width)[:, None] + place[None, :], mask=there, other=0.0)
    tl.store(result + place, tl.sum(total, 0), mask=place < count)


@jit
def _state(batch, chunk, head, chunks, HEADS: tl.constexpr, PP: tl.constexpr, NN: tl.constexpr):
    """The places of a state at a chunk, in (b, chunks, h, NN, PP)."""
    cells = tl.arange(0, NN)[:, None] * PP + tl.arange(0, PP)[None, :]
    return ((batch * chunks + chunk) * HEADS + head) * NN * PP + cells


@jit
def _shares(
    part,
    batch,
    chunk,
    chunks,
    length,
    HEADS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
    N: tl.constexpr,
    NN: tl.constexpr,
):
    """(places, which exist) of a chunk in (parts, b, l, g, n)."""
    PARTS: tl.constexpr = OF_GROUP // TOGETHER
    GROUPS: tl.constexpr = HEADS // OF_GROUP
    q, n = tl.arange(0, Q), tl.arange(0, NN)
    first = ((part % PARTS) * (tl.num_programs(0) // chunks) + batch) * length + chunk * Q
    cells = (first * GROUPS + part // PARTS) * N + (q * GROUPS * N)[:, None] + n[None, :]
    return cells, (chunk * Q + q < length)[:, None] & (n < N)[None, :]
