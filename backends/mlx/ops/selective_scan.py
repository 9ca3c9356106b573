"""The S6 recurrence in MLX (Gu and Dao 2023, equations 2 and 4).

h_t = exp(step_t A) h_{t-1} + step_t B_t x_t;  y_t = (C_t h_t + D x_t) * silu(z_t).
"""

import functools
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import gpu_scan, native_tensors
from mamba_core.backends.mlx.kernels.exponential import exp
from mamba_core.backends.mlx.kernels.native_scan import native
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only
from mamba_core.backends.mlx.positions import call_of, where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.spec.ops.selective_scan import LEAST, check_scan, check_step

# In positions. The state before each chunk is kept: with 16 of them and 16 states a channel, as much as x.
CHUNK = 16
# Elements that one operation works on: on a CPU as many as its cache holds, on a GPU enough to fill it.
WIDTH = {"cpu": 2**17, "gpu": 2**20}


def selective_scan(
    x,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
    kernel="auto",
):
    """Computed in float32, a float64 x too: MLX has no float64 on a GPU."""
    check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids)
    call = call_of(mask, segment_ids, length=x.shape[1])
    y, h = _scan(call, (x, delta, A, B, C, D, z, delta_bias, initial_state), delta_softplus, kernel)
    return (y, h) if return_final_state else y


def scan(
    call: Call,
    x,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    initial_state=None,
    kernel="auto",
):
    """`selective_scan` within a call whose positions are known; (y, final state)."""
    check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, call.mask, call.segment_ids)
    return _scan(call, (x, delta, A, B, C, D, z, delta_bias, initial_state), delta_softplus, kernel)


def selective_step(x, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, state):
    check_step(x, delta, A, B, C, D, z, delta_bias, state)
    keep_float32()
    dtype = x.dtype
    x, A, B, C, D, z, state = (_float32(value) for value in (x, A, B, C, D, z, state))
    step, A = _step_size(delta, delta_bias, delta_softplus), mx.maximum(A, LEAST)
    h = _advance(state, mx.exp(step[..., None] * A), step * x, B, None)
    return _output(_contract(h, C), x, D, z).astype(dtype), h


def kernels(device=None, dtype=None, arrays=(), states=None, *, wanted="auto") -> dict[str, str | None]:
    """For x of that dtype, these arrays and so many states.

    The native kernel has the arrays computed to see whether they can be: only where it is wanted, by name or "auto".
    """
    device = device or default_device()
    to_compute = arrays if wanted in ("auto", "native") else ()
    languages = (gpu_scan.CUDA, gpu_scan.METAL)
    on_a_gpu = {language.name: gpu_scan.reason(language, device, dtype, states, arrays) for language in languages}
    return dict.fromkeys(KERNELS) | {"native": native_tensors.reason(device, dtype, to_compute)} | on_a_gpu


def chosen(kernel: str, dtype: mx.Dtype, arrays=(), states: int | None = None) -> str:
    """The kernel of that name, or for "auto" the fastest, for x of that dtype, these arrays and so many states.

    On MLX's default device.

    Raises:
        ValueError: there is no such kernel, or not for them.
    """
    available = kernels(None, dtype, arrays, states, wanted=kernel)
    return choose(kernel, available, "selective_scan", "mlx", default_device())


def _scan(call, arrays, delta_softplus, kernel):
    keep_float32()
    x, A = arrays[0], arrays[2]
    name = chosen(kernel, x.dtype, (*arrays, call.mask, call.restart), states=A.shape[1])
    return KERNELS[name](call, *arrays, delta_softplus)


def _prepared(scan):
    """A kernel of the op's own arguments, from a `scan` of step sizes and of float32 only."""

    @functools.wraps(scan)
    def kernel(call, x, delta, A, B, C, D, z, delta_bias, h0, delta_softplus):
        dtype, mask = x.dtype, call.mask
        if mask is not None:
            # Not by a factor of zero: a masked position may hold Inf or NaN.
            x, delta, B, C, z = (where_counting(mask, value) for value in (x, delta, B, C, z))
        x, A, B, C, D, z = (_float32(value) for value in (x, A, B, C, D, z))
        step, A = where_counting(mask, _step_size(delta, delta_bias, delta_softplus)), mx.maximum(A, LEAST)
        y, h = x, mx.zeros((x.shape[0], *A.shape)) if h0 is None else _float32(h0)
        if x.shape[1] > 0:
            y, h = scan(x, step, A, B, C, D, z, h, call.restart)
        return where_counting(mask, y).astype(dtype), h

    return kernel


