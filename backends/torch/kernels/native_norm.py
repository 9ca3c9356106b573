"""The sum of a residual block and the norm of the next in C++ on a CPU, where only their results are asked for."""

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels.memory import DTYPES, reason
from mamba_core.backends.torch.kernels.operator import only_results


def runs(kernels: str, residual: Tensor, weight: Tensor) -> bool:
    """Whether it computes here what the model would. kernels: the model's."""
    return (
        kernels in ("auto", "native")
        and only_results(residual, weight)
        and residual.device == weight.device
        and reason(weight.device, weight.dtype) is None
        and residual.dtype in DTYPES
        and residual.shape[-1] == len(weight)
        and not torch.is_autocast_enabled("cpu")
    )


def add_norm(residual: Tensor, hidden: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(residual + hidden) in the dtype of the weight, that sum); residual (..., d), hidden may be None."""
    if hidden is not None and hidden.dtype != weight.dtype:
        residual, hidden = residual + hidden, None
    residual, weight = residual.contiguous(), weight.contiguous()
    normed, total = residual.new_empty(residual.shape, dtype=weight.dtype), residual
    given = added = None
    if hidden is not None:
        hidden, total = hidden.contiguous(), torch.empty_like(residual)
        given, added = hidden.data_ptr(), total.data_ptr()
    library.add_norm(
        abi.AddNorm(
            *(residual.numel() // len(weight), len(weight)),
            *(weight.dtype == torch.bfloat16, residual.dtype == torch.bfloat16, torch.get_num_threads(), 0),
            *(eps, residual.data_ptr(), given, weight.data_ptr(), normed.data_ptr(), added),
        )
    )
    return normed, total
