"""The scan in C++ on a CPU, as an operator: inputs as they come, all of the op fused, no (b, l, e, n) in memory."""

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels.native_tensors import laid_out, point, rows
from mamba_core.backends.torch.kernels.operator import differentiable, is_float, refuse_tangents


def native(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
    """(y, final state)."""
    dtype = x.dtype
    if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
        x, delta, B, C, z = (None if value is None else value.float() for value in (x, delta, B, C, z))
    A, D, delta_bias, h0 = (None if value is None else value.float() for value in (A, D, delta_bias, h0))
    tensors = (x, delta, A, B, C, D, z, delta_bias, h0, mask, restart)
    keep = torch.is_grad_enabled() and any(is_float(value) and value.requires_grad for value in tensors)
    y, h = _native(*tensors, bool(delta_softplus), keep)
    return y.to(dtype), h


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, boundaries), boundaries empty unless they are to be kept for a gradient."""
    refuse_tangents(x, delta, A, B, C, D, z, delta_bias, h0)
    given = _named(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart)
    y, final_state, boundaries = _empty_results(x, A, keep)
    results = {"y": y, "final_state": final_state, "boundaries": boundaries if keep else None}
    library.scan(_arguments(x, A, delta_softplus, given | results))
    return y, final_state, boundaries


_scan = torch.library.custom_op("mamba_core::native_scan", mutates_args=(), device_types="cpu")(_forward)


def scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep, reverse=False):
    """As `cuda_scan.scan`, which it stands for where Triton's kernels run in their interpreter."""
    z = z.flip(1) if reverse else z
    return _scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep)


@torch.library.custom_op("mamba_core::native_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    boundaries: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    mask: Tensor | None,
    restart: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> list[Tensor]:
    given = _named(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart)
    if not keep:  # torch.func may ask for the gradient of tensors that did not say that they require one
        _, _, boundaries = _scan(*given.values(), delta_softplus, True)
    gradients = {f"d{name}": value.new_empty(value.shape) for name, value in given.items() if is_float(value)}
    # Named, because the pointers do not keep them alive.
    arriving = {"dy": rows(dy), "dfinal_state": None if dfinal_state is None else dfinal_state.contiguous()}
    arriving["boundaries"] = boundaries.contiguous()
    library.scan_backward(_arguments(x, A, delta_softplus, given | arriving | gradients))
    return list(gradients.values())


def scan_backward(
    dy, dfinal_state, kept, x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep, reverse=False
) -> list[Tensor]:
    """As `cuda_scan.scan_backward`."""
    dy, z = (value.flip(1) if reverse else value for value in (dy, z))
    given = (x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep)
    return _scan_backward(dy, dfinal_state, kept, *given)


@_scan.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus, keep):
    return _empty_results(x, A, keep)


@_scan_backward.register_fake
def _(dy, dfinal_state, boundaries, *inputs):
    return [value.new_empty(value.shape) for value in inputs if is_float(value)]


_native = differentiable(_scan, _scan_backward, function=_forward)


def _empty_results(x, A, keep):
    count = library.count_boundaries(*x.shape, A.shape[1]) if keep else 0
    return x.new_empty(x.shape), A.new_empty(x.shape[0], *A.shape), A.new_empty(count)


def _named(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart):
    """By the library's names, in memory as it wants them."""
    named = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    return laid_out(named | {"initial_state": h0, "mask": mask, "restart": restart})


def _arguments(x, A, delta_softplus, tensors) -> abi.Scan:
    sizes = (*x.shape, A.shape[1])
    return point(abi.Scan(*sizes, x.dtype == torch.bfloat16, delta_softplus, torch.get_num_threads()), tensors)
