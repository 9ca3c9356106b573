"""The recurrence of Mamba-2 in JAX (Dao and Gu 2024, section 6): its plain form, and the choice of a kernel.

The chunked form is in `kernels/chunked_ssd.py`, that in C++ in `kernels/native_ssd.py`, those on the matrix units of a
GPU and of a TPU in `kernels/cuda_ssd.py` and `kernels/pallas_ssd.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mamba_core.backends.jax.arrays import PLATFORMS
from mamba_core.backends.jax.kernels import chunked_ssd, cuda_ssd, native_ssd, pallas_ssd
from mamba_core.backends.jax.kernels.operator import HOMES
from mamba_core.backends.jax.kernels.operator import reason as why_not_native
from mamba_core.backends.jax.positions import call_of, where_counting
from mamba_core.kernels import choose
from mamba_core.spec.ops.selective_scan import LEAST
from mamba_core.spec.ops.ssd import NO_LIMIT, check_ssd, check_ssd_step

# Not jnp.einsum's default: on GPU and TPU that rounds float32 to TF32 or bfloat16.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=NO_LIMIT,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
    kernel="auto",
):
    y, h = recur(
        call_of(mask, segment_ids, length=x.shape[1]),
        *(x, dt, A, B, C, D),
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_state,
        kernel=kernel,
    )
    return (y, h) if return_final_state else y


def recur(
    call,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=NO_LIMIT,
    initial_state=None,
    kernel="auto",
):
    """`ssd` in a call whose positions are known: (y, final state)."""
    check_ssd(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, call.mask, call.segment_ids)
    arrays = (x, dt, A, B, C, D, z, dt_bias, initial_state, call.mask, call.restart)
    if kernel != "auto":
        kernel = choose(kernel, kernels(HOMES.get(kernel, "cpu"), *_sizes(*arrays)), "ssd")
    return _ssd(*arrays, dt_softplus=bool(dt_softplus), dt_limit=tuple(dt_limit), kernel=kernel)


def ssd_step(x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, dt_limit=NO_LIMIT, state):
    check_ssd_step(x, dt, A, B, C, D, z, dt_bias, dt_limit, state)
    dtype = x.dtype
    x, dt, A, B, C, D, z, dt_bias, h = _in_compute_dtype(dtype, x, dt, A, B, C, D, z, dt_bias, state)
    step = _step_size(dt, dt_bias, dt_softplus, tuple(dt_limit))
    linear, h = _advance(h, x, step, jnp.maximum(A, LEAST), B, C)
    return _output(linear, x, D, z).astype(dtype), h


def kernels(device: str, dtype=None, channels: int | None = None, states: int | None = None) -> dict[str, str | None]:
    """Fastest first, for heads of so many channels and states.

    "chunked" and "sequential" are JAX's own operations and run on every device.
    """
    reasons = {"native": why_not_native(device, dtype), "cuda": cuda_ssd.reason(device, dtype, channels, states)}
    reasons |= {"pallas": pallas_ssd.reason(device, dtype, states)}
    return dict.fromkeys(KERNELS) | reasons


def _prepared(recurrence, narrow=False):
    """A kernel of the op's own arguments, from a function of step sizes and of the compute dtype only.

    narrow: whether the function takes x, B and C in half precision too, where all of the arguments have it.
    """

    @functools.wraps(recurrence)
    def kernel(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, *, dt_softplus, dt_limit, **options):
        dtype = x.dtype
        of_factors = _sizes(x, dt, A, B, C, D, z)[0] if narrow else jnp.promote_types(dtype, jnp.float32)
        x, dt, A, B, C, D, z, dt_bias, h0 = _in_compute_dtype(dtype, x, dt, A, B, C, D, z, dt_bias, h0)
        # Zeros at masked positions of every input, not only of the step: y is zero there, and a NaN does no harm.
        x, dt, B, C, z = (where_counting(mask, value) for value in (x, dt, B, C, z))
        step = where_counting(mask, _step_size(dt, dt_bias, dt_softplus, dt_limit))
        if h0 is None:
            h0 = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[3]), x.dtype)
        factors = [value.astype(of_factors) for value in (x, B, C)]
        linear, h = recurrence(factors[0], step, jnp.maximum(A, LEAST), *factors[1:], h0, restart, **options)
        return _output(linear.astype(x.dtype), x, D, z).astype(dtype), h

    return kernel


@_prepared
def sequential(x, step, A, B, C, h0, restart):
    """One `lax.scan` over time. Its gradient keeps every state: for short sequences, and as the plain twin."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def position(h, inputs):
        x, step, B, C, restart = inputs
        linear, h = _advance(_restarted(restart, h), x, step, A, B, C)
        return h, linear

    inputs = jax.tree.map(lambda value: jnp.moveaxis(value, 1, 0), (x, step, B, C, restart))
    h, linear = lax.scan(position, h0, inputs)
    return jnp.moveaxis(linear, 0, 1), h


