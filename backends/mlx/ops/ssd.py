"""The recurrence of Mamba-2 in MLX (Dao and Gu 2024, section 6): its plain form, and the choice of a kernel.

The chunked form is in `kernels/chunked_ssd.py`, that in C++ in `kernels/native_ssd.py`, one position in `ssd_step.py`.
"""

import functools

import mlx.core as mx

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import chunked_ssd, native_tensors
from mamba_core.backends.mlx.kernels.native_ssd import native
from mamba_core.backends.mlx.ops.ssd_step import LEAST_RATE, advance, float32, one_position, output, step_size
from mamba_core.backends.mlx.positions import call_of, where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.spec.ops.ssd import NO_LIMIT, check_ssd


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
    """Computed in float32, a float64 x too: MLX has no float64 on a GPU."""
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
    call: Call,
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
    """`ssd` within a call whose positions are known; (y, final state)."""
    check_ssd(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, call.mask, call.segment_ids)
    keep_float32()
    arrays = (x, dt, A, B, C, D, z, dt_bias, initial_state, call.mask, call.restart)
    run = KERNELS[chosen(kernel, x.dtype, arrays)]
    return run(call, x, dt, A, B, C, D, z, dt_bias, dt_softplus, tuple(dt_limit), initial_state)


def ssd_step(x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, dt_limit=NO_LIMIT, state):
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    return one_position(x, dt, A, B, C, D, z=z, dt_bias=dt_bias, **options, state=state)


def kernels(device=None, dtype=None, arrays=(), *, wanted="auto") -> dict[str, str | None]:
    """Fastest first, for x of that dtype and these arrays. Those but "native" run on every device.

    The native kernel has the arrays computed to see whether they can be: only where it is wanted, by name or "auto".
    """
    to_compute = arrays if wanted in ("auto", "native") else ()
    return dict.fromkeys(KERNELS) | {"native": native_tensors.reason(device or default_device(), dtype, to_compute)}


def chosen(kernel: str, dtype: mx.Dtype, arrays=()) -> str:
    """The kernel of that name, or for "auto" the fastest, for x of that dtype and these arrays.

    On MLX's default device.

    Raises:
        ValueError: there is no such kernel, or not for them.
    """
    return choose(kernel, kernels(None, dtype, arrays, wanted=kernel), "ssd", "mlx", default_device())


def _prepared(recurrence):
    """A kernel of the op's own arguments, from a function of step sizes and of float32 only."""

    @functools.wraps(recurrence)
    def kernel(call, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, h0):
        dtype, mask = x.dtype, call.mask
        # Not by a factor of zero: a masked position may hold Inf or NaN.
        x, dt, B, C, z = (where_counting(mask, value) for value in (x, dt, B, C, z))
        x, A, B, C, D, z = (float32(value) for value in (x, A, B, C, D, z))
        step, A = where_counting(mask, step_size(dt, dt_bias, dt_softplus, dt_limit)), mx.maximum(A, LEAST_RATE)
        linear, h = x, mx.zeros((x.shape[0], *x.shape[2:], B.shape[3])) if h0 is None else float32(h0)
        if x.shape[1] > 0:
            linear, h = recurrence(x, step, A, B, C, h, call.restart)
        return output(linear, x, D, z).astype(dtype), h

    return kernel


@_prepared
def sequential(x, step, A, B, C, h0, restart):
    """A loop over time, the plain twin of the others. MLX differentiates it and keeps every state."""
    h, linear = h0, []
    for t in range(x.shape[1]):
        if restart is not None:
            h = mx.where(restart[:, t, None, None, None], 0.0, h)
        y, h = advance(h, x[:, t], step[:, t], A, B[:, t], C[:, t])
        linear.append(y)
    return mx.stack(linear, axis=1), h


# Fastest first, the plain one last.
KERNELS = {"native": native, "chunked": _prepared(chunked_ssd.chunked), "sequential": sequential}
