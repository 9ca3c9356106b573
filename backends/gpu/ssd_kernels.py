"""The recurrence of Mamba-2 in Triton, for the matrix units of an NVIDIA GPU, and its gradient.

A sequence is cut into chunks of `Q` positions, and the chunks into segments. `steps` computes the step sizes and the
sums of the logarithms of the decays in each chunk. `adds` and `states` carry a state through a segment: forward, what
x and B add to it; backward, its gradient, to which dy and C add. `forward` carries the state through a segment and
computes y. `gates` computes the gradient of the gate. `of_queries` and `of_keys` compute the gradients of x, B, C and D
in a chunk for some heads of a group, from the states around it, and `of_steps` those of the step sizes from what they
leave. `totals` sums over chunks.

A chunk computes as `kernels/chunked_ssd.py` of each framework does: y_i is the sum over j <= i of
(C_i B_j) exp(a_{j+1} + ... + a_i) step_j x_j, and of exp(a_1 + ... + a_i) h C_i, with a = step A. A position that
begins anew has the least a, of which exp is zero.

EXACT, for float32: the sums of a stand in two parts, of which the first is exact on a grid, so that differences are
exact too. Otherwise the first part is the whole sum, and the second the same less the logarithm of the step size, both
to the base 2.

EVEN: the length is a number of whole chunks, and there is no mask.

Names of axes: i and j positions of a chunk, p and n. States are (n, p) here. P and N are padded to powers of 2.
Of a sequence, `_batch` and `_row` are the strides of its first two axes; the others are dense.
"""

import builtins
import os

import triton.language as tl
from triton import jit

# Positions of a chunk.
Q = tl.constexpr(64)
# Rows that are summed side by side.
ROWS = tl.constexpr(32)
# exp of less is zero; and the grid, on which the sums of a chunk are exact in float32.
LEAST_LOG, GRID = tl.constexpr(-128.0), tl.constexpr(1024.0)
# As an exponent of 2 or of e: of that, zero is left.
NEVER = tl.constexpr(-256.0)
LOG2_E = tl.constexpr(1.4426950408889634)
# exp of this is zero, and so is the gradient of whoever passes through it.
ZERO_LOG = tl.constexpr(-104.0)
# Of A: exp(0 * -inf) is no number.
LEAST_RATE = tl.constexpr(-3.4028234663852886e38)
# Added and taken away again, it rounds to a whole number.
ROUNDING = tl.constexpr(1.5 * 2**23)

if os.environ.get("TRITON_INTERPRET") == "1":

    def range(*bounds):
        """The interpreter's numbers are arrays of one element, of which NumPy makes no index."""
        for index in builtins.range(*map(_whole, bounds)):
            yield tl.program_id(0) * 0 + index

    def _whole(bound) -> int:
        return int(bound.handle.data.item()) if isinstance(bound, tl.tensor) else int(bound)


@jit
def _product(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # the interpreter multiplies matrices of bfloat16 as if they were whole numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def _power(value, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """What is left of a decay of that logarithm: to the base e if EXACT, else to the base 2, in one instruction."""
    if EXACT:
        return tl.exp(value)
    if PRECISION == "widened":
        return tl.exp2(value)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1)


@jit
def _sigmoid(value, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    if EXACT or PRECISION == "widened":
        return tl.sigmoid(value)
    below = 1.0 + _power(value * -LOG2_E, False, PRECISION)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, is_pure=True, pack=1)


@jit
def _softplus(value):
    """log(1 + e^value), with log(1 + e) as twice the area tangent of e / (2 + e), at most 1/3."""
    small = tl.exp(-tl.abs(value))
    ratio = small / (2.0 + small)
    square = ratio * ratio
    series = 1.0 / 15
    for odd in tl.static_range(13, 0, -2):
        series = series * square + 1.0 / odd
    return tl.maximum(value, 0.0) + 2.0 * ratio * series


