"""The losses of labelled tasks, as `mamba_core.spec.losses` has them; the language model's are its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.arrays import at_least_float32


def cross_entropy(logits: Tensor, targets: Tensor, counts: Tensor, weights=None) -> Tensor:
    """logits (..., o) float32, targets (...) int, counts (...) bool."""
    targets = torch.where(counts, targets.long(), 0)
    chosen = F.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    shares = counts.to(logits.dtype)
    shares = shares if weights is None else shares * logits.new_tensor(weights)[targets]
    return -(shares * chosen).sum() / shares.sum()


def binary_cross_entropy(logits: Tensor, targets: Tensor, counts: Tensor, weights=None) -> Tensor:
    """logits, targets (b, o), counts (b,) bool."""
    shares = counts[:, None].to(logits.dtype).expand_as(logits)
    shares = shares if weights is None else shares * logits.new_tensor(weights)
    return (shares * (F.softplus(logits) - targets * logits)).sum() / shares.sum()


def squared_error(values: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """All of one shape."""
    difference = torch.where(counts, values - torch.where(counts, targets, 0.0), 0.0)
    return difference.square().sum() / counts.sum()


def pinball(values: Tensor, targets: Tensor, counts: Tensor, quantiles) -> Tensor:
    """values (..., q), targets and counts (...)."""
    counts, levels = counts[..., None], values.new_tensor(quantiles)
    below = torch.where(counts, torch.where(counts, targets[..., None], 0.0) - values, 0.0)
    return (torch.where(below > 0, levels, levels - 1) * below).sum() / (counts.sum() * len(quantiles))


def balance_loss(routers: list[Tensor], top_k: int, mask: Tensor | None = None) -> Tensor:
    """Of the logits (b, l, experts) of each router: `spec.ops.mixture_of_experts.balance_loss`. mask: (b, l) bool."""
    logits = torch.stack([at_least_float32(each) for each in routers])
    experts = logits.shape[-1]
    chosen = F.one_hot(logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k], experts).sum(-2)
    counts = torch.ones_like(logits[..., :1]) if mask is None else mask[..., None].expand_as(logits[..., :1])
    total = counts.sum().clamp(min=1)
    used, mean = (
        torch.where(counts > 0, value, 0.0).flatten(0, 2).sum(0) / total for value in (chosen, logits.softmax(-1))
    )
    return experts * (used * mean).sum()
