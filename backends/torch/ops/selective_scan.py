"""The S6 recurrence in PyTorch (Gu and Dao 2023, equations 2 and 4): its plain form, a chunked one, and the choice.

The chunked form is one opaque operator to autograd, the compiler and torch.func. It keeps the state at chunk
boundaries only. Its gradient is written by hand, as in `mamba_core.spec.ops.selective_scan.selective_scan_vjp`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.arrays import check_devices, in_compute_dtype
from mamba_core.backends.torch.kernels import cuda_scan, native_tensors
from mamba_core.backends.torch.kernels.cuda_scan import cuda
from mamba_core.backends.torch.kernels.native_scan import native
from mamba_core.backends.torch.kernels.operator import differentiable, refuse_tangents
from mamba_core.backends.torch.positions import call_of, where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.spec.ops.selective_scan import LEAST, check_scan, check_step

# Positions computed in bulk: more cost memory and cache, fewer cost calls.
CHUNK = 64


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
    """Gradients of gradients and forward mode need kernel="plain", which keeps every state."""
    arrays = (x, delta, A, B, C, D, z, delta_bias, initial_state)
    _check(*arrays, mask, segment_ids)
    y, h = _run(call_of(mask, segment_ids, length=x.shape[1]), *arrays, delta_softplus, kernel)
    return (y, h) if return_final_state else y


def scan(
    call: Call, x, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, initial_state=None, kernel
):
    """`selective_scan` inside a call of a model: (y, final state)."""
    arrays = (x, delta, A, B, C, D, z, delta_bias, initial_state)
    _check(*arrays, call.mask, call.segment_ids)
    return _run(call, *arrays, delta_softplus, kernel)


def _check(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids):
    check_scan(x, delta, A, B, C, D, z, delta_bias, initial_state, mask, segment_ids)
    others = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_devices(x, **others, initial_state=initial_state, mask=mask, segment_ids=segment_ids)


def _run(call, x, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, kernel):
    run = KERNELS[kernel_for(kernel, x.device, x.dtype, A.shape[1])]
    return run(x, delta, A, B, C, D, z, delta_bias, initial_state, call.mask, call.restart, delta_softplus)


def selective_step(x, delta, A, B, C, D=None, *, z=None, delta_bias=None, delta_softplus=False, state):
    """Plain differentiable operations."""
    check_step(x, delta, A, B, C, D, z, delta_bias, state)
    dtype = x.dtype
    x, delta, A, B, C, D, z, delta_bias, h = in_compute_dtype(x, delta, A, B, C, D, z, delta_bias, state)
    linear, h = _advance(h, x, _step_size(delta, delta_bias, delta_softplus), A.clamp(min=LEAST), B, C)
    return _output(linear, x, D, z).to(dtype), h


def kernels(device: torch.device, dtype: torch.dtype | None = None, states: int | None = None) -> dict[str, str | None]:
    """Fastest first, for x of that dtype and so many states: None for a kernel that runs there, else why not."""
    reasons = {"native": native_tensors.reason(device, dtype), "cuda": cuda_scan.reason(device, dtype, states)}
    return dict.fromkeys(KERNELS) | reasons


def kernel_for(kernel: str, device: torch.device, dtype: torch.dtype, states: int | None = None) -> str:
    """The kernel of that name, or for "auto" the fastest, for arrays there and so many states.

    Raises:
        ValueError: no such kernel, or it cannot run there.
    """
    return choose(kernel, kernels(device, dtype, states), "selective_scan", "torch", device)


def _prepared(scan):
    """Makes a kernel of a function that takes step sizes, with all its arguments in the compute dtype."""

    @functools.wraps(scan)
    def kernel(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
        dtype = x.dtype
        x, delta, A, B, C, D, z, delta_bias, h0 = in_compute_dtype(x, delta, A, B, C, D, z, delta_bias, h0)
        # Zeros at masked positions of every input, not only of the step: y is zero there, and a NaN does no harm.
        x, delta, B, C, z = (where_counting(mask, value) for value in (x, delta, B, C, z))
        step, A = where_counting(mask, _step_size(delta, delta_bias, delta_softplus)), A.clamp(min=LEAST)
        if h0 is None:
            h0 = x.new_zeros(x.shape[0], *A.shape)
        y, h = scan(x, step, A, B, C, D, z, h0, restart)
        return y.to(dtype), h

    return kernel


@_prepared
def sequential(x, step, A, B, C, D, z, h0, restart):
    """One position at a time in plain operations, differentiable any number of times."""
    h, outputs = h0, []
    # unbind, because the gradient of each x[:, t] would be an array as large as x.
    positions = zip(*(value.unbind(1) for value in (x, step, B, C)), strict=True)
    for t, (x_t, step_t, B_t, C_t) in enumerate(positions):
        if restart is not None:
            h = torch.where(restart[:, t, None, None], 0.0, h)
        linear, h = _advance(h, x_t, step_t, A, B_t, C_t)
        outputs.append(linear)
    linear = torch.stack(outputs, dim=1) if outputs else x
    return _output(linear, x, D, z), h


@torch.library.custom_op("mamba_core::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    h0: Tensor,
    restart: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over a chunk everything in bulk but h = decay * h + increment; channels last, as n is short for a vector.

    (y, h_last, boundaries): boundaries (b, chunks + 1, n, e) holds the state before and after every chunk.
    """
    refuse_tangents(x, step, A, B, C, D, z, h0)
    y, boundaries, A = x.new_empty(x.shape), _empty_boundaries(x, A.shape[1]), A.mT.contiguous()
    boundaries[:, 0] = h0.mT
    buffers, restarting = _empty_buffers(2, x, A.shape[0]), _restarting_rows(restart, x)
    for index, part in enumerate(_parts(x)):
        x_part, z_part = x[:, part], None if z is None else z[:, part]
        decay, states = (buffer[:, : x_part.shape[1]] for buffer in buffers)
        _states(x_part, step[:, part], A, B[:, part], boundaries[:, index], restarting[part], decay, states)
        boundaries[:, index + 1] = states[:, -1]
        y[:, part] = _output(states.mul_(C[:, part, :, None]).sum(2), x_part, D, z_part)
    return y, boundaries[:, -1].mT.clone(memory_format=torch.contiguous_format), boundaries