@jit
def _step_of(raw, LEAST: tl.constexpr, MOST: tl.constexpr, SOFTPLUS: tl.constexpr):
    """(the step size, whether it is within the limits)."""
    step = _softplus(raw) if SOFTPLUS else raw
    return tl.clamp(step, LEAST, MOST, tl.PropagateNan.ALL), ~((step < LEAST) | (step > MOST))


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
    chunk, batch = _places(chunks)
    at = chunk * Q + tl.arange(0, Q)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, there = at < length, head < HEADS
    both = inside[:, None] & there[None, :]
    dt += batch * dt_batch + chunk.to(tl.int64) * Q * dt_row
    raw = tl.load(dt + (tl.arange(0, Q) * dt_row)[:, None] + head[None, :], mask=both, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias + head, mask=there, other=0.0)[None, :]
    step, _ = _step_of(raw, LEAST, MOST, SOFTPLUS)
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
def _tile(base, chunk, inside, row, WIDTH: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr):
    """(Q, width) of a sequence, zero where nothing counts; float16 as float32, because products may leave its range."""
    of_width = tl.arange(0, PADDED)
    place = base + chunk.to(tl.int64) * Q * row + (tl.arange(0, Q) * row)[:, None] + of_width[None, :]
    if EVEN and WIDTH == PADDED:
        value = tl.load(place)
    else:
        value = tl.load(place, mask=inside[:, None] & (of_width < WIDTH)[None, :], other=0.0)
    return value.to(tl.float32) if value.dtype == tl.float16 else value


