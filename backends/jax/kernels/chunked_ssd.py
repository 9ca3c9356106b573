"""The recurrence of Mamba-2 as matrix products over chunks (Dao and Gu 2024, section 6), with a gradient by hand.

Inside a chunk, y_i = sum_{j <= i} (C_i B_j) exp(a_{j+1} + ... + a_i) u_j + exp(a_1 + ... + a_i) h C_i with u = dt x and
a = dt A. The state before each chunk is kept; the gradient computes all else again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Positions of a chunk: the products of q x q grow with it, the number of operations falls.
CHUNK = 64
# exp of less is zero: the least logarithm of a decay by dtype, and the grid on which sums of a chunk's are exact.
LEAST_LOG = {"float32": -128.0, "float64": -1024.0}
GRID = {"float32": 2.0**10, "float64": 2.0**30}

# Not jnp.einsum's default: on GPU and TPU that rounds float32 to TF32 or bfloat16.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def chunked(x, step, A, B, C, h0, restart):
    """One `lax.scan` over chunks."""
    batch, length, heads, channels = x.shape
    if length == 0:
        return x, h0
    groups, states = B.shape[2:]
    chunks = -(-length // CHUNK)
    padding = -length % chunks
    count = (length + padding) // chunks

    def split(value, order):
        """(b, l, ...) -> (chunks, b, ...), the axes of a chunk (b, q, ...) in that order.

        The positions added at the end are steps of size zero.
        """
        value = jnp.pad(value, [(0, 0), (0, padding)] + [(0, 0)] * (value.ndim - 2))
        value = value.reshape(batch, chunks, count, *value.shape[2:])
        return jnp.moveaxis(value, 1, 0).transpose(0, *(axis + 1 for axis in order))

    def in_groups(value):
        return value.reshape(batch, length, groups, heads // groups, *value.shape[3:])

    inputs = (
        split(in_groups(step[..., None] * x), (0, 2, 3, 1, 4)),
        split(in_groups(step * A), (0, 2, 3, 1)),
        *(split(value, (0, 2, 1, 3)) for value in (B, C)),
        None if restart is None else split(restart, (0, 1)),
    )

    # The gradient keeps the inputs as they came and the state before each chunk.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(h, inputs):
        y, h = _chunk(*inputs[:4], h, inputs[4])
        return h, y

    h, y = lax.scan(chunk, h0.reshape(batch, groups, -1, channels, states), inputs)
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(batch, length + padding, heads, channels)
    return y[:, :length], h.reshape(h0.shape)


# --- one chunk -------------------------------------------------------------------------------------
# Axes: b batch, g groups, m heads of a group, q positions, p and n. u = dt x is (b, g, m, q, p), log_decay = dt A
# (b, g, m, q), B and C are (b, g, q, n), the state h is (b, g, m, p, n).


class _Decays(NamedTuple):
    """What passes from each position to each later one (q, q), from the state before the chunk to each position (q),
    from each position to the chunk's end (q), and through the whole chunk ()."""

    between: jax.Array
    start: jax.Array
    end: jax.Array
    through: jax.Array


@jax.custom_vjp
def _chunk(u, log_decay, B, C, h, restart):
    """(y, the state after the chunk)."""
    decays = _decays(log_decay, restart)
    weights = _einsum("bgin,bgjn->bgij", C, B)[:, :, None] * decays.between
    y = _einsum("bgmij,bgmjp->bgmip", weights, u)
    y = y + decays.start[..., None] * _einsum("bgmpn,bgin->bgmip", h, C)
    added = _einsum("bgmjp,bgjn->bgmpn", _ended(u, decays), B)
    return y, _scaled(h, decays.through) + added


def _chunk_forward(u, log_decay, B, C, h, restart):
    # The barrier keeps JAX from passing the inputs on as they are: under `jax.checkpoint` in a `lax.scan` it would take
    # one for another in a second derivative.
    return _chunk(u, log_decay, B, C, h, restart), lax.optimization_barrier((u, log_decay, B, C, h, restart))


