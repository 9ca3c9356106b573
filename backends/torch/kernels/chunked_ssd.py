"""The recurrence of Mamba-2 as matrix products over chunks (Dao and Gu 2024, section 6), as an operator.

Inside a chunk, y_i = sum_{j <= i} (C_i B_j) exp(a_{j+1} + ... + a_i) u_j + exp(a_1 + ... + a_i) h C_i with u = dt x and
a = dt A. The state before each chunk is kept; the gradient, by hand, computes all else again. No array of
(positions, positions) outlives its chunk.

Axes: b batch, g groups, m heads of a group, q positions of a chunk, p and n.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels.operator import differentiable, refuse_tangents

# Positions of a chunk: the products of q x q grow with it, the number of operations falls.
CHUNK = 64
# exp of less is zero: the least logarithm of a decay by dtype, and the grid on which sums of a chunk's are exact.
LEAST_LOG = {torch.float32: -128.0, torch.float64: -1024.0}
GRID = {torch.float32: 2.0**10, torch.float64: 2.0**30}


class _Decays(NamedTuple):
    """Of a chunk, (b, g, m, ...): what passes from each position to each later one (q, q), from the state before the
    chunk to each position (q), from each position to the chunk's end (q), and through the whole chunk (1)."""

    between: Tensor
    start: Tensor
    end: Tensor
    through: Tensor


@torch.library.custom_op("mamba_core::ssd", mutates_args=())
def _ssd(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, restart: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h_last, boundaries): boundaries (chunks + 1, b, g, m * p, n) holds the state before and after every chunk."""
    refuse_tangents(x, step, A, B, C, h0)
    y, boundaries = x.new_empty(x.shape), _empty_boundaries(x, B)
    boundaries[0] = h0.reshape(boundaries[0].shape)
    with torch.autocast(x.device.type, enabled=False):
        for index, part in enumerate(_parts(x)):
            u, b, c, decays = _chunk(x, step, A, B, C, restart, part)
            h = boundaries[index]
            weights = _per_head(c @ b.mT) * decays.between
            value = (weights @ u.transpose(2, 3)).transpose(2, 3)
            value += decays.start.mT[..., None] * (c @ h.mT).view(u.shape)
            y[:, part] = value.transpose(1, 2).reshape(y[:, part].shape)
            boundaries[index + 1] = _scaled(h, decays.through) + _ended(u, decays).flatten(3).mT @ b
    return y, boundaries[-1].reshape(h0.shape).clone(), boundaries


@torch.library.custom_op("mamba_core::ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor,
    dh_last: Tensor | None,
    boundaries: Tensor,
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    restart: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, step, A, B, C and h0."""
    dx, dstep, dB, dC = (torch.empty_like(value) for value in (x, step, B, C))
    dA = torch.zeros_like(A)
    dh = torch.zeros_like(boundaries[0]) if dh_last is None else dh_last.reshape(boundaries[0].shape)
    with torch.autocast(x.device.type, enabled=False):
        for index, part in reversed(list(enumerate(_parts(x)))):
            u, b, c, decays = _chunk(x, step, A, B, C, restart, part)
            h, grad = boundaries[index], _grouped(dy[:, part], u.shape)
            products = _per_head(c @ b.mT)
            grad_heads, u_heads = grad.transpose(2, 3), u.transpose(2, 3)
            dweights = grad_heads @ u_heads.mT
            started = decays.start.mT[..., None] * grad
            ended = _ended(u, decays)
            # What the gradient of the state after the chunk gives each u.
            arriving = decays.end.mT[..., None] * (b @ dh.mT).view(u.shape)
            du = ((products * decays.between).mT @ grad_heads).transpose(2, 3) + arriving
            dproducts = (dweights * decays.between).sum(2)
            dC[:, part] = (started.flatten(3) @ h + dproducts @ b).transpose(1, 2)
            dB[:, part] = (ended.flatten(3) @ dh + dproducts.mT @ c).transpose(1, 2)
            dlog = _dlog_decay(
                dweights * products * decays.between,
                (started * (c @ h.mT).view(u.shape)).sum(-1).mT,
                (arriving * u).sum(-1).mT,
                decays.through[..., 0] * (h * dh).view(*decays.through.shape[:3], -1).sum(-1),
            )
            dlog, du = (value.transpose(1, 2) for value in (dlog.mT, du))
            dlog, du = dlog.reshape(dstep[:, part].shape), du.reshape(dx[:, part].shape)
            dx[:, part] = du * step[:, part, :, None]
            dstep[:, part] = dlog * A + (du * x[:, part]).sum(-1)
            dA += (dlog * step[:, part]).sum((0, 1))
            dh = _scaled(dh, decays.through) + started.flatten(3).mT @ c
    return [dx, dstep, dA, dB, dC, dh.reshape(h0.shape).clone()]


