"""The S6 recurrence in JAX (Gu and Dao 2023, equations 2 and 4): position by position, and by chunks.

By chunks, only the state before each chunk is kept; the gradient computes the other states again. Inside a chunk the
channels come last and the states before them, as vector units and TPU tiles want.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mamba_core.backends.jax.arrays import PLATFORMS
from mamba_core.backends.jax.kernels import cuda_scan, native_scan, pallas_scan
from mamba_core.backends.jax.kernels.operator import HOMES
from mamba_core.backends.jax.kernels.operator import reason as why_not_native
from mamba_core.backends.jax.positions import call_of, where_counting
from mamba_core.kernels import choose
from mamba_core.spec.ops.selective_scan import LEAST, check_scan, check_step

# On a CPU a chunk's (t, b, n, e) arrays should stay in cache; elsewhere few and large operations pay.
LOOP_CHUNK = 16
TREE_CHUNK = 256

# Not jnp.einsum's default: on GPU and TPU that rounds float32 to TF32 or bfloat16.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


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
    """kernel="auto" is resolved for the platform that the computation is lowered for, also by `jax.export`."""
    check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids)
    y, h = scan(
        call_of(mask, segment_ids, length=x.shape[1]),
        *(x, delta, A, B, C, D),
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        kernel=kernel,
    )
    return (y, h) if return_final_state else y


def scan(
    call, x, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, initial_state=None, kernel="auto"
):
    """`selective_scan` in a call whose positions are known: (y, final state)."""
    check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, call.mask, call.segment_ids)
    if kernel != "auto":
        kernel = PLAIN if kernel == "plain" else _that_runs(kernel, x.dtype, A.shape[1])
    arrays = (x, delta, A, B, C, D, z, delta_bias, initial_state, call.mask, call.restart)
    return _scan(*arrays, delta_softplus=bool(delta_softplus), kernel=kernel)


def selective_step(x, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, state):
    check_step(x, delta, A, B, C, D, z, delta_bias, state)
    dtype = x.dtype
    A, D, delta_bias, h = _in_compute_dtype(dtype, A, D, delta_bias, state)
    x, step, B, C, z = _prepare(x, delta, B, C, z, delta_bias, None, delta_softplus)
    linear, h = _advance(h, x, step, jnp.maximum(A, LEAST), B, C)
    return _output(linear, x, D, z).astype(dtype), h


def kernels(device: str, dtype=None, states: int | None = None) -> dict[str, str | None]:
    """For so many states. Those but "native", "cuda" and "pallas" are JAX's own operations and run on every device."""
    order = KERNELS if device == "cpu" else ["cuda", "pallas", "associative", *KERNELS]
    reasons = {"native": why_not_native(device, dtype), "cuda": cuda_scan.reason(device, dtype, states)}
    reasons |= {"pallas": pallas_scan.reason(device, dtype, states)}
    return dict.fromkeys(order) | reasons


def _that_runs(kernel, dtype, states):
    """The kernel of that name, which must run on its own device: the true one is known only when it is lowered."""
    return choose(kernel, kernels(HOMES.get(kernel, "cpu"), dtype, states))


def _auto(*arguments, delta_softplus):
    x, _, A, *_ = arguments
    options = {"delta_softplus": delta_softplus}
    fastest = {
        name: choose("auto", kernels(device, x.dtype, A.shape[1]), "selective_scan", "jax", device)
        for name, device in PLATFORMS.items()
    }
    branches = {
        platform: functools.partial(KERNELS[name], **options, **({"portable": True} if name in HOMES else {}))
        for platform, name in fastest.items()
        if name != "associative"
    }
    return lax.platform_dependent(*arguments, **branches, default=functools.partial(associative, **options))


def sequential(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, *, delta_softplus):
    """One `lax.scan` over time. Its gradient keeps every state: for short sequences, and as the plain twin."""
    x, step, B, C, z = _prepare(x, delta, B, C, z, delta_bias, mask, delta_softplus)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def position(h, inputs):
        x, step, B, C, restart = inputs
        linear, h = _advance(_restarted(restart, h), x, step, A, B, C)
        return h, linear

    inputs = jax.tree.map(lambda value: jnp.moveaxis(value, 1, 0), (x, step, B, C, restart))
    h, linear = lax.scan(position, h0, inputs)
    return _output(jnp.moveaxis(linear, 0, 1), x, D, z), h


