"""The causal convolution and its SiLU in C++ on a CPU, as an operator: one pass over inputs as they come."""

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels.native_tensors import laid_out, point, rows
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents
from mamba_core.call import Call


def native(x, weight, bias, activation, state, call: Call):
    """(y, final state)."""
    dtype = x.dtype
    if state is not None and state.dtype != dtype:
        x, state = x.float(), state.float()
    bias = None if bias is None else bias.float()
    y, state = _native(x, weight.mT.float(), bias, state, call.mask, call.restart, activation == "silu")
    return y.to(dtype), state.to(dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, nothing that only the gradient needs); weight is (k, e)."""
    refuse_tangents(x, weight, bias, state)
    y, final_state, nothing = _empty_results(x, weight)
    given = _named(x, weight, bias, state, mask, restart)
    library.conv(_arguments(x, weight, silu, given | {"y": y, "final_state": final_state}))
    return y, final_state, nothing


_conv = torch.library.custom_op("mamba_core::native_conv", mutates_args=(), device_types="cpu")(_forward)


@torch.library.custom_op("mamba_core::native_conv_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    nothing: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    given = _named(x, weight, bias, state, mask, restart)
    gradients = {f"d{name}": value.new_empty(value.shape) for name, value in given.items() if is_float(value)}
    arriving = {"dy": rows(dy), "dfinal_state": None if dfinal_state is None else dfinal_state.contiguous()}
    library.conv_backward(_arguments(x, weight, silu, given | arriving | gradients))
    return list(gradients.values())


@_conv.register_fake
def _(x, weight, bias, state, mask, restart, silu):
    return _empty_results(x, weight)


@_conv_backward.register_fake
def _(dy, dfinal_state, nothing, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_native = differentiable(_conv, _conv_backward, function=_forward)


def _empty_results(x, weight):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[0] - 1, x.shape[2]), x.new_empty(0)


def _named(x, weight, bias, state, mask, restart):
    """By the library's names, in memory as it wants them."""
    named = {"x": x, "weight": weight, "bias": bias, "initial_state": state, "mask": mask, "restart": restart}
    return laid_out(named)


def _arguments(x, weight, silu, tensors) -> abi.Conv:
    sizes = (*x.shape, weight.shape[0])
    return point(abi.Conv(*sizes, x.dtype == torch.bfloat16, silu, torch.get_num_threads()), tensors)
