"""The sum of a residual block and the norm of the next in C++ on a CPU, where only their results are asked for."""

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels import native_tensors
from mamba_core.backends.torch.kernels.operator import only_results


def reason(residual: Tensor, weight: Tensor) -> str | None:
    """Why it cannot compute this norm here; None if it can."""
    if not only_results(residual, weight):
        return "something records the call, such as a gradient"
    if residual.device != weight.device:
        return "the weight is on another device"
    if (why := native_tensors.reason(weight.device, weight.dtype)) is not None:
        return why
    if residual.dtype not in native_tensors.DTYPES or residual.shape[-1] != len(weight):
        return "the residual stream has another dtype or width"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


def add_norm(residual: Tensor, hidden: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(residual + hidden) in the dtype of the weight, that sum); residual (..., d), hidden may be None."""
    native_tensors.share_threads()
    if hidden is not None and hidden.dtype != weight.dtype:
        residual, hidden = residual + hidden, None
    residual, weight = residual.contiguous(), weight.contiguous()
    normed, total = residual.new_empty(residual.shape, dtype=weight.dtype), residual
    addend = added = None
    if hidden is not None:
        hidden, total = hidden.contiguous(), torch.empty_like(residual)
        addend, added = hidden.data_ptr(), total.data_ptr()
    library.add_norm(
        abi.AddNorm(
            *(residual.numel() // len(weight), len(weight)),
            *(weight.dtype == torch.bfloat16, residual.dtype == torch.bfloat16, torch.get_num_threads(), 0),
            *(eps, residual.data_ptr(), addend, weight.data_ptr(), normed.data_ptr(), added),
        )
    )
    return normed, total
