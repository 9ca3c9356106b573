"""The recurrence of Mamba-2 on an NVIDIA GPU, as an operator: all of the op on the matrix units, in Triton.

The kernels are those of `mamba_core.backends.gpu.ssd_kernels`. The same inputs give the same bits.
"""

from __future__ import annotations

import importlib
import itertools

import torch
from torch import Tensor

from mamba_core.backends.gpu import ssd as gpu
from mamba_core.backends.torch.kernels import triton
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents

# Where there is no GPU, as many as an H100 has.
MULTIPROCESSORS = 132
# The kernels' names of arguments that have others here.
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "bias", "begin", "mask", "restart")
WIDEST = 2**31 // gpu.CHUNK
SEQUENCES = ("x", "dt", "B", "C", "z")


def reason(
    device: torch.device, dtype: torch.dtype | None, channels: int | None = None, states: int | None = None
) -> str | None:
    """Why these kernels cannot run on that device, for heads of so many channels and states; None if they can."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return triton.reason(device) or gpu.reason(name, channels, states, triton.shared_memory())


def cuda(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, h0, mask, restart):
    """(y, final state)."""
    dtype = x.dtype
    if x.shape[1] == 0:
        return x, x.new_zeros(*_state_shape(x, B), dtype=torch.float32) if h0 is None else h0.float()
    if any(value is not None and value.dtype != dtype for value in (dt, B, C, z)):
        x, dt, B, C, z = (None if value is None else value.float() for value in (x, dt, B, C, z))
    A, D, dt_bias, h0 = (None if value is None else value.float() for value in (A, D, dt_bias, h0))
    tensors = (x, dt, A, B, C, D, z, dt_bias, h0, mask, restart)
    y, h = _cuda(*tensors, bool(dt_softplus), *map(float, dt_limit))
    return y.to(dtype), h


@torch.library.custom_op("mamba_core::triton_ssd", mutates_args=())
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    dt_softplus: bool,
    least: float,
    most: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, final state, what each segment adds, its decay): the last two are empty if there is one segment."""
    refuse_tangents(x, dt, A, B, C, D, z, dt_bias, h0)
    call, arrays = _call((x, dt, A, B, C, D, z, dt_bias, h0, mask, restart), dt_softplus, least, most)
    _launch(call, call.forward(), arrays)
    added, logs = _empty_segments(call, A) if call.segments == 1 else (arrays["added"], arrays["logs"])
    return arrays["y"], arrays["final"], added, logs


@torch.library.custom_op("mamba_core::triton_ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    added: Tensor,
    logs: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    dt_softplus: bool,
    least: float,
    most: float,
) -> list[Tensor]:
    """The gradient of every floating-point argument that was given, in their order."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, h0, mask, restart)
    call, arrays = _call(inputs, dt_softplus, least, most, dfinal_state)
    arrays |= {"dy": _dense(dy)}
    if call.segments > 1:
        arrays |= {"added": added, "logs": logs}
    _launch(call, call.backward(), arrays)
    for name in ("dB", "dC"):
        parts = arrays[name]
        arrays[name] = parts.squeeze(0) if len(parts) == 1 else parts.sum(0).to(x.dtype)
    found = [arrays[f"d{name}"] for name, value in zip(NAMES, inputs, strict=True) if is_float(value)]
    pairs = zip(found, filter(is_float, inputs), strict=True)
    return [gradient.view(value.shape) for gradient, value in pairs]


@_ssd.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, dt_softplus, least, most):
    call, _ = _call((x, dt, A, B, C, D, z, dt_bias, h0, mask, restart), dt_softplus, least, most)
    return x.new_empty(x.shape), A.new_empty(_state_shape(x, B)), *_empty_segments(call, A)


@_ssd_backward.register_fake
def _(dy, dfinal_state, added, logs, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_cuda = differentiable(_ssd, _ssd_backward, kept=(2, 3))


def _state_shape(x, B) -> tuple[int, int, int, int]:
    return x.shape[0], *x.shape[2:], B.shape[3]


def _empty_segments(call: gpu.Ssd, like: Tensor) -> tuple[Tensor, Tensor]:
    """What each segment adds to a state, and the logarithm of its decay: without elements if there is one segment."""
    return tuple(like.new_empty(call.shapes.get(name, (0,))) for name in ("added", "logs"))


def _call(inputs, dt_softplus: bool, least: float, most: float, last: Tensor | None = None):
    """(the call, its arrays by the kernels' names)."""
    named = {name: value for name, value in zip(NAMES, inputs, strict=True) if value is not None}
    if last is not None:
        named["last"] = last
    x, B, D = named["x"], named["B"], named.get("D")
    count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS
    of_D = 0 if D is None else D[0].numel()
    # How a call is cut depends on its sizes: a compiler that leaves one open must settle it.
    sizes = map(int, (*x.shape, *B.shape[2:]))
    dtype = str(x.dtype).removeprefix("torch.")
    call = gpu.Ssd(*sizes, dtype, frozenset(named), of_D, dt_softplus, (least, most), count, triton.INTERPRETED)
    return call, {name: _dense(value) if name in SEQUENCES else value.contiguous() for name, value in named.items()}


def _launch(call: gpu.Ssd, launches, arrays: dict[str, Tensor]) -> None:
    """Runs the kernels. Adds what they write to the arrays."""
    kernels = importlib.import_module("mamba_core.backends.gpu.ssd_kernels")
    x, shapes = arrays["x"], call.shapes
    # A pointer must be there also where it is not followed.
    absent = arrays["A"]
    with triton.launching(x):
        for each in launches:
            for name in each.writes:
                if name in shapes:
                    arrays[name] = x.new_empty(shapes[name], dtype=getattr(torch, call.dtype_of(name)))
            pointers = (arrays.get(name, absent) for name in (*each.reads, *each.writes))
            numbers = (_strides(arrays.get(value)) if isinstance(value, str) else (value,) for value in each.numbers)
            kernel = getattr(kernels, each.kernel)[each.grid]
            kernel(*pointers, *itertools.chain(*numbers), **each.constants, **each.options)


def _dense(value: Tensor) -> Tensor:
    """The value with adjacent elements at each position. A slice of a wider array has them already."""
    expected, there = 1, []
    for size, stride in zip(reversed(value.shape[2:]), reversed(value.stride()[2:]), strict=True):
        there.append(size == 1 or stride == expected)
        expected *= size
    # The kernels multiply a row's stride by the positions of a chunk in 32 bits.
    return value if all(there) and value.stride(1) < WIDEST else value.contiguous()


def _strides(value) -> tuple[int, int]:
    return (0, 0) if value is None else (value.stride(0), value.stride(1))
