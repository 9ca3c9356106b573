"""The recurrence of Mamba-2 in C++ on a CPU, as an operator: inputs as they come, all of the op fused.

It computes by chunks; of them only the states between are kept for a gradient.
"""

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels.native_tensors import laid_out, point, rows
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents


def native(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, h0, mask, restart):
    """(y, final state), as `ops.ssd.sequential`."""
    dtype = x.dtype
    if any(value is not None and value.dtype != dtype for value in (dt, B, C, z)):
        x, dt, B, C, z = (None if value is None else value.float() for value in (x, dt, B, C, z))
    A, D, dt_bias, h0 = (None if value is None else value.float() for value in (A, D, dt_bias, h0))
    tensors = (x, dt, A, B, C, D, z, dt_bias, h0, mask, restart)
    keep = torch.is_grad_enabled() and any(is_float(value) and value.requires_grad for value in tensors)
    least, most = map(float, dt_limit)
    y, h = _native(*tensors, bool(dt_softplus), least, most, keep)
    return y.to(dtype), h


def _forward(
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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, boundaries), boundaries empty unless they are to be kept for a gradient."""
    refuse_tangents(x, dt, A, B, C, D, z, dt_bias, h0)
    given = _named(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart)
    y, final_state, boundaries = _empty_results(x, A, B, keep)
    results = {"y": y.flatten(2), "final_state": final_state, "boundaries": boundaries if keep else None}
    library.ssd(_arguments(x, B, D, dt_softplus, least, most, given | results))
    return y, final_state, boundaries


_ssd = torch.library.custom_op("mamba_core::native_ssd", mutates_args=(), device_types="cpu")(_forward)


@torch.library.custom_op("mamba_core::native_ssd_backward", mutates_args=(), device_types="cpu")
def _ssd_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    boundaries: Tensor,
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
    keep: bool,
) -> list[Tensor]:
    inputs = (x, dt, A, B, C, D, z, dt_bias, h0, mask, restart)
    if not keep:  # torch.func may ask for the gradient of tensors that did not say that they require one
        _, _, boundaries = _ssd(*inputs, dt_softplus, least, most, True)
    given = _named(*inputs)
    results = [value.new_empty(value.shape) for value in inputs if is_float(value)]
    names = (f"d{name}" for name, value in given.items() if is_float(value))
    gradients = {name: _flat(value) for name, value in zip(names, results, strict=True)}
    # Named, because the pointers do not keep them alive.
    arriving = {"dy": rows(_flat(dy)), "dfinal_state": None if dfinal_state is None else dfinal_state.contiguous()}
    arriving["boundaries"] = boundaries.contiguous()
    library.ssd_backward(_arguments(x, B, D, dt_softplus, least, most, given | arriving | gradients))
    return results


@_ssd.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, dt_softplus, least, most, keep):
    return _empty_results(x, A, B, keep)


@_ssd_backward.register_fake
def _(dy, dfinal_state, boundaries, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_native = differentiable(_ssd, _ssd_backward, function=_forward)


def _empty_results(x, A, B, keep):
    batch, _, heads, channels = x.shape
    count = library.count_ssd_boundaries(*x.shape, B.shape[3]) if keep else 0
    return x.new_empty(x.shape), A.new_empty(batch, heads, channels, B.shape[3]), A.new_empty(count)


def _named(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart):
    """By the library's names, in memory as it wants them."""
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    named = {name: None if value is None else _flat(value) for name, value in named.items()}
    return laid_out(named | {"initial_state": h0, "mask": mask, "restart": restart})


def _flat(value: Tensor) -> Tensor:
    """A sequence (b, l, heads or groups, channels) with one axis of channels."""
    return value.flatten(2) if value.ndim == 4 else value


def _arguments(x, B, D, dt_softplus, least, most, tensors) -> abi.Ssd:
    batch, length, heads, channels = x.shape
    groups, states = B.shape[2:]
    settings = (x.dtype == torch.bfloat16, dt_softplus, D is not None and D.ndim == 2, torch.get_num_threads())
    arguments = abi.Ssd(batch, length, heads, channels, states, groups, *settings, least=least, most=most)
    return point(arguments, tensors)