@_prepared
def sequential(x, step, A, B, C, D, z, h0, restart):
    """A loop over time, the plain twin of the others. MLX differentiates it and keeps every state."""
    h, linear = h0, []
    for t in range(x.shape[1]):
        decay = mx.exp(step[:, t, :, None] * A)
        h = _advance(h, decay, step[:, t] * x[:, t], B[:, t], None if restart is None else restart[:, t, None])
        linear.append(_contract(h, C[:, t]))
    return _output(mx.stack(linear, axis=1), x, D, z), h


@_prepared
def chunked(x, step, A, B, C, D, z, h0, restart):
    """Chunks side by side: from a zero state, then from their true first states, which follow from one another.

    Blocks of chunks are done one after another, so that the states of one block are held at a time. The gradient is
    by hand; it keeps the state before each chunk only. vmap, forward mode and a second derivative raise.
    """
    linear, h, _ = _chunked_scan(x, step, A, B, C, h0, restart)
    return _output(linear, x, D, z), h


# Fastest first, the plain one last.
KERNELS = {
    "native": native,
    "cuda": gpu_scan.cuda,
    "metal": gpu_scan.metal,
    "chunked": chunked,
    "sequential": sequential,
}


@mx.custom_function
def _chunked_scan(x, step, A, B, C, h0, restart):
    """C_t h_t (b, l, e), the last state (b, e, n) and, block by block, the states before chunks (b * chunks, e, n)."""
    x, step, A, B, C, h0 = first_derivative_only((x, step, A, B, C, h0))
    plan = _plan(x, A)
    h, firsts, linear = h0, [], []
    for index in range(plan.blocks):
        # Each block waits for the one before: MLX might else run h through all blocks and hold their states.
        waiting = mx.depends([x, step, B, C], [h, *linear[-1:]])
        block = _block(plan, index, *waiting, restart)
        decay = _decays(block, A)
        first = _first_states(plan, block, decay, A, h)
        states = _states(block, decay, first)
        linear.append(_merge(plan, [_contract(state, c) for state, c in zip(states[1:], block.C, strict=True)]))
        firsts.append(first)
        h = _by_chunk(plan, states[-1])[:, -1]
    return _join(plan, linear), h, firsts


@_chunked_scan.vjp
def _chunked_scan_vjp(arguments, cotangents, outputs):
    """As `mamba_core.spec.ops.selective_scan.selective_scan_vjp`, a block at a time from the last to the first."""
    x, step, A, B, C, _, restart = arguments
    dlinear, g, _ = cotangents
    plan = _plan(x, A)
    dA, parts = mx.zeros_like(A), [()]
    for index in reversed(range(plan.blocks)):
        *waiting, dy = mx.depends([x, step, B, C, dlinear], [g, dA, *parts[-1]])
        block, dy = _block(plan, index, *waiting, restart), _slice(plan, index, dy)
        decay = _decays(block, A)
        states = _states(block, decay, outputs[2][index])
        after = _gradients_after_chunks(plan, block, decay, A, dy, g)
        g, dA, *part = _block_vjp(plan, block, decay, A, states, dy, after, dA)
        parts.append(part)
    dx, dstep, dB, dC = (_join(plan, part[::-1]) for part in zip(*parts[1:], strict=True))
    gradients = first_derivative_only((dx, dstep, dA, dB, dC, g))
    return *gradients, None if restart is None else mx.zeros_like(restart)


class _Plan(NamedTuple):
    """The length as blocks of chunks of positions; steps of size zero fill up the end."""

    batch: int
    length: int
    blocks: int
    chunks: int
    positions: int


class _Block(NamedTuple):
    """Position first, the batch and the chunks as one axis: x, step (t, r, e); B, C (t, r, n); restart (t, r, 1)."""

    x: mx.array
    step: mx.array
    B: mx.array
    C: mx.array
    restart: mx.array | None


