"""The product of linear layers, and that of the head."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.arrays import at_least_float32
from mamba_core.backends.torch.kernels import native_step, onednn_linear
from mamba_core.kernels import Kernels
from mamba_core.selftest import Trial


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernel: str = "auto") -> Tensor:
    """As `F.linear`. The products of a few rows, which read the weight once, are a native step where blocks are."""
    if kernel == "auto" and bias is None and native_step.head_reason(x, weight) is None:
        return native_step.head(x, weight).to(x.dtype)
    if kernel != "plain" and onednn_linear.runs(x, weight):
        return onednn_linear.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def head(hidden: Tensor, weight: Tensor, policy: Kernels) -> Tensor:
    """Logits, at least in float32. Those of one position are a native step where blocks are."""
    if policy.of("block_step") in ("auto", "native") and native_step.head_reason(hidden, weight) is None:
        return native_step.head(hidden, weight)
    return at_least_float32(linear(hidden, weight, kernel=policy.of("linear")))


def kernels(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Fastest first, for arrays of that dtype: None for a kernel that runs there, else why not."""
    return {"onednn": onednn_linear.reason(device, dtype), "plain": None}


# Fastest first.
KERNELS = {"onednn": onednn_linear.linear, "plain": F.linear}


def trials(device: str):
    rng, shapes = np.random.default_rng(0), {"x": (2, 33, 67), "weight": (129, 67), "bias": (129,)}
    arrays = {name: (rng.normal(size=shape) / 8, "float32") for name, shape in shapes.items()}
    outputs = {"y": ((2, 33, 129), "float32")}
    yield Trial("float32", "float32", arrays, outputs, lambda kernel, *given: (KERNELS[kernel](*given),))
