"""The states of Mamba-2's recurrence between chunks, and their gradients.

`ssd_kernels` says what the arguments are.
"""

import triton.language as tl
from triton import jit

from mamba_core.backends.gpu import ssd_parts as parts
from mamba_core.backends.gpu.ssd_parts import Q

if parts.RANGE is parts.whole_range:
    range = parts.RANGE


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
            state = parts.begun(state, added, logs, row, segment, cells, SEGMENTS, BACKWARD, NN * PP, EXACT, PRECISION)
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
        inside = parts.counting(mask, batch, at, length, HAS_MASK)
        given = parts.tile(x, chunk, inside, x_row, P if BLOCKS == 1 else WIDTH, WIDTH, EVEN)
        keys = parts.tile(B, chunk, inside, B_row, N, NN, EVEN)
        end = chunk * Q + Q - 1
        end_sum, end_rest = tl.load(sums + end), tl.load(rest + end)
        own_sum, own_rest = tl.load(sums + at), tl.load(rest + at)
        whole = end_sum + end_rest if EXACT else end_sum
        if not ADDS:
            place = ((batch * chunks + chunk) * HEADS + head) * NN * PP + cells
            tl.store(written + place, state.to(written.dtype.element_ty))
        if BACKWARD:
            weight = parts.from_start(own_sum, own_rest, EXACT, PRECISION)
        else:
            weight = parts.power(parts.sized(end_sum, end_rest, own_sum, own_rest, EXACT), EXACT, PRECISION)
            if EXACT:
                weight *= tl.load(sizes + at)
        value = tl.where(weight[:, None] == 0.0, 0.0, given.to(tl.float32) * weight[:, None])
        state = parts.carried(state, whole, EXACT, PRECISION)
        state = parts.product(tl.trans(keys), value.to(keys.dtype), state, PRECISION)
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
    program, batch = parts.places(HEADS * BLOCKS)
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
    program, row = parts.places(HEADS * BLOCKS)
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
