"""The recurrence of Mamba-2 as matrix products over chunks (Dao and Gu 2024, section 6), with a gradient by hand.

Inside a chunk, y_i = sum_{j <= i} (C_i B_j) exp(a_{j+1} + ... + a_i) u_j + exp(a_1 + ... + a_i) h C_i with u = dt x and
a = dt A. Blocks of chunks are computed side by side, and their states one after another. The state before each chunk
is kept; the gradient computes all else again. No array of (positions, positions) outlives its block.

Axes: r the chunks of all rows, g groups, m heads of a group, q positions of a chunk, p and n.
"""

from typing import NamedTuple

import mlx.core as mx

from mamba_core.backends.mlx.arrays import default_device
from mamba_core.backends.mlx.kernels.exponential import exp
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only

# Positions of a chunk: the products of q x q grow with it, the number of operations falls.
CHUNK = 64
# Elements of (r, g, m, q, q): on a CPU as many as its cache holds, on a GPU enough to fill it.
WIDTH = {"cpu": 2**17, "gpu": 2**24}
# exp of less is zero: the least logarithm of a decay, and the grid on which sums of a chunk's are exact.
LEAST_LOG, GRID = -128.0, 2.0**10


class _Plan(NamedTuple):
    """The length as blocks of chunks of positions; steps of size zero fill up the end."""

    batch: int
    length: int
    blocks: int
    chunks: int
    positions: int
    groups: int


class _Decays(NamedTuple):
    """What passes, (r, g, m, ...): from each position to each later one (q, q), from the state before the chunk to each
    position (q, 1), from each position to the chunk's end (q, 1), and through the whole chunk (1, 1)."""

    between: mx.array
    start: mx.array
    end: mx.array
    through: mx.array


class _Block(NamedTuple):
    """u (r, g, m, q, p), B and C (r, g, 1, q, n)."""

    u: mx.array
    B: mx.array
    C: mx.array
    decays: _Decays


def chunked(x, step, A, B, C, h0, restart):
    """(y, final state). vmap, forward mode and a second derivative raise."""
    y, h, _ = _chunked(x, step, A, B, C, h0, restart)
    return y, h


@mx.custom_function
def _chunked(x, step, A, B, C, h0, restart):
    """y, the last state (b, h, p, n) and, block by block, the states before chunks (b, chunks, g, m, p, n)."""
    x, step, A, B, C, h0 = first_derivative_only((x, step, A, B, C, h0))
    plan = _plan(x, B)
    h, firsts, outputs = _of_groups(plan, h0), [], []
    for index in range(plan.blocks):
        # Each block waits for the one before: MLX might else hold what is inside of all of them.
        waiting = mx.depends([x, step, B, C], [h, *outputs[-1:]])
        block = _block(plan, index, *waiting, A, restart)
        added = _ended(block).swapaxes(-1, -2) @ block.B
        first, h = _carried(plan, h, block.decays.through, added, range(plan.chunks))
        within = ((block.C @ block.B.swapaxes(-1, -2)) * block.decays.between) @ block.u
        y = within + block.decays.start * (block.C @ _flat(first).swapaxes(-1, -2))
        outputs.append(_merged(plan, y))
        firsts.append(first)
    return mx.concatenate(outputs, axis=1)[:, : plan.length], h.reshape(h0.shape), firsts


reverse_only(_chunked)


