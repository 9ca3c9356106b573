"""The recurrence of Mamba-2 in PyTorch (Dao and Gu 2024, section 6): its plain form, and the choice of a kernel.

The chunked form, in `kernels/chunked_ssd.py`, and that in C++ are each one opaque operator to autograd, to the compiler
and to torch.func.
"""

import functools

import torch
import torch.nn.functional as F

from mamba_core.backends.torch.arrays import check_devices, in_compute_dtype
from mamba_core.backends.torch.kernels import chunked_ssd, native_tensors, triton_ssd
from mamba_core.backends.torch.kernels.native_ssd import native
from mamba_core.backends.torch.positions import call_of, where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.spec.ops.selective_scan import LEAST
from mamba_core.spec.ops.ssd import NO_LIMIT, check_ssd, check_ssd_step


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
    """Gradients of gradients and forward mode need kernel="plain", which keeps every state."""
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
    kernel,
):
    """`ssd` inside a call of a model: (y, final state)."""
    check_ssd(x, dt, A, B, C, D, z, dt_bias, dt_limit, initial_state, call.mask, call.segment_ids)
    others = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state}
    check_devices(x, **others, mask=call.mask, segment_ids=call.segment_ids)
    # Where dtypes differ, kernels that take no mixture compute in float32.
    same = all(value is None or value.dtype == x.dtype for value in (dt, B, C, z))
    available = kernels(
        x.device, x.dtype if same else torch.promote_types(x.dtype, torch.float32), x.shape[3], B.shape[3]
    )
    run = KERNELS[choose(kernel, available, "ssd", "torch", x.device)]
    step_options = (dt_bias, dt_softplus, tuple(dt_limit))
    return run(x, dt, A, B, C, D, z, *step_options, initial_state, call.mask, call.restart)


def ssd_step(x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, dt_limit=NO_LIMIT, state):
    """Plain differentiable operations."""
    check_ssd_step(x, dt, A, B, C, D, z, dt_bias, dt_limit, state)
    dtype = x.dtype
    x, dt, A, B, C, D, z, dt_bias, h = in_compute_dtype(x, dt, A, B, C, D, z, dt_bias, state)
    step = _step_size(dt, dt_bias, dt_softplus, dt_limit)
    linear, h = _advance(h, x, step, A.clamp(min=LEAST), B, C)
    return _output(linear, x, D, z).to(dtype), h


def kernels(
    device: torch.device, dtype: torch.dtype | None = None, channels: int | None = None, states: int | None = None
) -> dict[str, str | None]:
    """Fastest first, for heads of so many channels and states: None for a kernel that runs there, else why not."""
    reasons = {
        "native": native_tensors.reason(device, dtype),
        "cuda": triton_ssd.reason(device, dtype, channels, states),
    }
    return dict.fromkeys(KERNELS) | reasons


def _prepared(recurrence):
    """Makes a kernel of a function that takes step sizes, with all its arguments in the compute dtype."""

    @functools.wraps(recurrence)
    def kernel(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, h0, mask, restart):
        dtype = x.dtype
        x, dt, A, B, C, D, z, dt_bias, h0 = in_compute_dtype(x, dt, A, B, C, D, z, dt_bias, h0)
        # Zeros at masked positions of every input, not only of the step: y is zero there, and a NaN does no harm.
        x, dt, B, C, z = (where_counting(mask, value) for value in (x, dt, B, C, z))
        step = where_counting(mask, _step_size(dt, dt_bias, dt_softplus, dt_limit))
        if h0 is None:
            h0 = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
        linear, h = recurrence(x, step, A.clamp(min=LEAST), B, C, h0, restart)
        return _output(linear, x, D, z).to(dtype), h

    return kernel


@_prepared
def sequential(x, step, A, B, C, h0, restart):
    """One position at a time in plain operations, differentiable any number of times."""
    h, outputs = h0, []
    # unbind, because the gradient of each x[:, t] would be an array as large as x.
    positions = zip(*(value.unbind(1) for value in (x, step, B, C)), strict=True)
    for t, (x_t, step_t, B_t, C_t) in enumerate(positions):
        if restart is not None:
            h = torch.where(restart[:, t, None, None, None], 0.0, h)
        linear, h = _advance(h, x_t, step_t, A, B_t, C_t)
        outputs.append(linear)
    return torch.stack(outputs, dim=1) if outputs else x, h


# Fastest first.
KERNELS = {
    "native": native,
    "cuda": triton_ssd.cuda,
    "chunked": _prepared(chunked_ssd.chunked),
    "sequential": sequential,
}
# The trials of a kernel that takes seconds to compile for each: those of whole heads, and of each dtype.
TRIED = {"cuda": (3, 4, 5)}


def _step_size(dt, dt_bias, dt_softplus, dt_limit):
    raw = dt if dt_bias is None else dt + dt_bias
    # Beyond the threshold softplus is the identity. PyTorch's default of 20 is not exact in float64.
    step = F.softplus(raw, threshold=40.0) if dt_softplus else raw
    return step if dt_softplus and tuple(dt_limit) == NO_LIMIT else step.clamp(*dt_limit)


def _advance(h, x, step, A, B, C):
    """(h C, h) after one position: x (b, h, p), step (b, h), B and C (b, g, n), h (b, h, p, n).

    No matmul, which autocast and TF32 would round.
    """
    B, C = (value.repeat_interleave(x.shape[1] // value.shape[1], dim=1)[:, :, None] for value in (B, C))
    h = torch.exp(step * A)[..., None, None] * h + (step[..., None] * x)[..., None] * B
    return (h * C).sum(-1), h


def _output(linear, x, D, z):
    if D is not None:
        linear = torch.addcmul(linear, D if D.ndim == 2 else D[:, None], x)
    return linear if z is None else linear * F.silu(z)
