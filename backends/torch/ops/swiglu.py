"""A gate and what passes it, which lie side by side: silu(gate) * up."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import triton, triton_swiglu
from mamba_core.kernels import takes
from mamba_core.selftest import Trial


def swiglu(x: Tensor, kernel: str = "auto") -> Tensor:
    """silu(gate) * up, of gate | up (..., 2 i)."""
    return KERNELS["triton" if is_fused(kernel, x) else "plain"](x)


def kernels(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Fastest first, for x of that dtype: None for a kernel that runs there, else why not."""
    return {"triton": triton.reason(device, *([] if dtype is None else [dtype])), "plain": None}


def is_fused(asked: str, x: Tensor) -> bool:
    """Whether the kernel computes it, of those that a policy asks for."""
    if asked not in ("auto", "triton") or triton.reason(x.device, x.dtype) is not None:
        return False
    return takes(asked, "triton", "swiglu", "torch", x.device)


def plain(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


# Fastest first.
KERNELS = {"triton": triton_swiglu.swiglu, "plain": plain}
# A call each to try the kernel with: dtype and shape.
TRIALS = (("float32", (2, 33, 66)), ("float32", (1, 1, 2)), ("bfloat16", (2, 3, 4100)))


def trials(device: str):
    for dtype, shape in TRIALS:
        arrays = {"x": (np.random.default_rng(0).normal(size=shape), dtype)}
        outputs = {"y": ((*shape[:-1], shape[-1] // 2), dtype)}
        yield Trial(f"{dtype} {shape}", dtype, arrays, outputs, lambda kernel, x: (KERNELS[kernel](x),))