@_chunked.vjp
def _chunked_vjp(arguments, cotangents, outputs):
    """A block at a time from the last to the first."""
    x, step, A, B, C, h0, restart = arguments
    dy, dh, _ = cotangents
    plan = _plan(x, B)
    dh, dA, parts = _of_groups(plan, dh), mx.zeros_like(A), [()]
    for index in reversed(range(plan.blocks)):
        *waiting, grad = mx.depends([x, step, B, C, dy], [dh, dA, *parts[-1]])
        block = _block(plan, index, *waiting, A, restart)
        dh, du, dlog, dB, dC = _block_vjp(plan, block, _flat(outputs[2][index]), _heads(plan, index, grad), dh)
        inputs, steps = (_sliced(plan, index, value) for value in waiting[:2])
        du = du.reshape(inputs.shape)
        dx, dstep = du * steps[..., None], dlog * A + (du * inputs).sum(axis=-1)
        dA = dA + (dlog * steps).sum(axis=(0, 1))
        parts.append((dx, dstep, dB, dC))
    joined = (mx.concatenate(part[::-1], axis=1)[:, : plan.length] for part in zip(*parts[1:], strict=True))
    dx, dstep, dB, dC = joined
    gradients = first_derivative_only((dx, dstep, dA, dB, dC, dh.reshape(h0.shape)))
    return *gradients, None if restart is None else mx.zeros_like(restart)


def _block_vjp(plan, block, first, grad, dh):
    """(the gradients of the state before the block, of u and of the logarithms, (b, l, ...), of B and of C)."""
    u, b, c, decays = block
    started, ended = decays.start * grad, _ended(block)
    after, dh = _carried(plan, dh, decays.through, started.swapaxes(-1, -2) @ c, reversed(range(plan.chunks)))
    after = _flat(after)
    products = c @ b.swapaxes(-1, -2)
    dweights = grad @ u.swapaxes(-1, -2)
    # What the gradient of the state after the chunk gives each u.
    arriving = decays.end * (b @ after.swapaxes(-1, -2))
    du = (products * decays.between).swapaxes(-1, -2) @ grad + arriving
    dproducts = (dweights * decays.between).sum(axis=2)
    dC = (started @ first).sum(axis=2) + dproducts @ b[:, :, 0]
    dB = (ended @ after).sum(axis=2) + dproducts.swapaxes(-1, -2) @ c[:, :, 0]
    dlog = _dlog_decay(
        dweights * products * decays.between,
        (started * (c @ first.swapaxes(-1, -2))).sum(axis=-1),
        (arriving * u).sum(axis=-1),
        decays.through[..., 0] * (first * after).sum(axis=(-2, -1))[..., None],
    )
    dlog = _merged(plan, dlog[..., None]).squeeze(-1)
    return dh, _merged(plan, du), dlog, *(_merged_groups(plan, value) for value in (dB, dC))


def _ended(block):
    """What each position leaves at the chunk's end: nothing of another run, be it Inf or NaN."""
    return mx.where(block.decays.end == 0, 0.0, block.decays.end * block.u)


