"""What the kernels of Mamba-2's recurrence share: numbers, and what each of them computes of a chunk.

`ssd_kernels` says what the arguments are.
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


def whole_range(*bounds):
    """`range` in Triton's interpreter, whose numbers are arrays of one element, of which NumPy makes no index."""
    for index in builtins.range(*map(_whole, bounds)):
        yield tl.program_id(0) * 0 + index


def _whole(bound) -> int:
    return int(bound.handle.data.item()) if isinstance(bound, tl.tensor) else int(bound)


# To stand in a module for Python's own, which Triton compiles.
RANGE = whole_range if os.environ.get("TRITON_INTERPRET") == "1" else builtins.range

if RANGE is whole_range:
    range = RANGE


@jit
def product(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # the interpreter multiplies matrices of bfloat16 as if they were whole numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def power(value, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """What is left of a decay of that logarithm: to the base e if EXACT, else to the base 2, in one instruction."""
    if EXACT:
        return tl.exp(value)
    if PRECISION == "widened":
        return tl.exp2(value)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1)


@jit
def sigmoid(value, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    if EXACT or PRECISION == "widened":
        return tl.sigmoid(value)
    below = 1.0 + power(value * -LOG2_E, False, PRECISION)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], tl.float32, is_pure=True, pack=1)


@jit
def softplus(value):
    """log(1 + e^value), with log(1 + e) as twice the area tangent of e / (2 + e), at most 1/3."""
    small = tl.exp(-tl.abs(value))
    ratio = small / (2.0 + small)
    square = ratio * ratio
    series = 1.0 / 15
    for odd in tl.static_range(13, 0, -2):
        series = series * square + 1.0 / odd
    return tl.maximum(value, 0.0) + 2.0 * ratio * series


@jit
def step_of(raw, LEAST: tl.constexpr, MOST: tl.constexpr, SOFTPLUS: tl.constexpr):
    """(the step size, whether it is within the limits)."""
    step = softplus(raw) if SOFTPLUS else raw
    return tl.clamp(step, LEAST, MOST, tl.PropagateNan.ALL), ~((step < LEAST) | (step > MOST))


@jit
def tile(base, chunk, inside, row, WIDTH: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr):
    """(Q, width) of a sequence, zero where nothing counts; float16 as float32, because products may leave its range."""
    of_width = tl.arange(0, PADDED)
    place = base + chunk.to(tl.int64) * Q * row + (tl.arange(0, Q) * row)[:, None] + of_width[None, :]
    if EVEN and WIDTH == PADDED:
        value = tl.load(place)
    else:
        value = tl.load(place, mask=inside[:, None] & (of_width < WIDTH)[None, :], other=0.0)
    return value.to(tl.float32) if value.dtype == tl.float16 else value


@jit
def places(count):
    """(place, batch), of which axis 0 of the grid has count for each row of the batch."""
    program = tl.program_id(0)
    return program % count, (program // count).to(tl.int64)


@jit
def counting(mask, batch, at, length, HAS_MASK: tl.constexpr):
    inside = at < length
    if HAS_MASK:
        inside = inside & (tl.load(mask + batch * length + at, mask=inside, other=0) != 0)
    return inside


@jit
def from_start(own_sum, own_rest, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The decay from a chunk's beginning to a position."""
    return power(own_sum + own_rest if EXACT else own_sum, EXACT, PRECISION)


@jit
def between(to_sum, to_rest, own_sum, own_rest, EXACT: tl.constexpr):
    """The logarithm of the decay from one position to another."""
    return (to_sum - own_sum) + (to_rest - own_rest) if EXACT else to_sum - own_sum


@jit
def sized(to_sum, to_rest, own_sum, own_rest, EXACT: tl.constexpr):
    """The same; unless EXACT, with the logarithm of the step size."""
    return (to_sum - own_sum) + (to_rest - own_rest) if EXACT else to_sum - own_rest


@jit
def carried(state, log, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """The state after a decay; where nothing is left, neither Inf nor NaN is."""
    through = power(log, EXACT, PRECISION)
    return tl.where(through == 0.0, 0.0, state * through)


@jit
def begun(
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
        state = carried(state, tl.load(logs + row * SEGMENTS + index), EXACT, PRECISION)
        state += tl.load(added + (row * SEGMENTS + index) * SIZE + cells)
    return state


@jit
def skip(D, head, p, P: tl.constexpr, D_OF: tl.constexpr):
    """D of a head's channels."""
    if D_OF == 0:
        return tl.zeros(p.shape, tl.float32)
    return tl.load(D + head * D_OF + (p if D_OF > 1 else tl.zeros_like(p)), mask=p < P, other=0.0).to(tl.float32)
