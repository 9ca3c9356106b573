"""The causal depthwise convolution before the scan, as shifted multiply-adds (Gu and Dao 2023, figure 3)."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import native_tensors
from mamba_core.backends.mlx.kernels.native_conv import native
from mamba_core.backends.mlx.positions import call_of
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
    check_conv(x, weight, bias, activation, initial_state, mask, segment_ids)
    call = call_of(mask, segment_ids, length=x.shape[1])
    y, state = _conv(call, x, weight, bias, activation, initial_state, kernel)
    return (y, state) if return_final_state else y


def conv(call: Call, x, weight, bias=None, *, activation=None, initial_state=None, kernel="auto"):
    """`causal_conv` within a call whose positions are known; (y, final state)."""
    check_conv(x, weight, bias, activation, initial_state, call.mask, call.segment_ids)
    return _conv(call, x, weight, bias, activation, initial_state, kernel)


def causal_conv_step(x, weight, bias=None, *, activation=None, state):
    check_conv_step(x, weight, bias, activation, state)
    keep_float32()
    inputs = mx.concatenate([state.astype(x.dtype), x[:, None]], axis=1)
    y = _filter([inputs[:, tap] for tap in range(weight.shape[1])], weight, bias, activation)
    return y.astype(x.dtype), inputs[:, 1:]


def kernels(device=None, dtype=None, arrays=()) -> dict[str, str | None]:
    """For x of that dtype and these arrays, which are computed to see whether they can be."""
    return {"native": native_tensors.reason(device or default_device(), dtype, arrays), "shifted": None}


def chosen(kernel: str, dtype: mx.Dtype, arrays=()) -> str:
    """The kernel of that name, or for "auto" the fastest, for x of that dtype and these arrays on MLX's default device.

    Raises:
        ValueError: there is no such kernel, or not for them.
    """
    arrays = arrays if kernel in ("auto", "native") else ()
    return choose(kernel, kernels(None, dtype, arrays), "causal_conv", "mlx", default_device())


def _conv(call, x, weight, bias, activation, state, kernel):
    keep_float32()
    name = chosen(kernel, x.dtype, (x, weight, bias, state, call.mask, call.restart))
    return KERNELS[name](call, x, weight, bias, activation, state)


def shifted(call, x, weight, bias, activation, state):
    """A multiply-add of the whole length for each tap."""
    carried = weight.shape[1] - 1

    def compute(inputs, runs):
        if runs is None:
            taps = [inputs[:, tap : tap + x.shape[1]] for tap in range(carried + 1)]
        else:
            taps = _taps_in_run(inputs, runs, carried)
        return _filter(taps, weight, bias, activation)

    return _in_order(call, x, state, carried, compute)


def by_module(layer, x, state, call: Call, activation=None, name="conv1d") -> tuple[mx.array, mx.array]:
    """(y, final state) of a causal convolution that is called, on (b, positions, channels) as `nn.Conv1d` is.

    It may pad as our `nn.Conv1d` does on both sides, or in front alone, or not at all. Where segments begin, it is
    shown the k inputs of each position as a row, zero where they belong to another segment: k times the work, and right
    for any layer.

    Args:
        name: of the layer, for errors.

    Raises:
        TypeError: there is a convolution inside that reaches beyond the k-1 positions of the state.
        ValueError: it gives another number of positions.
    """
    carried = state.shape[1]
    _check_reach(layer, carried + 1, name)

    def compute(inputs, runs):
        if runs is None:
            return _activate(_valid(layer, inputs, carried, name), activation)
        windows = mx.stack(_taps_in_run(inputs, runs, carried), axis=2)
        y = _valid(layer, windows.reshape(-1, *windows.shape[2:]), carried, name)
        return _activate(y.reshape(*windows.shape[:2], -1), activation)

    return _in_order(call, x, state, carried, compute)


def _in_order(call, x, state, carried, compute):
    """(y, final state) of a convolution that reaches so many inputs back; x (b, l, e).

    compute: (inputs, runs) -> (b, l, e). inputs (b, carried + l, e) are the state's and then x's, the counting ones
        first. runs are the numbers of their segments, (b, carried + l); None where all are of one.
    """
    mask, restart = call.mask, call.restart
    batch, length, channels = x.shape
    state = mx.zeros((batch, carried, channels), x.dtype) if state is None else state.astype(x.dtype)
    if length == 0:
        return x, state
    # How many restarts there were up to each position.
    run = None if restart is None else mx.cumsum(restart.astype(mx.int32), axis=1)
    if mask is not None:
        x = _permute(mx.where(mask[..., None], x, mx.array(0, x.dtype)), call.order)
        run = None if run is None else mx.take_along_axis(run, call.order, axis=1)
    inputs = mx.concatenate([state, x], axis=1)
    # The initial state's inputs belong to the first run.
    runs = None if run is None else mx.pad(run, ((0, 0), (carried, 0)))
    y = compute(inputs, runs).astype(x.dtype)
    if mask is not None:
        y = mx.where(mask[..., None], _permute(y, call.inverse), mx.array(0, y.dtype))
    return y, _last_inputs(inputs, runs, mask, carried)


def _taps_in_run(inputs, runs, carried) -> list:
    """The inputs that each position sees at each tap, (b, l, e), zero where they belong to another run."""
    length = inputs.shape[1] - carried
    windows = [slice(tap, tap + length) for tap in range(carried + 1)]
    return [_in_run(inputs[:, window], runs[:, window], runs[:, carried:]) for window in windows]


# Fastest first, the plain one last.
KERNELS = {"native": native, "shifted": shifted}


@mx.compile
def _filter(taps, weight, bias, activation):
    """In float32."""
    weight = weight.astype(mx.float32)
    total = sum(tap.astype(mx.float32) * weight[:, j] for j, tap in enumerate(taps))
    total = total if bias is None else total + bias.astype(mx.float32)
    return _activate(total, activation)


def _activate(y, activation):
    """In float32."""
    return nn.silu(y.astype(mx.float32)) if activation == "silu" else y


def _check_reach(layer, width: int, name: str) -> None:
    for part in layer.modules() if isinstance(layer, nn.Module) else []:
        if not isinstance(part, nn.Conv1d):
            continue
        taps = part.weight.shape[1]
        if part.stride != 1 or part.dilation != 1:
            settings = f"stride {part.stride} and dilation {part.dilation}"
            raise TypeError(f"{name} has a convolution with {settings}; expected 1 and 1")
        if taps > width:
            raise TypeError(f"{name} has a convolution of {taps} taps; expected {width} at most: the state has no more")
        if part.padding not in (0, taps - 1):
            raise TypeError(f"{name} has a convolution with padding {part.padding}; expected 0 or {taps - 1}")


def _valid(layer, inputs, carried: int, name: str):
    """What the layer gives at every input but the first k-1."""
    y, length = layer(inputs), inputs.shape[1]
    first = {length + carried: carried, length: carried, length - carried: 0}.get(y.shape[1])
    if first is None:
        raise ValueError(
            f"{name} gives {y.shape[1]} positions for {length}; expected {length + carried} with padding on both "
            f"sides, {length} with padding in front, or {length - carried} without"
        )
    return y[:, first : first + length - carried]


def _in_run(inputs, run, current):
    """The inputs, but zero where an input belongs to another run than the position or state that it is for."""
    return mx.where((run == current)[..., None], inputs, mx.array(0, inputs.dtype))


def _last_inputs(inputs, runs, mask, carried):
    """The last inputs that counted, zero where they belong to another run than the last of them."""
    end = inputs.shape[1] if mask is None else carried + mask.sum(axis=1, keepdims=True)
    index = mx.broadcast_to(end - carried + mx.arange(carried), (len(inputs), carried))
    last = _permute(inputs, index)
    if runs is None or carried == 0:
        return last
    return _in_run(last, mx.take_along_axis(runs, index, axis=1), runs.max(axis=1, keepdims=True))


def _permute(value, order):
    return mx.take_along_axis(value, order[..., None], axis=1)
