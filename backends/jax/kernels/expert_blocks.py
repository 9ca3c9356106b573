"""Experts on a CPU: one after the other, each in blocks of its own rows, by the products that XLA has."""

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a block: as many as fill a processor, and few enough that little is computed in vain at an expert's end.
ROWS = 64


def gated(both):
    """silu(gate) * up of gate | up, (..., 2 i)."""
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def products(x, sizes, gate_up, down):
    """down_e (silu(gate_e x) * up_e x), (n, d), at least in float32.

    x: (n, d), sorted by expert. sizes: (experts,), how many rows each has.
    """
    count, wide = _rows(x), jnp.promote_types(x.dtype, jnp.float32)
    padded = jnp.pad(x, ((0, count), (0, 0)))

    def expert(y, inputs):
        start, end, gate_up, down = inputs
        gate_up, down = gate_up.astype(wide), down.astype(wide)

        def block(at, y):
            active = gated(lax.dynamic_slice_in_dim(padded, at, count).astype(wide) @ gate_up.T)
            # What is beyond the expert's rows is written again by the experts after it.
            return lax.dynamic_update_slice_in_dim(y, active @ down.T, at, 0)

        return _over(start, end, count, block, y), None

    y, _ = lax.scan(expert, jnp.zeros(padded.shape, wide), (*_bounds(sizes), gate_up, down))
    return y[: x.shape[0]]


def _forward(x, sizes, gate_up, down):
    return products(x, sizes, gate_up, down), (x, sizes, gate_up, down)


def _backward(saved, dy):
    """Of each block again."""
    x, sizes, gate_up, down = saved
    count, wide = _rows(x), dy.dtype
    x, dy = (jnp.pad(value, ((0, count), (0, 0))) for value in (x, dy))

    def expert(dx, inputs):
        start, end, gate_up, down = inputs
        gate_up, down = gate_up.astype(wide), down.astype(wide)

        def block(at, found):
            dx, dgate_up, ddown = found
            own = (at + jnp.arange(count) < end)[:, None]
            rows, dout = (
                jnp.where(own, lax.dynamic_slice_in_dim(value, at, count), 0).astype(wide) for value in (x, dy)
            )
            active, pullback = jax.vjp(gated, rows @ gate_up.T)
            (dboth,) = pullback(dout @ down)
            dx = lax.dynamic_update_slice_in_dim(dx, dboth @ gate_up, at, 0)
            return dx, dgate_up + dboth.T @ rows, ddown + dout.T @ active

        zeros = (jnp.zeros_like(gate_up), jnp.zeros_like(down))
        dx, dgate_up, ddown = _over(start, end, count, block, (dx, *zeros))
        return dx, (dgate_up, ddown)

    bounds = _bounds(sizes)
    dx, of_weights = lax.scan(expert, jnp.zeros(x.shape, wide), (*bounds, gate_up, down))
    dgate_up, ddown = (value.astype(weight.dtype) for value, weight in zip(of_weights, (gate_up, down), strict=True))
    return dx[: saved[0].shape[0]].astype(x.dtype), None, dgate_up, ddown


products.defvjp(_forward, _backward)


def _rows(x) -> int:
    return min(ROWS, -(-x.shape[0] // 16) * 16)


def _bounds(sizes):
    ends = jnp.cumsum(sizes)
    return ends - sizes, ends


def _over(start, end, count, block, found):
    """block(at, found) for every block of so many rows from start to end."""
    run = lambda carry: (carry[0] + count, block(*carry))  # noqa: E731
    return lax.while_loop(lambda carry: carry[0] < end, run, (start, found))[1]