def chunked(*arguments, delta_softplus):
    """Computes a chunk in bulk, except for h = decay * h + increment in a `lax.scan`: the fastest on a CPU."""
    return _by_chunks(_LOOP, LOOP_CHUNK, *arguments, delta_softplus)


def associative(*arguments, delta_softplus):
    """Computes a chunk by `lax.associative_scan`: few long operations, the fastest where each costs a launch."""
    return _by_chunks(_TREE, TREE_CHUNK, *arguments, delta_softplus)


def _plain_recurrence(x, step, A, B, C, h0, mask, restart):
    return associative(x, step, A, B, C, None, None, None, h0, mask, restart, delta_softplus=False)


_recurrence = pallas_scan.beside(_plain_recurrence)


def pallas(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, *, delta_softplus, portable=False):
    """The recurrence in Pallas; XLA fuses the operations before and after it with their surroundings."""
    dtype = x.dtype
    x, step, B, C, z = _prepare(x, delta, B, C, z, delta_bias, mask, delta_softplus)
    linear, h = _recurrence(x, step, A, B, C, h0, restart, portable=portable)
    return _output(linear, x, D, z).astype(dtype), h


KERNELS = {
    "native": native_scan.beside(chunked),
    "chunked": chunked,
    "associative": associative,
    "cuda": cuda_scan.beside(associative),
    "pallas": pallas,
    "sequential": sequential,
}
PLAIN = "sequential"
# JAX's own operations, which take XLA longer to compile than a trial should.
UNTRIED = ("chunked", "associative")


@functools.partial(jax.jit, static_argnames=("delta_softplus", "kernel"))
def _scan(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, restart, *, delta_softplus, kernel):
    A, D, delta_bias, h0 = _in_compute_dtype(x.dtype, A, D, delta_bias, initial_state)
    A = jnp.maximum(A, LEAST)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], *A.shape), A.dtype)
    run = _auto if kernel == "auto" else KERNELS[kernel]
    y, h = run(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus=delta_softplus)
    return where_counting(mask, y).astype(x.dtype), h


