"""The short causal convolution of each channel in PyTorch, as shifted multiply-adds.

They are faster than `conv1d` on a CPU, and unlike it they leave out taps that lie before a restart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.arrays import check_devices, in_compute_dtype
from mamba_core.backends.torch.kernels import fused_conv
from mamba_core.backends.torch.kernels.native_conv import native
from mamba_core.backends.torch.positions import compaction, restarts, where_counting
from mamba_core.backends.torch.scan import kernel_for
from mamba_core.spec.checks import check_conv, check_conv_step


def causal_conv(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
    kernel="auto",
):
    """Computed in float32 (float64 if x is), also under autocast; by "cuda" in Triton where that is, without a mask."""
    check_conv(x, weight, bias, activation, initial_state, mask, segment_ids)
    others = {"weight": weight, "bias": bias, "initial_state": initial_state}
    check_devices(x, **others, mask=mask, segment_ids=segment_ids)
    chosen, restart = kernel_for(kernel, x.device, x.dtype), restarts(mask, segment_ids)
    given = (x, weight, bias, activation, initial_state)
    if chosen == "cuda" and mask is None and fused_conv.reason(x.device, x.dtype, weight.shape[1]) is None:
        y, state = fused_conv.causal_conv(*given, restart)
    else:
        y, state = (native if chosen == "native" else shifted)(*given, mask, restart)
    return (y, state) if return_final_state else y


def shifted(x, weight, bias, activation, state, mask, restart):
    """A multiply-add of the whole length for each tap."""
    dtype = x.dtype
    x, weight, bias, state = in_compute_dtype(x, weight, bias, state)
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    if mask is not None:
        order, inverse = compaction(mask)
        x = _take(where_counting(mask, x), order)
        restart = None if restart is None else restart.gather(1, order)
    inputs = torch.cat([state, x], dim=1)
    runs = None if restart is None else _runs(restart, state.shape[1])
    y = _activate(_filter(inputs, weight, bias, runs), activation)
    if mask is not None:
        y = where_counting(mask, _take(y, inverse))
    return y.to(dtype), _last_inputs(inputs, state.shape[1], mask, runs).to(dtype)


def causal_conv_step(x, weight, bias=None, *, activation=None, state):
    """Plain differentiable operations."""
    check_conv_step(x, weight, bias, activation, state)
    dtype = x.dtype
    x, weight, bias, state = in_compute_dtype(x, weight, bias, state)
    inputs = torch.cat([state, x[:, None]], dim=1)
    y = _activate(_filter(inputs, weight, bias, None), activation)
    return y[:, 0].to(dtype), inputs[:, 1:].to(dtype)


def _filter(inputs, weight, bias, runs) -> Tensor:
    """The filter at every input but the first k-1; a tap on another run than the position's own counts as zero."""
    width = weight.shape[1]
    length = inputs.shape[1] - width + 1
    total = None
    for tap in range(width):
        shifted = inputs[:, tap : tap + length]
        if runs is not None and tap < width - 1:
            same_run = runs[:, tap : tap + length] == runs[:, width - 1 :]
            shifted = torch.where(same_run[..., None], shifted, 0.0)
        if total is None:
            total = shifted * weight[:, tap] if bias is None else torch.addcmul(bias, shifted, weight[:, tap])
        else:
            total = torch.addcmul(total, shifted, weight[:, tap])
    return total


def _last_inputs(inputs, carried, mask, runs):
    """The last inputs that counted, `carried` of them; zero where they lie before the last restart."""
    batch, length = inputs.shape[0], inputs.shape[1] - carried
    count = torch.full((batch,), length, device=inputs.device) if mask is None else mask.sum(1)
    last = count[:, None] + torch.arange(carried, device=inputs.device)
    state = _take(inputs, last)
    if runs is None or carried == 0:
        return state
    run = runs.gather(1, last)
    return torch.where((run == run[:, -1:])[..., None], state, 0.0)


def _runs(restart, carried):
    """(b, k-1+l): how many restarts lie at or before each input; the initial state belongs to the first run."""
    return F.pad(restart.cumsum(1), (carried, 0))


def _take(values, positions):
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[2]))


def _activate(value, activation):
    return F.silu(value) if activation == "silu" else value