def _chunk_backward(saved, cotangents):
    u, log_decay, B, C, h, restart = saved
    dy, dh = cotangents
    decays = _decays(log_decay, restart)
    products = _einsum("bgin,bgjn->bgij", C, B)[:, :, None]
    dweights = _einsum("bgmip,bgmjp->bgmij", dy, u)
    started, ended = decays.start[..., None] * dy, _ended(u, decays)
    # What the gradient of the state after the chunk gives each u.
    arriving = decays.end[..., None] * _einsum("bgmpn,bgjn->bgmjp", dh, B)
    du = _einsum("bgmij,bgmip->bgmjp", products * decays.between, dy) + arriving
    dproducts = (dweights * decays.between).sum(2)
    dC = _einsum("bgmip,bgmpn->bgin", started, h) + _einsum("bgij,bgjn->bgin", dproducts, B)
    dB = _einsum("bgmjp,bgmpn->bgjn", ended, dh) + _einsum("bgij,bgin->bgjn", dproducts, C)
    dlog_decay = _dlog_decay(
        dweights * products * decays.between,
        (started * _einsum("bgmpn,bgin->bgmip", h, C)).sum(-1),
        (arriving * u).sum(-1),
        decays.through * (h * dh).sum((-2, -1)),
    )
    dh = _scaled(dh, decays.through) + _einsum("bgmip,bgin->bgmpn", started, C)
    return du, dlog_decay, dB, dC, dh, None


_chunk.defvjp(_chunk_forward, _chunk_backward)


def _decays(log_decay, restart) -> _Decays:
    """Sums are exact on a grid, and what is off the grid is summed by itself.

    A difference of two rounded sums would be wrong by the rounding of the larger, which one long step makes large.
    """
    dtype, length = log_decay.dtype.name, log_decay.shape[-1]
    log_decay = jnp.maximum(log_decay, LEAST_LOG[dtype])
    coarse = jnp.round(log_decay * GRID[dtype]) / GRID[dtype]
    parts = [jnp.cumsum(part, -1) for part in (coarse, log_decay - coarse)]
    between = sum(part[..., :, None] - part[..., None, :] for part in parts)
    from_start, to_end = sum(parts), between[..., -1, :]
    through = from_start[..., -1]
    earlier = jnp.tril(jnp.ones((length, length), bool))
    if restart is not None:
        run = jnp.cumsum(restart, -1)[:, None, None]
        earlier = earlier & (run[..., :, None] == run[..., None, :])
        from_start = jnp.where(run > 0, -jnp.inf, from_start)
        to_end = jnp.where(run != run[..., -1:], -jnp.inf, to_end)
        through = jnp.where(run[..., -1] > 0, -jnp.inf, through)
    # Before exp, which would overflow where a later position is first.
    between = jnp.where(earlier, between, -jnp.inf)
    return _Decays(*map(jnp.exp, (between, from_start, to_end, through)))


def _ended(u, decays):
    """What each position leaves at the chunk's end: nothing of another run, be it Inf or NaN."""
    end = decays.end[..., None]
    return jnp.where(end == 0, 0, end * u)


def _scaled(h, through):
    """The state, each head by its decay. Where that is zero, Inf and NaN are left too."""
    through = through[..., None, None]
    return jnp.where(through == 0, 0, through * h)


def _dlog_decay(dbetween, dstart, dend, dthrough):
    """The gradient of the logarithms: each is in the decays that span its position.

    Sums of what spans it, and no differences of larger sums: after a long step next to nothing is left of them.
    """
    # Of (i, k): the sum over j < k, for k <= i.
    spanning = jnp.tril(_sums_before(dbetween)).sum(-2)
    return spanning + lax.cumsum(dstart, dstart.ndim - 1, reverse=True) + _sums_before(dend) + dthrough[..., None]


def _sums_before(value):
    """Along the last axis, the sum of all that stands before each place."""
    shifted = jnp.pad(value[..., :-1], [(0, 0)] * (value.ndim - 1) + [(1, 0)])
    return jnp.cumsum(shifted, -1)
