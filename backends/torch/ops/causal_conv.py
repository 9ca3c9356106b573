"""The short causal convolution of each channel in PyTorch: its plain form, shifted multiply-adds, and the choice.

The plain form is faster than `conv1d` on a CPU, and unlike it, it can leave out taps that lie before a restart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_core.backends.torch.arrays import at_least_float32, check_devices, in_compute_dtype
from mamba_core.backends.torch.kernels import native_tensors, triton_conv
from mamba_core.backends.torch.kernels.native_conv import native
from mamba_core.backends.torch.kernels.triton_conv import cuda
from mamba_core.backends.torch.positions import call_of, where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.spec.ops.causal_conv import check_conv, check_conv_step


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
    """Computed in float32 (float64 if x is), also under autocast. With a mask or a wide filter, "cuda" is "shifted"."""
    _check(x, weight, bias, activation, initial_state, mask, segment_ids)
    call = call_of(mask, segment_ids, length=x.shape[1])
    y, state = _run(call, x, weight, bias, activation, initial_state, kernel)
    return (y, state) if return_final_state else y


def conv(call: Call, x, weight, bias=None, *, activation=None, initial_state=None, kernel):
    """`causal_conv` inside a call of a model: (y, final state)."""
    _check(x, weight, bias, activation, initial_state, call.mask, call.segment_ids)
    return _run(call, x, weight, bias, activation, initial_state, kernel)


def _check(x, weight, bias, activation, initial_state, mask, segment_ids):
    check_conv(x, weight, bias, activation, initial_state, mask, segment_ids)
    others = {"weight": weight, "bias": bias, "initial_state": initial_state}
    check_devices(x, **others, mask=mask, segment_ids=segment_ids)


def _run(call, x, weight, bias, activation, state, kernel):
    chosen = choose(kernel, kernels(x.device, x.dtype), "causal_conv", "torch", x.device)
    if chosen == "cuda" and (call.mask is not None or weight.shape[1] > triton_conv.WIDEST):
        chosen = "shifted"
    return KERNELS[chosen](x, weight, bias, activation, state, call)


def causal_conv_step(x, weight, bias=None, *, activation=None, state):
    """Plain differentiable operations."""
    check_conv_step(x, weight, bias, activation, state)
    dtype = x.dtype
    x, weight, bias, state = in_compute_dtype(x, weight, bias, state)
    inputs = torch.cat([state, x[:, None]], dim=1)
    y = _activate(_filter(inputs, weight, bias, None), activation)
    return y[:, 0].to(dtype), inputs[:, 1:].to(dtype)


def kernels(device: torch.device, dtype: torch.dtype | None = None, width: int | None = None) -> dict[str, str | None]:
    """Fastest first, for x of that dtype and so many taps: None for a kernel that runs there, else why not."""
    reasons = {"native": native_tensors.reason(device, dtype), "cuda": triton_conv.reason(device, dtype, width)}
    return dict.fromkeys(KERNELS) | reasons


def shifted(x, weight, bias, activation, state, call: Call):
    """A multiply-add of the whole length for each tap."""
    dtype, mask, restart = x.dtype, call.mask, call.restart
    x, weight, bias, state = in_compute_dtype(x, weight, bias, state)
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    if mask is not None:
        x = _take(where_counting(mask, x), call.order)
        restart = None if restart is None else restart.gather(1, call.order)
    inputs = torch.cat([state, x], dim=1)
    runs = None if restart is None else _runs(restart, state.shape[1])
    y = _activate(_filter(inputs, weight, bias, runs), activation)
    if mask is not None:
        y = where_counting(mask, _take(y, call.inverse))
    return y.to(dtype), _last_inputs(inputs, state.shape[1], mask, runs).to(dtype)


def by_module(layer: nn.Module, x, state, call: Call, activation=None) -> tuple[Tensor, Tensor]:
    """(y, final state) of a causal convolution that is called, on (b, channels, positions) as `nn.Conv1d` is.

    It may pad as `nn.Conv1d` does on both sides, or on the left alone, or not at all.

    Raises:
        TypeError: there is a convolution inside that reaches beyond the k-1 positions of the state.
        ValueError: it gives another number of positions.
    """
    carried, mask, restart = state.shape[1], call.mask, call.restart
    _check_reach(layer, carried + 1)
    if x.shape[1] == 0:
        return x, state
    dtype = x.dtype
    if mask is not None:
        x = _take(where_counting(mask, x), call.order)
        restart = None if restart is None else restart.gather(1, call.order)
    inputs = torch.cat([state.to(dtype), x], dim=1)
    runs = None if restart is None else _runs(restart, carried)
    y = _valid(layer, inputs, carried) if runs is None else _by_windows(layer, inputs, runs, carried)
    y = _activate(at_least_float32(y), activation)
    if mask is not None:
        y = where_counting(mask, _take(y, call.inverse))
    return y.to(dtype), _last_inputs(inputs, carried, mask, runs)


# Fastest first.
KERNELS = {"native": native, "cuda": cuda, "shifted": shifted}


def _filter(inputs, weight, bias, runs) -> Tensor:
    """The filter at every input but the first k-1; a tap that lies in another run counts as zero."""
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


def _check_reach(layer, width):
    for part in layer.modules():
        if not isinstance(part, nn.Conv1d):
            continue
        kind, taps = type(layer).__qualname__, part.kernel_size[0]
        if any(size != 1 for size in (*part.stride, *part.dilation)):
            raise TypeError(f"{kind} in the place of conv1d has a convolution with stride or dilation; expected none")
        if taps > width:
            raise TypeError(f"{kind} in the place of conv1d has a convolution of {taps} taps; expected {width} at most")
        if taps > 1 and part.padding not in ((0,), (taps - 1,), "valid"):
            padding = f"padding {part.padding}"
            raise TypeError(f"{kind} in the place of conv1d has a convolution with {padding}; expected 0 or {taps - 1}")


def _valid(layer, inputs, carried):
    """What the layer gives at every input but the first k-1."""
    y, length = layer(inputs.mT).mT, inputs.shape[1]
    if y.shape[1] == length - carried:
        return y
    if y.shape[1] not in (length, length + carried):
        raise ValueError(
            f"{type(layer).__qualname__} in the place of conv1d gives {y.shape[1]} positions for {length}; expected "
            f"{length + carried} with padding on both sides, {length} with causal padding, or {length - carried}"
        )
    return y[:, carried:length]


def _by_windows(layer, inputs, runs, carried):
    """As `_valid`, a row for each position, with the inputs of its own run alone."""
    width = carried + 1
    windows = inputs.unfold(1, width, 1).mT
    same = runs.unfold(1, width, 1) == runs[:, carried:, None]
    windows = torch.where(same[..., None], windows, 0.0)
    y = _valid(layer, windows.flatten(0, 1), carried)
    return y.view(*windows.shape[:2], -1)


def _last_inputs(inputs, carried, mask, runs):
    """The last `carried` inputs that counted; zero for those before the last restart."""
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
