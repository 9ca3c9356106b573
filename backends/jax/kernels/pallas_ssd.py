"""The recurrence of Mamba-2 and its gradient on a TPU, in Pallas.

A program takes some heads of a row through the sequence, chunk after chunk, with their states in the chip's memory;
`pallas_ssd_chunk` is what it computes. The state before each chunk is kept for the gradient, which goes through the
chunks in reverse and computes all else again.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mamba_core.backends.jax.kernels import pallas_ssd_chunk as chunk
from mamba_core.backends.jax.kernels.operator import Kernel, differentiable, present
from mamba_core.backends.jax.kernels.pallas_ssd_chunk import CHUNK, LANES

PALLAS = Kernel("pallas", "tpu", "a TPU", exported=True)
ARGUMENTS = ("x", "step", "A", "B", "C", "initial_state", "mask", "restart")
DTYPES = ("float32", "bfloat16")
LARGEST_STATE = 512
# Of a program: tiles, heads unless a tile has more, and tiles times states. Its code and its memory grow with them.
MOST_TILES, MOST_HEADS, MOST_STATES = 4, 8, 1024
LEAST_WIDTH = SUBLANES = 8


def reason(platform: str, dtype=None, states: int | None = None) -> str | None:
    """Why the kernel cannot run there, for x of that dtype and so many states; None if it can."""
    if platform != "tpu":
        return "it runs on a TPU only"
    if dtype is not None and str(dtype) not in DTYPES:
        return f"x is {dtype}, and it computes {' and '.join(DTYPES)}"
    if states is not None and states > LARGEST_STATE:
        return f"d_state is {states}, and it holds at most {LARGEST_STATE}"
    return None


def beside(plain: Callable, interpret: bool = False) -> Callable:
    """run(x, step, A, B, C, h0, restart, portable) -> (y, the last h): y of x's dtype, the last h float32.

    B and C have the dtype of x, and step, A and h0 are float32.

    plain(x, step, A, B, C, h0, restart): its twin in float32. interpret: runs on any device.
    """
    kernel = PALLAS._replace(platform="cpu") if interpret else PALLAS
    calls = (functools.partial(call, interpret) for call in (_forward, _backward))

    def twin(x, step, A, B, C, h0, mask, restart):
        y, h = plain(x.astype(step.dtype), step, A, B.astype(step.dtype), C.astype(step.dtype), h0, restart)
        return y.astype(x.dtype), h

    run = differentiable(kernel, "ssd", *calls, ARGUMENTS, twin, kept=[_boundaries])

    def recurrence(x, step, A, B, C, h0, restart, portable=False):
        if not all(isinstance(size, int) for size in x.shape) or x.shape[1] == 0:
            return twin(x, step, A, B, C, h0, None, restart)
        whole = functools.partial(_padded, axis=3, size=-(-B.shape[3] // SUBLANES) * SUBLANES)
        pieces = -(-x.shape[3] // LANES)
        of_heads = (_cut(x, 3, pieces), *(jnp.repeat(value, pieces, -1) for value in (step, A)))
        state = _cut(whole(h0), 2, pieces)
        y, h = run(*of_heads, whole(B), whole(C), state, None, restart, portable=portable)
        return _joined(y, 3, x.shape), _joined(h, 2, h0.shape)[..., : B.shape[3]]

    return recurrence


def _cut(value, axis: int, pieces: int):
    """Channels on that axis, after the heads, as so many heads for each: one has a tile's lanes at most."""
    value = _padded(value, axis, -(-value.shape[axis] // pieces) * pieces)
    *before, heads, channels = value.shape[: axis + 1]
    return value.reshape(*before, heads * pieces, channels // pieces, *value.shape[axis + 1 :])


def _joined(value, axis: int, shape):
    """The inverse of `_cut`."""
    value = value.reshape(*shape[:axis], -1, *value.shape[axis + 1 :])
    return jax.lax.slice_in_dim(value, 0, shape[axis], axis=axis)


def _boundaries(x, step, A, B, *_):
    """The shape of the states before every chunk."""
    b, l, heads, channels = x
    return b, -(-l // CHUNK), B[3], heads * channels


def _forward(interpret, returned, *arrays, keep):
    x, step, A, B, C, h0, _, restart = map(present, arrays)
    plan = _Plan(x.shape, *B.shape[2:])
    inputs = [*plan.inputs(x, step, step * A, B, C, restart), (plan.state, plan.states_of(h0))]
    outputs = [(plan.sequence, plan.shape, x.dtype), (plan.state, plan.state_shape, jnp.float32)]
    outputs += [(plan.boundary, plan.boundary_shape, jnp.float32)] if keep else []
    kernel = functools.partial(chunk.forward, width=plan.width, restarts=restart is not None, keeps=keep)
    y, h, *kept = plan.call(kernel, inputs, outputs, interpret)
    kept = [plan.unpadded(value, 3) for value in kept] or [jnp.zeros(0, jnp.float32)]
    return plan.unpadded(y, 2)[:, : plan.length].reshape(x.shape), plan.state_of(h), *kept


def _backward(interpret, returned, *arrays):
    *arrays, boundaries, dy, dh = arrays
    x, step, A, B, C, _, _, restart = map(present, arrays)
    plan = _Plan(x.shape, *B.shape[2:], reverse=True)
    inputs = [
        *plan.inputs(x, step, step * A, B, C, restart),
        (plan.sequence, plan.channels_of(dy)),
        (plan.boundary, plan.padded(boundaries, 3)),
        (plan.state, plan.states_of(dh)),
    ]
    outputs = [(plan.sequence, plan.shape, x.dtype)] + [(plan.rows, plan.rows_shape, jnp.float32)] * 2
    outputs += [(plan.part, plan.part_shape, jnp.float32)] * 2 + [(plan.state, plan.state_shape, jnp.float32)]
    kernel = functools.partial(chunk.backward, width=plan.width, restarts=restart is not None)
    dx, dstep, dlog, dB, dC, dh = plan.call(kernel, inputs, outputs, interpret)
    dstep, dlog = map(plan.steps_of, (dstep, dlog))
    dx = plan.unpadded(dx, 2)[:, : plan.length].reshape(x.shape)
    dB, dC = map(plan.groups_of, (dB, dC))
    gradients = [dx, dstep + dlog * A, (dlog * step).sum((0, 1)), dB, dC, plan.state_of(dh)]
    return [gradient.astype(value.dtype) for gradient, value in zip(gradients, returned, strict=True)]


class _Plan:
    """How arrays are padded and divided: a head's channels to lanes that divide a tile, a group's heads to whole tiles.

    States are (..., n, lanes) here, and steps (b, blocks, heads, l).
    """

    def __init__(self, shape, groups: int, states: int, reverse: bool = False):
        self.batch, self.length, self.heads, self.channels = shape
        self.groups, self.states, self.reverse = groups, states, reverse
        self.chunks = -(-self.length // CHUNK)
        self.width = max(LEAST_WIDTH, 1 << (self.channels - 1).bit_length())
        in_tile = LANES // self.width
        tiles = -(-self.heads // groups // in_tile)
        most = max(1, min(MOST_TILES, MOST_HEADS // in_tile, MOST_STATES // states))
        self.tiles = max(count for count in range(1, most + 1) if tiles % count == 0)
        self.of_block = self.tiles * in_tile
        self.of_group = tiles // self.tiles
        self.blocks = groups * self.of_group

    @property
    def lanes(self) -> int:
        return self.blocks * self.tiles * LANES

    @property
    def shape(self):
        return self.batch, self.chunks * CHUNK, self.lanes

    @property
    def state_shape(self):
        return self.batch, self.states, self.lanes

    @property
    def boundary_shape(self):
        return self.batch, self.chunks, self.states, self.lanes

    @property
    def rows_shape(self):
        """Heads of a block fill up sublanes."""
        return self.batch, self.blocks, -(-self.of_block // SUBLANES) * SUBLANES, self.chunks * CHUNK

    @property
    def part_shape(self):
        """The shape of sums over the heads of each block."""
        return self.batch, self.blocks, self.chunks * CHUNK, self.states

    @property
    def sequence(self):
        return pl.BlockSpec((None, CHUNK, self.tiles * LANES), lambda b, e, c: (b, self._place(c), e))

    @property
    def rows(self):
        return pl.BlockSpec((None, None, self.rows_shape[2], CHUNK), lambda b, e, c: (b, e, 0, self._place(c)))

    @property
    def state(self):
        return pl.BlockSpec((None, self.states, self.tiles * LANES), lambda b, e, c: (b, 0, e))

    @property
    def boundary(self):
        return pl.BlockSpec((None, None, self.states, self.tiles * LANES), lambda b, e, c: (b, self._place(c), 0, e))

    @property
    def part(self):
        return pl.BlockSpec((None, None, CHUNK, self.states), lambda b, e, c: (b, e, self._place(c), 0))

    def inputs(self, x, step, log_decay, B, C, restart) -> list[tuple[pl.BlockSpec, jax.Array]]:
        """The first inputs of both kernels. Padded positions and heads have steps of zero."""

        def of_block(b, e, c):
            # Not `//`, which asks for the chip's generation where it is lowered.
            return b, jax.lax.div(e, jnp.asarray(self.of_group, e.dtype)), self._place(c), 0

        shared = pl.BlockSpec((None, None, CHUNK, self.states), of_block)
        pairs = [(self.sequence, self.channels_of(x))]
        pairs += [(self.rows, self._rows_of(value)) for value in (step, log_decay)]
        pairs += [(shared, jnp.moveaxis(self._whole(value), 2, 1)) for value in (B, C)]
        if restart is not None:
            run = jnp.cumsum(self._whole(restart).reshape(self.batch, self.chunks, CHUNK), 2, jnp.float32)
            spec = pl.BlockSpec((None, 1, CHUNK), lambda b, e, c: (b, 0, self._place(c)))
            pairs += [(spec, run.reshape(self.batch, 1, -1))]
        return pairs

    def call(self, kernel, inputs, outputs, interpret) -> list[jax.Array]:
        specs, arrays = zip(*inputs, strict=True)
        return pl.pallas_call(
            kernel,
            grid=(self.batch, self.blocks, self.chunks),
            in_specs=specs,
            out_specs=[spec for spec, *_ in outputs],
            out_shape=[jax.ShapeDtypeStruct(*each) for _, *each in outputs],
            scratch_shapes=[pltpu.VMEM((self.states, self.tiles * LANES), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(*arrays)

    def channels_of(self, value):
        """(b, l, h, p) as (b, padded l, lanes)."""
        return self.padded(self._whole(value.reshape(*value.shape[:2], -1)), 2)

    def states_of(self, state):
        """(b, h, p, n) as (b, n, lanes)."""
        return self.padded(state.reshape(self.batch, -1, self.states).mT, 2)

    def state_of(self, state):
        return self.unpadded(state, 2).mT.reshape(self.batch, self.heads, self.channels, self.states)

    def padded(self, value, axis: int):
        """Heads and channels, which the last axis has together, as lanes."""
        value = value.reshape(*value.shape[:axis], self.groups, self.heads // self.groups, self.channels)
        value = _padded(_padded(value, axis + 1, self.of_group * self.of_block), axis + 2, self.width)
        return value.reshape(*value.shape[:axis], -1)

    def unpadded(self, value, axis: int):
        value = value.reshape(*value.shape[:axis], self.groups, -1, self.width)
        value = value[..., : self.heads // self.groups, : self.channels]
        return value.reshape(*value.shape[:axis], -1)

    def steps_of(self, rows):
        """The inverse of `_rows_of`."""
        value = rows[:, :, : self.of_block, : self.length].reshape(self.batch, self.groups, -1, self.length)
        return value[:, :, : self.heads // self.groups].reshape(self.batch, -1, self.length).mT

    def groups_of(self, parts):
        """(b, l, g, n) of sums over the heads of each block."""
        value = parts.reshape(self.batch, self.groups, self.of_group, *parts.shape[2:]).sum(2)
        return jnp.moveaxis(value, 1, 2)[:, : self.length]

    def _rows_of(self, value):
        """(b, l, h) as (b, blocks, heads, l)."""
        value = self._whole(value).mT.reshape(self.batch, self.groups, -1, self.chunks * CHUNK)
        value = _padded(value, 2, self.of_group * self.of_block).reshape(self.batch, self.blocks, self.of_block, -1)
        return _padded(value, 2, self.rows_shape[2])

    def _whole(self, value):
        """With the positions that fill up the last chunk."""
        return _padded(value, 1, self.chunks * CHUNK)

    def _place(self, number):
        return self.chunks - 1 - number if self.reverse else number


def _padded(value, axis: int, size: int):
    return jnp.pad(value, [(0, size - value.shape[axis] if place == axis else 0) for place in range(value.ndim)])