def _by_chunks(recurrence, longest, x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
    batch, length, channels = x.shape
    if length == 0:
        return x, h0
    chunks = -(-length // longest)
    padding = -length % chunks
    if padding and mask is None:
        mask = jnp.ones((batch, length), bool)

    def split(value):
        """(b, l, ...) -> (chunks, t, b, ...); the positions added at the end do not count."""
        value = jnp.pad(value, [(0, 0), (0, padding)] + [(0, 0)] * (value.ndim - 2))
        return jnp.moveaxis(value, 1, 0).reshape(chunks, -1, batch, *value.shape[2:])

    # The gradient keeps the inputs as they came and the state before each chunk.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(h, inputs):
        x, delta, B, C, z, mask, restart = inputs
        dtype = x.dtype
        x, step, B, C, z = _prepare(x, delta, B, C, z, delta_bias, mask, delta_softplus)
        linear, h = _chunk(recurrence, x, step, A.mT, B, C, h, restart)
        return h, _output(linear, x, D, z).astype(dtype)

    h, y = lax.scan(chunk, h0.mT, jax.tree.map(split, (x, delta, B, C, z, mask, restart)))
    y = jnp.moveaxis(y.reshape(-1, batch, channels), 0, 1)
    return y[:, :length], h.mT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk(recurrence, x, step, A, B, C, h, restart):
    """(sum_n C h, the last h): x, step (t, b, e); A (n, e); B, C (t, b, n); h (b, n, e)."""
    return recurrence.outputs(x, step, A, B, C, h, restart)


def _chunk_forward(recurrence, x, step, A, B, C, h, restart):
    decay = jnp.exp(step[:, :, None] * A)
    states = recurrence.states(decay, (step * x)[:, :, None] * B[..., None], h, restart)
    linear = _einsum("tbne,tbn->tbe", states, C)
    return (linear, states[-1]), (x, step, A, B, C, h, restart, decay, states)


def _chunk_backward(recurrence, saved, cotangents):
    """As `mamba_core.spec.ops.selective_scan.selective_scan_vjp`. Sums are products: XLA reduces slowly on a CPU."""
    x, step, A, B, C, h, restart, decay, states = saved
    dlinear, dh = cotangents
    before = _restarted(restart, jnp.concatenate([h[None], states[:-1]]))
    g, dlog_decay, dh = recurrence.gradient(decay, dlinear[:, :, None] * C[..., None], before, dh, restart)
    dC = _einsum("tbne,tbe->tbn", states, dlinear)
    dB = _einsum("tbne,tbe->tbn", g, step * x)
    gB = _einsum("tbne,tbn->tbe", g, B)
    dA = _einsum("tbne,tb->ne", dlog_decay * step[:, :, None], jnp.ones_like(step[..., 0]))
    dstep = _einsum("tbne,tbn->tbe", dlog_decay * A, jnp.ones_like(B)) + gB * x
    return gB * step, dstep, dA, dB, dC, dh, None


_chunk.defvjp(_chunk_forward, _chunk_backward)


class _Recurrence(NamedTuple):
    """outputs(x, step, A, B, C, h, restart): those of `_chunk`.

    states(decay, increment, h, restart): every h_t = decay_t h_{t-1} + increment_t from h (b, n, e).

    gradient(decay, direct, before, dh, restart): (g, dlog_decay, gradient of h), where g_t = direct_t + passed_{t+1},
    passed_t = decay_t g_t, the last passed on is dh, and dlog_decay_t = passed_t before_t.
    """

    outputs: Callable
    states: Callable
    gradient: Callable


def _loop_outputs(x, step, A, B, C, h, restart):
    # Without a gradient nobody needs decay and states in bulk, and one pass in cache is faster.
    def position(h, inputs):
        x, step, B, C, restart = inputs
        linear, h = _advance(_restarted(restart, h), x, step, A.mT, B, C)
        return h, linear

    h, linear = lax.scan(position, h.mT, (x, step, B, C, restart))
    return linear, h.mT


def _loop_states(decay, increment, h, restart):
    def position(h, inputs):
        decay, increment, restart = inputs
        h = decay * _restarted(restart, h) + increment
        return h, h

    return lax.scan(position, h, (decay, increment, restart))[1]


def _loop_gradient(decay, direct, before, dh, restart):
    def position(passed, inputs):
        decay, direct, before, restart = inputs
        g = direct + passed
        passed = _restarted(restart, decay * g)
        return passed, (g, passed * before)

    dh, (g, dlog_decay) = lax.scan(position, dh, (decay, direct, before, restart), reverse=True)
    return g, dlog_decay, dh


def _tree_outputs(*arguments):
    return _chunk_forward(_TREE, *arguments)[0]


def _tree_states(decay, increment, h, restart, reverse=False):
    def combine(first, then):
        decay, increment, restart = then
        increment = increment + decay * _restarted(restart, first[1])
        return decay * first[0], increment, None if restart is None else restart | first[2]

    start = -1 if reverse else 0
    h = h if restart is None else _restarted(restart[start], h)
    increment = increment.at[start].add(decay[start] * h)
    return lax.associative_scan(combine, (decay, increment, restart), reverse=reverse)[1]


def _tree_gradient(decay, direct, before, dh, restart):
    passed = _tree_states(decay, _restarted(restart, decay * direct), dh, restart, reverse=True)
    return direct + jnp.concatenate([passed[1:], dh[None]]), passed * before, passed[0]


_LOOP = _Recurrence(_loop_outputs, _loop_states, _loop_gradient)
_TREE = _Recurrence(_tree_outputs, _tree_states, _tree_gradient)


def _in_compute_dtype(dtype, *values):
    dtype = jnp.promote_types(dtype, jnp.float32)
    return [None if value is None else value.astype(dtype) for value in values]


def _prepare(x, delta, B, C, z, delta_bias, mask, delta_softplus):
    """(x, step, B, C, z) to compute with: zero at masked positions, which may hold NaN, and 0 * NaN is not 0."""
    values = _in_compute_dtype(x.dtype, x, delta, B, C, z)
    x, delta, B, C, z = (where_counting(mask, value) for value in values)
    step = delta if delta_bias is None else delta + delta_bias
    step = jax.nn.softplus(step) if delta_softplus else step
    return x, where_counting(mask, step), B, C, z


def _restarted(restart, h):
    return h if restart is None else jnp.where(restart[..., None, None], 0, h)


def _advance(h, x, step, A, B, C):
    """(sum_n C h, h) after one position: x, step (b, e); B, C (b, n); h (b, e, n)."""
    h = jnp.exp(step[..., None] * A) * h + (step * x)[..., None] * B[:, None]
    return _einsum("ben,bn->be", h, C), h


def _output(linear, x, D, z):
    linear = linear if D is None else linear + D * x
    return linear if z is None else linear * jax.nn.silu(z)