def _plan(x, A) -> _Plan:
    batch, length, _ = x.shape
    positions = min(CHUNK, length)
    chunks = -(-length // positions)
    side_by_side = min(chunks, max(1, WIDTH[default_device()] // (batch * A.size)))
    blocks = -(-chunks // side_by_side)
    return _Plan(batch, length, blocks, -(-chunks // blocks), positions)


def _block(plan, index, x, step, B, C, restart) -> _Block:
    restart = None if restart is None else _slice(plan, index, restart[..., None])
    return _Block(*(_slice(plan, index, value) for value in (x, step, B, C)), restart)


def _slice(plan, index, value):
    """(b, l, c) -> (positions, b * chunks, c) of one block."""
    size = plan.chunks * plan.positions
    value = value[:, index * size : (index + 1) * size]
    value = mx.pad(value, ((0, 0), (0, size - value.shape[1]), (0, 0)))
    value = value.reshape(plan.batch, plan.chunks, plan.positions, -1)
    return value.transpose(2, 0, 1, 3).reshape(plan.positions, plan.batch * plan.chunks, -1)


def _merge(plan, values):
    """The inverse of `_slice`, from a list of positions."""
    value = mx.stack(values).reshape(plan.positions, plan.batch, plan.chunks, -1)
    return value.transpose(1, 2, 0, 3).reshape(plan.batch, plan.chunks * plan.positions, -1)


def _join(plan, blocks):
    return mx.concatenate(blocks, axis=1)[:, : plan.length]


def _by_chunk(plan, value):
    return value.reshape(plan.batch, plan.chunks, *value.shape[1:])


def _decays(block, A):
    return [_decay(step, A) for step in block.step]


def _states(block, decay, first):
    """The state before the first and after every position, of all chunks."""
    states = [first]
    for t in range(len(decay)):
        states.append(_advance(states[-1], decay[t], block.step[t] * block.x[t], block.B[t], _at(block.restart, t)))
    return states


def _first_states(plan, block, decay, A, h):
    """The state before each chunk, from the one before the block."""
    if plan.chunks == 1:
        return h
    ends = _states(block, decay, mx.zeros((len(block.x[0]), *A.shape)))[-1]
    return _carry(plan, block, A, h, ends, range(plan.chunks))


def _gradients_after_chunks(plan, block, decay, A, dy, g):
    """The gradient of the state after each chunk from later chunks only, from that of the state after the block."""
    if plan.chunks == 1:
        return g
    starts = mx.zeros((len(block.x[0]), *A.shape))
    for t in reversed(range(len(decay))):
        starts = _retreat(starts, decay[t], dy[t], block.C[t], _at(block.restart, t))
    return _carry(plan, block, A, g, starts, reversed(range(plan.chunks)))


def _carry(plan, block, A, value, added, order):
    """What enters each chunk: what entered the one before it in `order`, decayed over that chunk, plus its `added`."""
    decay = _by_chunk(plan, _decay(block.step.sum(axis=0), A))
    restart = None if block.restart is None else _by_chunk(plan, block.restart.any(axis=0))
    added = _by_chunk(plan, added)
    entering = {}
    for chunk in order:
        entering[chunk] = value
        value = _decayed(value, decay[:, chunk], None if restart is None else restart[:, chunk]) + added[:, chunk]
    return mx.stack([entering[chunk] for chunk in range(plan.chunks)], axis=1).reshape(-1, *A.shape)


def _block_vjp(plan, block, decay, A, states, dy, g, dA):
    parts = []
    for t in reversed(range(len(decay))):
        x, step, B, C, restart = (_at(value, t) for value in block)
        g, dA, *rest = _position_vjp(g, dA, x, step, A, B, C, restart, decay[t], states[t], states[t + 1], dy[t])
        parts.append(rest)
    return _by_chunk(plan, g)[:, 0], dA, *(_merge(plan, part[::-1]) for part in zip(*parts, strict=True))


@mx.compile
def _position_vjp(g, dA, x, step, A, B, C, restart, decay, before, state, dy):
    g = g + dy[..., None] * C[:, None]
    dbefore = _decayed(g, decay, restart)
    dlog_decay = dbefore * (before if restart is None else mx.where(restart[..., None], 0.0, before))
    dA = dA + (dlog_decay * step[..., None]).sum(axis=0)
    gB = _contract(g, B)
    dx = gB * step
    dstep = (dlog_decay * A).sum(axis=-1) + gB * x
    dB = (g * (step * x)[..., None]).sum(axis=1)
    dC = (state * dy[..., None]).sum(axis=1)
    return dbefore, dA, dx, dstep, dB, dC


@mx.compile
def _advance(h, decay, dx, B, restart):
    return _decayed(h, decay, restart) + dx[..., None] * B[:, None]


@mx.compile
def _retreat(g, decay, dy, C, restart):
    return _decayed(g + dy[..., None] * C[:, None], decay, restart)


def _decayed(value, decay, restart):
    """At a restart nothing passes, not even Inf or NaN."""
    return decay * (value if restart is None else mx.where(restart[..., None], 0.0, value))


def _contract(h, C):
    """sum_n C_n h_n."""
    return (h * C[:, None]).sum(axis=-1)


def _decay(step, A):
    return exp(step[..., None] * A)


def _output(linear, x, D, z):
    """(C h + D x) * silu(z)."""
    linear = linear if D is None else linear + D * x
    return linear if z is None else linear * nn.silu(z)


def _step_size(delta, delta_bias, delta_softplus):
    delta = _float32(delta)
    delta = delta if delta_bias is None else delta + _float32(delta_bias)
    return mx.logaddexp(delta, 0.0) if delta_softplus else delta


def _float32(value):
    return None if value is None else value.astype(mx.float32)


def _at(values, t):
    return None if values is None else values[t]