@_ssd.register_fake
def _(x, step, A, B, C, h0, restart):
    return x.new_empty(x.shape), h0.new_empty(h0.shape), _empty_boundaries(x, B)


@_ssd_backward.register_fake
def _(dy, dh_last, boundaries, x, step, A, B, C, h0, restart):
    return [value.new_empty(value.shape) for value in (x, step, A, B, C, h0)]


chunked = differentiable(_ssd, _ssd_backward)


def _parts(x):
    return [slice(start, start + CHUNK) for start in range(0, x.shape[1], CHUNK)]


def _empty_boundaries(x, B):
    batch, length, heads, channels = x.shape
    groups, states = B.shape[2:]
    return x.new_empty(-(-length // CHUNK) + 1, batch, groups, heads // groups * channels, states)


def _chunk(x, step, A, B, C, restart, part):
    """(u, B, C, decays) of a chunk: u (b, g, q, m, p), B and C (b, g, q, n)."""
    step = step[:, part]
    b, c = (value[:, part].transpose(1, 2) for value in (B, C))
    batch, groups, length, _ = b.shape
    u = _grouped(step[..., None] * x[:, part], (batch, groups, length, -1, x.shape[3]))
    log_decay = (step * A).view(batch, length, groups, -1).permute(0, 2, 3, 1)
    return u, b, c, _decays(log_decay, None if restart is None else restart[:, part])


def _decays(log_decay, restart) -> _Decays:
    """From the logarithms (b, g, m, q). Sums are exact on a grid, and what is off the grid is summed by itself.

    A difference of two rounded sums would be wrong by the rounding of the larger, which one long step makes large.
    """
    dtype, length = log_decay.dtype, log_decay.shape[-1]
    log_decay = log_decay.clamp(min=LEAST_LOG[dtype])
    coarse = torch.round(log_decay * GRID[dtype]) / GRID[dtype]
    sums = torch.stack((coarse, log_decay - coarse)).cumsum(-1)
    differences = sums[..., :, None] - sums[..., None, :]
    between, from_start = differences[0] + differences[1], sums[0] + sums[1]
    earlier = log_decay.new_ones(length, length, dtype=torch.bool).tril()
    to_end, through = between[..., -1, :], from_start[..., -1:]
    if restart is not None:
        run = restart.cumsum(-1)[:, None, None]
        earlier = earlier & (run[..., :, None] == run[..., None, :])
        from_start = from_start.masked_fill(run > 0, -torch.inf)
        to_end = to_end.masked_fill(run != run[..., -1:], -torch.inf)
        through = through.masked_fill(run[..., -1:] > 0, -torch.inf)
    # Before exp, which would overflow where a later position is first.
    between = between.masked_fill(~earlier, -torch.inf)
    return _Decays(between.exp_(), from_start.exp(), to_end.exp(), through.exp())


def _dlog_decay(dbetween, dstart, dend, dthrough):
    """The gradient of the logarithms (b, g, m, q): each is in the decays that span its position.

    Sums of what spans it, and no differences of larger sums: after a long step next to nothing is left of them.
    """
    # Of (i, k): the sum over j < k, for k <= i.
    spanning = _sums_before(dbetween).tril().sum(-2)
    after = dstart.flip(-1).cumsum(-1).flip(-1)
    return spanning + after + _sums_before(dend) + dthrough[..., None]


def _sums_before(value):
    """Along the last axis, the sum of all that stands before each place."""
    return F.pad(value, (1, -1)).cumsum(-1)


def _grouped(value, shape):
    """(b, q, h, p) -> (b, g, q, m, p)."""
    batch, groups, length, _, channels = shape
    return value.reshape(batch, length, groups, -1, channels).transpose(1, 2)


def _per_head(products):
    """(b, g, q, q) -> (b, g, 1, q, q)."""
    return products[:, :, None]


def _ended(u, decays):
    """What each position leaves at the chunk's end, (b, g, q, m, p): nothing of another run, be it Inf or NaN."""
    end = decays.end.mT[..., None]
    return (end * u).masked_fill_(end == 0, 0.0)


def _scaled(h, through):
    """The state (b, g, m * p, n), each head by its decay (b, g, m, 1). Where that is zero, Inf and NaN are left too."""
    heads = h.view(*through.shape[:3], -1)
    return (heads * through).masked_fill_(through == 0, 0.0).view(h.shape)