@jit
def _places(count):
    """(place, batch), of which axis 0 of the grid has count for each row of the batch."""
    program = tl.program_id(0)
    return program % count, (program // count).to(tl.int64)


@jit
def _counting(mask, batch, at, length, HAS_MASK: tl.constexpr):
    inside = at < length
    if HAS_MASK:
        inside = inside & (tl.load(mask + batch * length + at, mask=inside, other=0) != 0)
    return inside


@jit
def _from_start(own_sum, own_rest, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The decay from a chunk's beginning to a position."""
    return _power(own_sum + own_rest if EXACT else own_sum, EXACT, PRECISION)


@jit
def _between(to_sum, to_rest, own_sum, own_rest, EXACT: tl.constexpr):
    """The logarithm of the decay from one position to another."""
    return (to_sum - own_sum) + (to_rest - own_rest) if EXACT else to_sum - own_sum


@jit
def _sized(to_sum, to_rest, own_sum, own_rest, EXACT: tl.constexpr):
    """The same; unless EXACT, with the logarithm of the step size."""
    return (to_sum - own_sum) + (to_rest - own_rest) if EXACT else to_sum - own_rest


@jit
def _carried(state, log, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The state after a decay; where nothing is left, neither Inf nor NaN is."""
    through = _power(log, EXACT, PRECISION)
    return tl.where(through == 0.0, 0.0, state * through)


@jit
def _begun(
    state,
    added,
    logs,
    row,
    segment,
    cells,
    SEGMENTS: tl.constexpr,
    BACKWARD: tl.constexpr,
    SIZE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state from which a segment begins, of what the segments before it add, or after it if BACKWARD."""
    for other in range(SEGMENTS - 1 - segment if BACKWARD else segment):
        index = SEGMENTS - 1 - other if BACKWARD else other
        state = _carried(state, tl.load(logs + row * SEGMENTS + index), EXACT, PRECISION)
        state += tl.load(added + (row * SEGMENTS + index) * SIZE + cells)
    return state


@jit
def _carry(
    program,
    batch,
    x,
    B,
    mask,
    sizes,
    sums,
    rest,
    begin,
    added,
    logs,
    written,
    last,
    length,
    chunks,
    of_segment,
    x_batch,
    x_row,
    B_batch,
    B_row,
    HEADS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PP: tl.constexpr,
    NN: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BACKWARD: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carries a block of a state's channels through a segment; backward its gradient, with dy for x and C for B.

    ADDS: writes what the segment adds to a state of zero, and the logarithm of its decay, to `added` and `logs`.
    Otherwise writes the state at the beginning of each chunk, or its gradient at the end, to `written` (b, chunks, h,
    NN, PP), and BACKWARD the gradient of the initial state to `last` (b, h, p, n).
    """
    head, block, segment = program // BLOCKS, program % BLOCKS, tl.program_id(1)
    WIDTH: tl.constexpr = PP // BLOCKS
    row = batch * HEADS + head
    q, n, p = tl.arange(0, Q), tl.arange(0, NN)[:, None], block * WIDTH + tl.arange(0, WIDTH)[None, :]
    cells, outer, exists = n * PP + p, p * N + n, (n < N) & (p < P)
    state = tl.zeros((NN, WIDTH), tl.float32)
    if not ADDS:
        if HAS_BEGIN:
            state = tl.load(begin + row * P * N + outer, mask=exists, other=0.0)
        if SEGMENTS > 1:
            state = _begun(state, added, logs, row, segment, cells, SEGMENTS, BACKWARD, NN * PP, EXACT, PRECISION)
    x += batch * x_batch + head * P + block * WIDTH
    B += batch * B_batch + head // OF_GROUP * N
    sizes += row * chunks * Q
    sums += row * chunks * Q
    rest += row * chunks * Q
    log = 0.0
    first = segment * of_segment
    count = tl.minimum(of_segment, chunks - first)
    for index in range(count):
        chunk = first + (count - 1 - index if BACKWARD else index)
        at = chunk * Q + q
        inside = _counting(mask, batch, at, length, HAS_MASK)
        given = _tile(x, chunk, inside, x_row, P if BLOCKS == 1 else WIDTH, WIDTH, EVEN)
        keys = _tile(B, chunk, inside, B_row, N, NN, EVEN)
        end = chunk * Q + Q - 1
        end_sum, end_rest = tl.load(sums + end), tl.load(rest + end)
        own_sum, own_rest = tl.load(sums + at), tl.load(rest + at)
        whole = end_sum + end_rest if EXACT else end_sum
        if not ADDS:
            place = ((batch * chunks + chunk) * HEADS + head) * NN * PP + cells
            tl.store(written + place, state.to(written.dtype.element_ty))
        if BACKWARD:
            weight = _from_start(own_sum, own_rest, EXACT, PRECISION)
        else:
            weight = _power(_sized(end_sum, end_rest, own_sum, own_rest, EXACT), EXACT, PRECISION)
            if EXACT:
                weight *= tl.load(sizes + at)
        value = tl.where(weight[:, None] == 0.0, 0.0, given.to(tl.float32) * weight[:, None])
        state = _carried(state, whole, EXACT, PRECISION)
        state = _product(tl.trans(keys), value.to(keys.dtype), state, PRECISION)
        log += whole
    if ADDS:
        tl.store(added + (row * SEGMENTS + segment) * NN * PP + cells, state)
        if block == 0:
            tl.store(logs + row * SEGMENTS + segment, log)
    elif BACKWARD and segment == 0:
        tl.store(last + row * P * N + outer, state, mask=exists)


@jit
def adds(
    x,
    B,
    mask,
    sizes,
    sums,
    rest,
    added,
    logs,
    length,
    chunks,
    of_segment,
    x_batch,
    x_row,
    B_batch,
    B_row,
    HEADS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PP: tl.constexpr,
    NN: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BACKWARD: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each segment adds to a state, (b, h, segments, NN, PP), and the logarithm of its decay; of `_carry`."""
    program, batch = _places(HEADS * BLOCKS)
    _carry(
        *(program, batch),
        *(x, B, mask, sizes, sums, rest, x, added, logs, added, added),
        *(length, chunks, of_segment, x_batch, x_row, B_batch, B_row),
        *(HEADS, OF_GROUP, P, N, PP, NN, BLOCKS, SEGMENTS, BACKWARD, True, False, EVEN, HAS_MASK, EXACT, PRECISION),
    )


@jit
def states(
    x,
    B,
    dy,
    C,
    mask,
    sizes,
    sums,
    rest,
    begin,
    added,
    logs,
    dlast,
    dadded,
    dlogs,
    before,
    after,
    dbegin,
    length,
    chunks,
    of_segment,
    x_batch,
    x_row,
    B_batch,
    B_row,
    dy_batch,
    dy_row,
    C_batch,
    C_row,
    HEADS: tl.constexpr,
    OF_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PP: tl.constexpr,
    NN: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
    HAS_LAST: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before each chunk and the gradient of that after it, both at once; of `_carry`."""
    program, row = _places(HEADS * BLOCKS)
    batch = row // 2
    if row % 2 == 0:
        _carry(
            *(program, batch, dy, C, mask, sizes, sums, rest, dlast, dadded, dlogs, after, dbegin),
            *(length, chunks, of_segment, dy_batch, dy_row, C_batch, C_row),
            *(HEADS, OF_GROUP, P, N, PP, NN, BLOCKS, SEGMENTS, True, False, HAS_LAST, EVEN, HAS_MASK, EXACT, PRECISION),
        )
    else:
        _carry(
            *(program, batch, x, B, mask, sizes, sums, rest, begin, added, logs, before, dbegin),
            *(length, chunks, of_segment, x_batch, x_row, B_batch, B_row),
            *(HEADS, OF_GROUP, P, N, PP, NN, BLOCKS, SEGMENTS, False, False, HAS_BEGIN),
            *(EVEN, HAS_MASK, EXACT, PRECISION),
        )


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
    head, batch = _places(HEADS)
    row = batch * HEADS + head
    q, n, p = tl.arange(0, Q), tl.arange(0, NN)[:, None], tl.arange(0, PP)
    cells, outer, exists = n * PP + p[None, :], p[None, :] * N + n, (n < N) & (p < P)[None, :]
    state = tl.zeros((NN, PP), tl.float32)
    if HAS_BEGIN:
        state = tl.load(begin + row * P * N + outer, mask=exists, other=0.0)
    if SEGMENTS > 1:
        state = _begun(state, added, logs, row, segment, cells, SEGMENTS, False, NN * PP, EXACT, PRECISION)
    skip = _skip(D, head, p, P, D_OF)
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
        inside = _counting(mask, batch, at, length, HAS_MASK)
        given = _tile(x, chunk, inside, x_row, P, PP, EVEN)
        keys = _tile(B, chunk, inside, B_row, N, NN, EVEN)
        queries = _tile(C, chunk, inside, C_row, N, NN, EVEN)
        own_sum, own_rest = tl.load(sums + at), tl.load(rest + at)
        end = chunk * Q + Q - 1
        end_sum, end_rest = tl.load(sums + end), tl.load(rest + end)

        weights = _sized(own_sum[:, None], own_rest[:, None], own_sum[None, :], own_rest[None, :], EXACT)
        weights = _power(tl.where(q[:, None] >= q[None, :], weights, NEVER), EXACT, PRECISION)
        weight = _power(_sized(end_sum, end_rest, own_sum, own_rest, EXACT), EXACT, PRECISION)[:, None]
        if EXACT:
            size = tl.load(sizes + at)
            weights *= size[None, :]
            weight *= size[:, None]
        weights *= _product(queries, tl.trans(keys), tl.zeros((Q, Q), tl.float32), PRECISION)
        start = _from_start(own_sum, own_rest, EXACT, PRECISION)[:, None]
        value = _product(queries, state.to(keys.dtype), tl.zeros((Q, PP), tl.float32), PRECISION)
        value = tl.where(start == 0.0, 0.0, value * start)
        value = _product(weights.to(given.dtype), given, value, PRECISION)
        if D_OF:
            value += skip[None, :] * given.to(tl.float32)
        if HAS_Z:
            gate = _tile(z, chunk, inside, z_row, P, PP, EVEN).to(tl.float32)
            value *= gate * _sigmoid(gate, EXACT, PRECISION)
        place = y + chunk.to(tl.int64) * Q * HEADS * P + (q * HEADS * P)[:, None] + p[None, :]
        tl.store(place, value.to(y.dtype.element_ty), mask=(at < length)[:, None] & (p < P)[None, :])

        ended = tl.where(weight == 0.0, 0.0, given.to(tl.float32) * weight)
        state = _carried(state, end_sum + end_rest if EXACT else end_sum, EXACT, PRECISION)
        state = _product(tl.trans(keys), ended.to(keys.dtype), state, PRECISION)
    if segment == SEGMENTS - 1:
        tl.store(last + row * P * N + outer, state, mask=exists)


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
    chunk, batch = _places(tl.cdiv(length, Q))
    q, p = tl.arange(0, Q), tl.arange(0, PP)
    inside = _counting(mask, batch, chunk * Q + q, length, HAS_MASK)
    first = batch * length * HEADS * P + head * P
    arriving = _tile(dy + batch * dy_batch + head * P, chunk, inside, dy_row, P, PP, EVEN).to(tl.float32)
    gate = _tile(z + batch * z_batch + head * P, chunk, inside, z_row, P, PP, EVEN).to(tl.float32)
    value = _tile(linear + first, chunk, inside, HEADS * P, P, PP, EVEN).to(tl.float32)
    sigmoid = _sigmoid(gate, EXACT, PRECISION)
    place = first + chunk.to(tl.int64) * Q * HEADS * P + (q * HEADS * P)[:, None] + p[None, :]
    here = (chunk * Q + q < length)[:, None] & (p < P)[None, :]
    value = arriving * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dz + place, value.to(dz.dtype.element_ty), mask=here)
    tl.store(dlinear + place, (arriving * gate * sigmoid).to(dlinear.dtype.element_ty), mask=here)


@jit
def _skip(D, head, p, P: tl.constexpr, D_OF: tl.constexpr):
    """D of a head's channels."""
    if D_OF == 0:
        return tl.zeros(p.shape, tl.float32)
    return tl.load(D + head * D_OF + (p if D_OF > 1 else tl.zeros_like(p)), mask=p < P, other=0.0).to(tl.float32)


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
    chunk, batch = _places(chunks)
    group = part // (OF_GROUP // TOGETHER)
    at = chunk * Q + tl.arange(0, Q)
    inside = _counting(mask, batch, at, length, HAS_MASK)
    queries = _tile(C + batch * C_batch + group * N, chunk, inside, C_row, N, NN, EVEN)
    total, p = tl.zeros((Q, NN), tl.float32), tl.arange(0, PP)
    dy += batch * dy_batch
    for index in range(TOGETHER):
        head = part * TOGETHER + index
        place = (batch * HEADS + head) * chunks * Q + at
        cells = _state(batch, chunk, head, chunks, HEADS, PP, NN)
        state, dstate = tl.load(before + cells), tl.load(after + cells)
        arriving = _tile(dy + head * P, chunk, inside, dy_row, P, PP, EVEN)
        start = _from_start(tl.load(sums + place), tl.load(rest + place), EXACT, PRECISION)[:, None]
        value = _product(arriving, tl.trans(state), tl.zeros((Q, NN), tl.float32), PRECISION)
        value = tl.where(start == 0.0, 0.0, value * start)
        tl.store(started + place, tl.sum(value * queries.to(tl.float32), 1))
        total += value
        end = (batch * HEADS + head) * chunks * Q + chunk * Q + Q - 1
        through = tl.load(sums + end) + tl.load(rest + end) if EXACT else tl.load(sums + end)
        through = _power(through, EXACT, PRECISION)
        # As a trace, because what the matrix units do not read would pass through registers.
        square = _product(tl.trans(state), dstate, tl.zeros((PP, PP), tl.float32), PRECISION)
        passing = tl.sum(tl.sum(tl.where(p[:, None] == p[None, :], square, 0.0), 1), 0)
        passing = tl.where(through == 0.0, 0.0, passing * through)
        tl.store(passed + (batch * HEADS + head) * chunks + chunk, passing)
    cells, exists = _shares(part, batch, chunk, chunks, length, HEADS, OF_GROUP, TOGETHER, N, NN)
    tl.store(dC + cells, total, mask=exists)


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
    chunk, batch = _places(chunks)
    group = part // (OF_GROUP // TOGETHER)
    q, p = tl.arange(0, Q), tl.arange(0, PP)
    at = chunk * Q + q
    inside = _counting(mask, batch, at, length, HAS_MASK)
    keys = _tile(B + batch * B_batch + group * N, chunk, inside, B_row, N, NN, EVEN)
    queries = _tile(C + batch * C_batch + group * N, chunk, inside, C_row, N, NN, EVEN)
    # Rows are j, columns i.
    later = q[None, :] >= q[:, None]
    scores = _product(keys, tl.trans(queries), tl.zeros((Q, Q), tl.float32), PRECISION)
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
        given = _tile(x + head * P, chunk, inside, x_row, P, PP, EVEN)
        arriving = _tile(dy + head * P, chunk, inside, dy_row, P, PP, EVEN)
        to_end = _power(_between(end_sum, end_rest, own_sum, own_rest, EXACT), EXACT, PRECISION)[:, None]
        between = _between(own_sum[None, :], own_rest[None, :], own_sum[:, None], own_rest[:, None], EXACT)
        decay = _power(tl.where(later, between, NEVER), EXACT, PRECISION)
        weights = (scores * decay * size[:, None]).to(given.dtype)

        # What passes between positions of the chunk.
        of_pairs = _product(given, tl.trans(arriving), tl.zeros((Q, Q), tl.float32), PRECISION)
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
        dgiven = _product(weights, arriving, tl.zeros((Q, PP), tl.float32), PRECISION)
        value = _product(keys, dstate, tl.zeros((Q, PP), tl.float32), PRECISION)
        value = tl.where(to_end == 0.0, 0.0, value * to_end)
        tl.store(leaving + place, tl.sum(value * wide, 1))
        ended = tl.where(to_end == 0.0, 0.0, wide * (to_end * size[:, None])).to(given.dtype)
        dkeys = _product(ended, tl.trans(dstate), dkeys, PRECISION)
        value = tl.fma(value, tl.broadcast_to(size[:, None], (Q, PP)), dgiven)
        if D_OF:
            value += _skip(D, head, p, P, D_OF)[None, :] * arriving_wide
        tl.store(dx + head * P + places, value.to(dx.dtype.element_ty), mask=here)
    cells, exists = _shares(part, batch, chunk, chunks, length, HEADS, OF_GROUP, TOGETHER, N, NN)
    dscores = dscores.to(keys.dtype)
    dkeys = _product(dscores, queries, dkeys, PRECISION)
    tl.store(dB + cells, dkeys.to(dB.dtype.element_ty), mask=exists)
    dqueries = tl.load(dC_started + cells, mask=exists, other=0.0)
    dqueries = _product(tl.trans(dscores), keys, dqueries, PRECISION)
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
    chunk, batch = _places(chunks)
    q = tl.arange(0, Q)
    at = chunk * Q + q
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (head < HEADS)[None, :]
    inside = _counting(mask, batch, at, length, HAS_MASK)
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
    _, within = _step_of(raw, LEAST, MOST, SOFTPLUS)
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
