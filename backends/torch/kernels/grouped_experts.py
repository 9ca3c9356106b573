"""Mixtures of experts by one product of all rows, in which each group of rows has a weight of its own, on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.arrays import at_least_float32

# Elements of bfloat16 that fill the 16 bytes at which each row must begin.
ALIGNED = 8


def reason(device: torch.device, dtype: torch.dtype | None, sizes: tuple[int, ...] = ()) -> str | None:
    """Why there is no such product on that device, for that dtype and those lengths of rows; None if there is one."""
    if device.type != "cuda":
        return "it runs on CUDA only"
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if dtype not in (None, torch.bfloat16):
        return f"x is {str(dtype).removeprefix('torch.')}, and it computes bfloat16"
    if any(size % ALIGNED for size in sizes):
        return f"rows have {' and '.join(map(str, sizes))} elements, and it takes multiples of {ALIGNED}"
    return None


def grouped(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """(n, d): see `ops.mixture_of_experts.KERNELS`. The host waits for nothing."""
    experts, top_k = len(gate_up), chosen.shape[1]
    # A row that does not count is zero, and so is what any expert makes of it.
    flat = chosen.clamp(max=experts - 1).flatten()
    order = flat.argsort(stable=True)
    ends = (flat[order, None] <= torch.arange(experts, device=x.device)).sum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], gate_up.mT, offs=ends).chunk(2, dim=-1)
    found = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    # Each row's experts in their order, so that the sum is the same every time.
    found = at_least_float32(found[order.argsort()]).view(*chosen.shape, -1)
    return (found * weights[..., None]).sum(1).to(x.dtype)