@torch.library.custom_op("mamba_core::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dh_last: Tensor | None,
    boundaries: Tensor,
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    h0: Tensor,
    restart: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, step, A, B, C, of D and z if they are there, and of h0; names as in the reference."""
    dx, dstep, dB, dC = (value.new_empty(value.shape) for value in (x, step, B, C))
    A = A.mT.contiguous()
    dA, dD = torch.zeros_like(A), None if D is None else torch.zeros_like(D)
    dz = None if z is None else z.new_empty(z.shape)
    arriving = torch.zeros_like(boundaries[:, 0]) if dh_last is None else dh_last.mT.clone()
    buffers, restarting = _empty_buffers(4, x, A.shape[0]), _restarting_rows(restart, x)
    for index, part in reversed(list(enumerate(_parts(x)))):
        x_part, step_part, dlinear, before = x[:, part], step[:, part], dy[:, part], boundaries[:, index]
        B_part, C_part = B[:, part, :, None], C[:, part, :, None]
        decay, states, g, product = (buffer[:, : x_part.shape[1]] for buffer in buffers)
        _states(x_part, step_part, A, B[:, part], before, restarting[part], decay, states)
        if z is not None:
            linear = _output(torch.mul(states, C_part, out=product).sum(2), x_part, D, None)
            dz[:, part] = dlinear * linear * _silu_derivative(z[:, part])
            dlinear = dlinear * F.silu(z[:, part])
        dC[:, part] = torch.mul(states, dlinear[:, :, None], out=product).sum(3)
        torch.mul(C_part, dlinear[:, :, None], out=g)[:, -1] += arriving
        arriving, dlog_decay = _state_gradients(before, restarting[part], decay, states, g)
        dA += torch.mul(dlog_decay, step_part[:, :, None], out=product).sum((0, 1))
        gB = torch.mul(g, B_part, out=product).sum(2)
        dB[:, part] = torch.mul(g, (step_part * x_part)[:, :, None], out=product).sum(3)
        dstep[:, part] = torch.mul(dlog_decay, A, out=product).sum(2) + gB * x_part
        dx[:, part] = gB * step_part
        if D is not None:
            dx[:, part] += dlinear * D
            dD += (dlinear * x_part).sum((0, 1))
    optional = [value for value in (dD, dz) if value is not None]
    return [dx, dstep, dA.mT.contiguous(), dB, dC, *optional, arriving.mT.contiguous()]


def _states(x, step, A, B, before, restarting, decay, states):
    """Fills decay and states, (b, t, n, e) each, of a chunk that starts from the state `before`."""
    torch.mul(step[:, :, None], A, out=decay).exp_()
    torch.mul((step * x)[:, :, None], B[..., None], out=states)
    h = before
    for rows, decay_t, states_t in zip(restarting, decay.unbind(1), states.unbind(1), strict=True):
        if rows is not None:
            h = h.masked_fill(rows, 0.0)
        h = states_t.addcmul_(decay_t, h)


def _state_gradients(before, restarting, decay, states, g):
    """Adds to g, which holds C_t dy_t, the gradients that come from later positions.

    Returns the gradient of the state before the chunk, and that of decay's logarithm, in the memory of decay.
    """
    decay_t, g_t = decay.unbind(1), g.unbind(1)
    for t in reversed(range(len(g_t))):
        decay_t[t].mul_(g_t[t])
        if restarting[t] is not None:
            decay_t[t].masked_fill_(restarting[t], 0.0)
        if t > 0:
            g_t[t - 1].add_(decay_t[t])
    leaving = decay_t[0].clone()
    decay_t[0].mul_(before)
    decay[:, 1:].mul_(states[:, :-1])
    for t, rows in enumerate(restarting):
        if rows is not None:
            decay_t[t].masked_fill_(rows, 0.0)
    return leaving, decay


@_scan.register_fake
def _(x, step, A, B, C, D, z, h0, restart):
    return x.new_empty(x.shape), h0.new_empty(h0.shape), _empty_boundaries(x, A.shape[1])


@_scan_backward.register_fake
def _(dy, dh_last, boundaries, x, step, A, B, C, D, z, h0, restart):
    return [value.new_empty(value.shape) for value in (x, step, A, B, C, D, z, h0) if value is not None]


chunked = _prepared(differentiable(_scan, _scan_backward))

# Fastest first.
KERNELS = {"native": native, "cuda": cuda, "chunked": chunked, "sequential": sequential}


def _parts(x):
    return [slice(start, start + CHUNK) for start in range(0, x.shape[1], CHUNK)]


def _restarting_rows(restart, x):
    """One entry a position: the rows that restart there, (b, 1, 1) bool, or None if none does."""
    if restart is None:
        return [None] * x.shape[1]
    some = restart.any(0).tolist()
    return [rows if some[t] else None for t, rows in enumerate(restart[..., None, None].unbind(1))]


def _empty_buffers(count, x, n):
    batch, length, channels = x.shape
    return [x.new_empty(batch, min(CHUNK, length), n, channels) for _ in range(count)]


def _empty_boundaries(x, n):
    batch, length, channels = x.shape
    return x.new_empty(batch, -(-length // CHUNK) + 1, n, channels)


def _step_size(delta, delta_bias, delta_softplus):
    raw = delta if delta_bias is None else delta + delta_bias
    # Beyond the threshold softplus is the identity. PyTorch's default of 20 is not exact in float64.
    return F.softplus(raw, threshold=40.0) if delta_softplus else raw


def _advance(h, x, step, A, B, C):
    """(C h, h) after one position: x, step (b, e); B, C (b, n). No matmul, which autocast and TF32 would round."""
    h = torch.exp(step[..., None] * A) * h + (step * x)[..., None] * B[:, None]
    return (h * C[:, None]).sum(-1), h


def _output(linear, x, D, z):
    linear = linear if D is None else torch.addcmul(linear, D, x)
    return linear if z is None else linear * F.silu(z)


def _silu_derivative(value):
    gate = torch.sigmoid(value)
    return gate * (1.0 + value * (1.0 - gate))