def _plan(x, B) -> _Plan:
    batch, length, heads, _ = x.shape
    positions = min(CHUNK, length)
    chunks = -(-length // positions)
    side_by_side = min(chunks, max(1, WIDTH[default_device()] // (batch * heads * positions**2)))
    blocks = -(-chunks // side_by_side)
    return _Plan(batch, length, blocks, -(-chunks // blocks), positions, B.shape[2])


def _block(plan, index, x, step, B, C, A, restart) -> _Block:
    step = _sliced(plan, index, step)
    u = _by_heads(plan, step[..., None] * _sliced(plan, index, x))
    log_decay = _by_heads(plan, (step * A)[..., None]).squeeze(-1)
    b, c = (_by_chunks(plan, _sliced(plan, index, value)).transpose(0, 2, 1, 3)[:, :, None] for value in (B, C))
    restart = None if restart is None else _by_chunks(plan, _sliced(plan, index, restart))
    return _Block(u, b, c, _decays(log_decay, restart))


@mx.compile
def _decays(log_decay, restart) -> _Decays:
    """From the logarithms (r, g, m, q). Sums are exact on a grid, and what is off the grid is summed by itself.

    A difference of two rounded sums would be wrong by the rounding of the larger, which one long step makes large.
    """
    length = log_decay.shape[-1]
    log_decay = mx.maximum(log_decay, LEAST_LOG)
    coarse = mx.round(log_decay * GRID) / GRID
    coarse, fine = mx.cumsum(coarse, axis=-1), mx.cumsum(log_decay - coarse, axis=-1)
    between = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    from_start, to_end = coarse + fine, between[..., -1, :]
    through = from_start[..., -1:]
    earlier = mx.tri(length, dtype=mx.int32) > 0
    if restart is not None:
        run = mx.cumsum(restart.astype(mx.int32), axis=-1)[:, None, None]
        earlier = earlier & (run[..., :, None] == run[..., None, :])
        from_start = mx.where(run > 0, -mx.inf, from_start)
        to_end = mx.where(run != run[..., -1:], -mx.inf, to_end)
        through = mx.where(run[..., -1:] > 0, -mx.inf, through)
    # Before exp, which would overflow where a later position is first.
    between = mx.where(earlier, between, -mx.inf)
    start, end, through = (exp(value)[..., None] for value in (from_start, to_end, through))
    return _Decays(exp(between), start, end, through)


def _dlog_decay(dbetween, dstart, dend, dthrough):
    """The gradient of the logarithms (r, g, m, q): each is in the decays that span its position.

    Sums of what spans it, and no differences of larger sums: after a long step next to nothing is left of them.
    """
    # Of (i, k): the sum over j < k, for k <= i.
    spanning = mx.tril(mx.cumsum(dbetween, axis=-1, inclusive=False)).sum(axis=-2)
    after, before = mx.cumsum(dstart, axis=-1, reverse=True), mx.cumsum(dend, axis=-1, inclusive=False)
    return spanning + after + before + dthrough


def _carried(plan, value, through, added, order):
    """(what enters each chunk (b, chunks, g, m, p, n), what leaves the last) in `order`, from what enters the first."""
    through, added = (part.reshape(plan.batch, plan.chunks, *part.shape[1:]) for part in (through, added))
    entering = {}
    for chunk in order:
        entering[chunk] = value
        # Where nothing passes, not even Inf and NaN do.
        passed = mx.where(through[:, chunk] == 0, 0.0, through[:, chunk] * value)
        value = passed + added[:, chunk]
    return mx.stack([entering[chunk] for chunk in range(plan.chunks)], axis=1), value


def _sliced(plan, index, value):
    """(b, l, ...) -> (b, chunks * positions, ...) of one block."""
    size = plan.chunks * plan.positions
    value = value[:, index * size : (index + 1) * size]
    return mx.pad(value, ((0, 0), (0, size - value.shape[1]), *((0, 0),) * (value.ndim - 2)))


def _by_chunks(plan, value):
    """(b, chunks * positions, ...) -> (r, q, ...)."""
    return value.reshape(plan.batch * plan.chunks, plan.positions, *value.shape[2:])


def _by_heads(plan, value):
    """(b, chunks * positions, h, p) -> (r, g, m, q, p)."""
    value = _by_chunks(plan, value)
    return value.reshape(*value.shape[:2], plan.groups, -1, value.shape[3]).transpose(0, 2, 3, 1, 4)


def _heads(plan, index, value):
    return _by_heads(plan, _sliced(plan, index, value))


def _merged(plan, value):
    """The inverse of `_by_heads`."""
    value = value.transpose(0, 3, 1, 2, 4)
    return value.reshape(plan.batch, plan.chunks * plan.positions, -1, value.shape[4])


def _merged_groups(plan, value):
    """(r, g, q, n) -> (b, chunks * positions, g, n)."""
    value = value.transpose(0, 2, 1, 3)
    return value.reshape(plan.batch, plan.chunks * plan.positions, *value.shape[2:])


def _of_groups(plan, h):
    """(b, h, p, n) -> (b, g, m, p, n)."""
    return h.reshape(h.shape[0], plan.groups, -1, *h.shape[2:])


def _flat(firsts):
    """(b, chunks, ...) -> (r, ...)."""
    return firsts.reshape(-1, *firsts.shape[2:])