chunked = _prepared(chunked_ssd.chunked)
pallas = _prepared(pallas_ssd.beside(chunked_ssd.chunked), narrow=True)
# Fastest first.
KERNELS = {
    "native": native_ssd.beside(chunked),
    "cuda": cuda_ssd.beside(chunked),
    "pallas": pallas,
    "chunked": chunked,
    "sequential": sequential,
}
# JAX's own operations, which take XLA longer to compile than a trial should.
UNTRIED = ("chunked",)
# The trials of a kernel that takes seconds to compile for each: those of whole heads, and of each dtype.
TRIED = {"cuda": (3, 4, 5)}


@functools.partial(jax.jit, static_argnames=("dt_softplus", "dt_limit", "kernel"))
def _ssd(*arrays, dt_softplus, dt_limit, kernel):
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    if kernel != "auto":
        return KERNELS[kernel](*arrays, **options)
    return _auto(*arrays, **options)


def _auto(*arrays, **options):
    """The fastest on the platform that the computation is lowered for, which is known only then."""
    branches = {}
    for platform, device in PLATFORMS.items():
        name = choose("auto", kernels(device, *_sizes(*arrays)), "ssd", "jax", device)
        if name in HOMES:
            branches[platform] = functools.partial(KERNELS[name], **options, portable=True)
    return lax.platform_dependent(*arrays, **branches, default=functools.partial(chunked, **options))


def _sizes(x, dt, A, B, C, D, z, *_):
    """(the dtype in which kernels compute that take no mixture, channels of a head, states)."""
    same = all(value is None or value.dtype == x.dtype for value in (dt, B, C, z))
    return x.dtype if same else jnp.promote_types(x.dtype, jnp.float32), x.shape[3], B.shape[3]


def _in_compute_dtype(dtype, *values):
    dtype = jnp.promote_types(dtype, jnp.float32)
    return [None if value is None else value.astype(dtype) for value in values]


def _step_size(dt, dt_bias, dt_softplus, dt_limit):
    step = dt if dt_bias is None else dt + dt_bias
    step = jax.nn.softplus(step) if dt_softplus else step
    if dt_softplus and dt_limit == NO_LIMIT:
        return step
    # jnp.clip halves the gradient of a step that is at its limit.
    least, most = dt_limit
    return jnp.where(step < least, least, jnp.where(step > most, most, step))


def _restarted(restart, h):
    return h if restart is None else jnp.where(restart[:, None, None, None], 0, h)


def _advance(h, x, step, A, B, C):
    """(h C, h) after one position: x (b, h, p), step (b, h), B and C (b, g, n), h (b, h, p, n)."""
    B, C = (jnp.repeat(value, x.shape[1] // value.shape[1], axis=1) for value in (B, C))
    h = jnp.exp(step * A)[..., None, None] * h + (step[..., None] * x)[..., None] * B[:, :, None]
    return _einsum("bhpn,bhn->bhp", h, C), h


def _output(linear, x, D, z):
    if D is not None:
        linear = linear + (D if D.ndim == 2 else D[:, None]) * x
    return linear if z is None else linear * jax.nn.silu(z)
