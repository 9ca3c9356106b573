"""One vector of a row's positions, as `mamba_core.spec.ops.pooling` has it."""

import torch
from torch import Tensor

from mamba_core.backends.torch.arrays import at_least_float32


def pooled(hidden: Tensor, pooling: str, mask: Tensor | None = None) -> Tensor:
    """hidden (b, l, d) to (b, d) in its dtype; zero for a row of which no position counts."""
    batch, length, width = hidden.shape
    if length == 0:
        return hidden.new_zeros(batch, width)
    counts = hidden.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    if pooling == "mean":
        kept = torch.where(counts[..., None], at_least_float32(hidden), 0.0)
        return (kept.sum(1) / counts.sum(1, keepdim=True).clamp(min=1)).to(hidden.dtype)
    if pooling == "max":
        best = torch.where(counts[..., None], hidden, -torch.inf).argmax(1)
    else:
        at = torch.arange(length, device=hidden.device)
        best = torch.where(counts, at if pooling == "last" else -at, -length).argmax(1)[:, None].expand(-1, width)
    return torch.where(counts.any(1)[:, None], hidden.gather(1, best[:, None])[:, 0], 0.0)
