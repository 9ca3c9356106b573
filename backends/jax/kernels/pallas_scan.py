"""The recurrence and its gradient on a TPU, in Pallas.

Channels lie along lanes and states along sublanes. A program takes some channels of a row through a chunk of the
sequence, chunk after chunk, with the state in the chip's memory. The gradient goes through them in reverse and computes
a chunk's states again from the one before it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mamba_core.backends.jax.kernels.operator import Kernel, differentiable, present

PALLAS = Kernel("pallas", "tpu", "a TPU", exported=True)
ARGUMENTS = ("x", "step", "A", "B", "C", "initial_state", "mask", "restart")
# Positions of a chunk: B and C lie in memory with positions along lanes.
CHUNK = LANES = 128
# Bytes of a chunk's states that the gradient holds, and more states than it can hold of one tile of channels.
HELD, LARGEST_STATE = 4 << 20, 128


def reason(platform: str, dtype=None, states: int | None = None) -> str | None:
    """Why the kernel cannot run there, for x of that dtype and so many states; None if it can."""
    if platform != "tpu":
        return "it runs on a TPU only"
    if dtype is not None and str(dtype) not in ("float32", "bfloat16"):
        return f"x is {dtype}, and it computes float32 and bfloat16"
    if states is not None and states > LARGEST_STATE:
        return f"d_state is {states}, and it holds at most {LARGEST_STATE}"
    return None


def beside(plain: Callable, interpret: bool = False) -> Callable:
    """run(x, step, A, B, C, h0, restart, portable) -> (sum_n C h, the last h), all of float32 but restart.

    plain(x, step, A, B, C, h0, mask, restart): its twin, with a mask that is None. interpret: runs on any device.
    """
    kernel = PALLAS._replace(platform="cpu") if interpret else PALLAS
    calls = (functools.partial(call, interpret) for call in (_forward, _backward))
    run = differentiable(kernel, "scan", *calls, ARGUMENTS, plain, kept=[_boundaries])

    def recurrence(x, step, A, B, C, h0, restart, portable=False):
        if not all(isinstance(size, int) for size in x.shape) or x.shape[1] == 0:
            return plain(x, step, A, B, C, h0, None, restart)
        return run(x, step, A, B, C, h0, None, restart, portable=portable)

    return recurrence


def _boundaries(x, step, A, *_):
    """The shape of the states before every chunk."""
    b, l, e = x
    return b, -(-l // CHUNK), A[1], e


def _forward(interpret, returned, *arrays, keep):
    x, step, A, B, C, h0, _, restart = map(present, arrays)
    plan = _Plan(x.shape, A.shape[1])
    inputs = [*plan.inputs(x, step, A, B, C, restart), (plan.state, plan.padded_state(h0))]
    outputs = [(plan.sequence, plan.shape), (plan.state, plan.state_shape)]
    outputs += [(plan.boundary, plan.boundary_shape)] if keep else []
    scratch = [pltpu.VMEM((plan.states, plan.lanes), jnp.float32)]
    kernel = functools.partial(_forward_kernel, restarts=restart is not None, keeps=keep)
    linear, h, *kept = plan.call(kernel, inputs, outputs, scratch, interpret)
    kept = [value[:, :, :, : plan.channels] for value in kept] or [jnp.zeros(0, jnp.float32)]
    return linear[:, : plan.length, : plan.channels], plan.unpadded_state(h), *kept


def _backward(interpret, returned, *arrays):
    *arrays, boundaries, dlinear, dh = arrays
    x, step, A, B, C, _, _, restart = map(present, arrays)
    plan = _Plan(x.shape, A.shape[1], reverse=True)
    inputs = [
        *plan.inputs(x, step, A, B, C, restart),
        (plan.sequence, plan.padded(dlinear)),
        (plan.boundary, jnp.pad(boundaries, [(0, 0)] * 3 + [(0, plan.extra_channels)])),
        (plan.state, plan.padded_state(dh)),
    ]
    outputs = (
        [(plan.sequence, plan.shape)] * 2 + [(plan.part, plan.part_shape)] * 2 + [(plan.state, plan.state_shape)] * 2
    )
    scratch = [pltpu.VMEM((plan.states, plan.lanes), jnp.float32)] * 2
    scratch += [pltpu.VMEM((plan.chunk, plan.states, plan.lanes), jnp.float32)]
    kernel = functools.partial(_backward_kernel, restarts=restart is not None)
    dx, dstep, dB, dC, dA, dh = plan.call(kernel, inputs, outputs, scratch, interpret)
    dx, dstep = (value[:, : plan.length, : plan.channels] for value in (dx, dstep))
    dB, dC = (jnp.moveaxis(value.sum(1), 1, 2)[:, : plan.length] for value in (dB, dC))
    gradients = [dx, dstep, dA.sum(0)[:, : plan.channels].T, dB, dC, plan.unpadded_state(dh)]
    return [gradient.astype(value.dtype) for gradient, value in zip(gradients, returned, strict=True)]


def _forward_kernel(*refs, restarts, keeps):
    x, step, A, B, C, *refs = refs
    restart, refs = (refs[0], refs[1:]) if restarts else (None, refs)
    h0, linear, last, *refs = refs
    kept, (state,) = (refs[0], refs[1:]) if keeps else (None, refs)
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        state[...] = h0[...]

    if keeps:
        kept[...] = state[...]
    rates = A[...]

    def position(t, carry):
        h, B, C = carry
        h = _advanced(h, x, step, B, rates, restart, t)
        linear[pl.ds(t, 1), :] = jnp.sum(h * C[:, :1], axis=0, keepdims=True)
        return h, _next(B), _next(C)

    h, _, _ = lax.fori_loop(0, x.shape[0], position, (state[...], B[...], C[...]))
    state[...] = h
    last[...] = h


def _backward_kernel(*refs, restarts):
    """As `mamba_core.spec.ops.selective_scan.selective_scan_vjp`."""
    x, step, A, B, C, *refs = refs
    restart, refs = (refs[0], refs[1:]) if restarts else (None, refs)
    dlinear, boundary, dlast, dx, dstep, dB, dC, dA, dh0, passed, dA_sum, history = refs
    chunk, length = pl.program_id(2), x.shape[0]

    @pl.when(chunk == 0)
    def _():
        passed[...] = dlast[...]
        dA_sum[...] = jnp.zeros_like(dA_sum)

    rates = A[...]

    def forwards(t, carry):
        h, B = carry
        history[t] = h
        return _advanced(h, x, step, B, rates, restart, t), _next(B)

    h, _ = lax.fori_loop(0, length, forwards, (boundary[...], B[...]))
    lane = lax.broadcasted_iota(jnp.int32, dB.shape, 1)

    def backwards(index, carry):
        t = length - 1 - index
        g, dA_all, h, B, C, dB_all, dC_all = carry
        B_t, C_t = B[:, :1], C[:, :1]
        x_t, step_t, dlinear_t = (ref[pl.ds(t, 1), :] for ref in (x, step, dlinear))
        before = history[t]
        g = g + dlinear_t * C_t
        passing = _passed(g * jnp.exp(step_t * rates), restart, t)
        dlog_decay = passing * _passed(before, restart, t)
        gB = jnp.sum(g * B_t, axis=0, keepdims=True)
        dx[pl.ds(t, 1), :] = gB * step_t
        dstep[pl.ds(t, 1), :] = jnp.sum(dlog_decay * rates, axis=0, keepdims=True) + gB * x_t
        dB_t = jnp.sum(g * (step_t * x_t), axis=1, keepdims=True)
        dC_t = jnp.sum(h * dlinear_t, axis=1, keepdims=True)
        dB_all, dC_all = jnp.where(lane == t, dB_t, dB_all), jnp.where(lane == t, dC_t, dC_all)
        return passing, dA_all + dlog_decay * step_t, before, _next(B, -1), _next(C, -1), dB_all, dC_all

    zeros = jnp.zeros(dB.shape, jnp.float32)
    carry = (passed[...], dA_sum[...], h, _next(B[...], -1), _next(C[...], -1), zeros, zeros)
    g, dA_all, _, _, _, dB_all, dC_all = lax.fori_loop(0, length, backwards, carry)
    passed[...], dA_sum[...] = g, dA_all
    dB[...], dC[...] = dB_all, dC_all
    dA[...], dh0[...] = dA_all, g


def _advanced(h, x, step, B, rates, restart, t):
    """The state after position t, of which B holds the first column."""
    x_t, step_t = x[pl.ds(t, 1), :], step[pl.ds(t, 1), :]
    return jnp.exp(step_t * rates) * _passed(h, restart, t) + (step_t * x_t) * B[:, :1]


def _passed(h, restart, t):
    """The value, or zero at a restart, so that not even Inf and NaN pass it."""
    return h if restart is None else jnp.where(restart[0, t] != 0, 0.0, h)


def _next(columns, by=1):
    """The columns with the next one first, or with by=-1 the one before."""
    return pltpu.roll(columns, -by % columns.shape[1], 1)


class _Plan:
    """How arrays are padded and divided. States are (..., n, e) here."""

    def __init__(self, shape, states: int, reverse: bool = False):
        self.batch, self.length, self.channels = shape
        self.states, self.chunk = states, CHUNK
        self.chunks = -(-self.length // CHUNK)
        self.extra_positions = self.chunks * CHUNK - self.length
        self.extra_channels = -self.channels % LANES
        tiles = (self.channels + self.extra_channels) // LANES
        most = max(1, HELD // (4 * CHUNK * states * LANES))
        self.lanes = LANES * max(count for count in range(1, tiles + 1) if tiles % count == 0 and count <= most)
        self.blocks = tiles * LANES // self.lanes
        self.reverse = reverse

    @property
    def shape(self):
        return self.batch, self.chunks * CHUNK, self.blocks * self.lanes

    @property
    def state_shape(self):
        return self.batch, self.states, self.blocks * self.lanes

    @property
    def boundary_shape(self):
        return self.batch, self.chunks, self.states, self.blocks * self.lanes

    @property
    def part_shape(self):
        """The shape of sums over the channels of each block."""
        return self.batch, self.blocks, self.states, self.chunks * CHUNK

    @property
    def sequence(self):
        return pl.BlockSpec((None, CHUNK, self.lanes), lambda b, e, c: (b, self._place(c), e))

    @property
    def state(self):
        return pl.BlockSpec((None, self.states, self.lanes), lambda b, e, c: (b, 0, e))

    @property
    def boundary(self):
        return pl.BlockSpec((None, None, self.states, self.lanes), lambda b, e, c: (b, self._place(c), 0, e))

    @property
    def part(self):
        return pl.BlockSpec((None, None, self.states, CHUNK), lambda b, e, c: (b, e, 0, self._place(c)))

    def inputs(self, x, step, A, B, C, restart) -> list[tuple[pl.BlockSpec, jax.Array]]:
        """The first inputs of both kernels. Padded positions and channels have steps of zero."""
        rates = jnp.pad(A.T, [(0, 0), (0, self.extra_channels)])
        by_state = pl.BlockSpec((None, self.states, CHUNK), lambda b, e, c: (b, 0, self._place(c)))
        pairs = [(self.sequence, self.padded(x)), (self.sequence, self.padded(step))]
        pairs += [(pl.BlockSpec((self.states, self.lanes), lambda b, e, c: (0, e)), rates)]
        pairs += [(by_state, self._with_positions_last(value)) for value in (B, C)]
        if restart is not None:
            scalars = pl.BlockSpec((None, 1, CHUNK), lambda b, e, c: (b, 0, self._place(c)), memory_space=pltpu.SMEM)
            flags = jnp.pad(restart.astype(jnp.int32), [(0, 0), (0, self.extra_positions)])
            pairs += [(scalars, flags[:, None])]
        return pairs

    def call(self, kernel, inputs, outputs, scratch, interpret) -> list[jax.Array]:
        specs, arrays = zip(*inputs, strict=True)
        out_specs, shapes = zip(*outputs, strict=True)
        return pl.pallas_call(
            kernel,
            grid=(self.batch, self.blocks, self.chunks),
            in_specs=specs,
            out_specs=list(out_specs),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(*arrays)

    def padded(self, value):
        return jnp.pad(value, [(0, 0), (0, self.extra_positions), (0, self.extra_channels)])

    def padded_state(self, state):
        """(b, e, n) as (b, n, e)."""
        return jnp.pad(state.mT, [(0, 0), (0, 0), (0, self.extra_channels)])

    def unpadded_state(self, state):
        return state[:, :, : self.channels].mT

    def _with_positions_last(self, value):
        return jnp.pad(value.mT, [(0, 0), (0, 0), (0, self.extra_positions)])

    def _place(self, chunk):
        return self.chunks - 1 - chunk if self.reverse else chunk
