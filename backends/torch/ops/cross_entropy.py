"""The cross-entropy of a head's logits, with the head or after it."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import triton, triton_loss
from mamba_core.backends.torch.kernels.triton import linear_dtype
from mamba_core.backends.torch.kernels.triton_loss import IGNORED
from mamba_core.kernels import takes
from mamba_core.selftest import Trial


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The mean or the sum over the targets (b, l) that are not IGNORED; logits (b, l, v)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def fuses_head(kernel: str, weight: Tensor) -> bool:
    """Whether the product with the head's weight is computed with the loss."""
    if kernel not in ("auto", "triton") or triton.reason(weight.device, weight.dtype) is not None:
        return False
    return takes(kernel, "triton", "cross_entropy", "torch", weight.device)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """`cross_entropy` of the logits of hidden (b, l, d), which never stand in memory at once."""
    hidden = hidden.flatten(0, 1).to(linear_dtype(weight))
    total = triton_loss.linear_cross_entropy(hidden, weight, targets.flatten())
    return total if reduction == "sum" else total / (targets != IGNORED).sum()


def kernels(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Fastest first, for weights of that dtype: None for a kernel that runs there, else why not."""
    return {"triton": triton.reason(device, *([] if dtype is None else [dtype])), "plain": None}


# Fastest first.
KERNELS = {"triton": linear_cross_entropy, "plain": cross_entropy}


def trials(device: str):
    def call(kernel, hidden, weight, targets):
        if kernel == "triton":
            return (linear_cross_entropy(hidden, weight, targets),)
        return (cross_entropy(F.linear(hidden, weight).float(), targets),)

    for dtype, (b, l, d, v) in (("float32", (2, 7, 20, 67)), ("bfloat16", (2, 7, 20, 5001))):
        rng = np.random.default_rng(0)
        arrays = {"hidden": (rng.normal(size=(b, l, d)), dtype), "weight": (rng.normal(size=(v, d)), dtype)}
        targets = torch.from_numpy(rng.integers(0, v, (b, l))).to(device)
        targets[0, 3] = IGNORED
        yield Trial(f"{dtype}, {v} tokens", dtype, arrays, {"loss": ((), "float32")}, partial(call, targets=targets))
