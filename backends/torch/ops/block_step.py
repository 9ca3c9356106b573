"""One position of a residual block at once. Its kernels are the ways `native_step` and `cuda_step`."""

import torch

from mamba_core.backends.torch.kernels import native_step, native_tensors, triton_norm, triton_step


def kernels(device: torch.device, dtype: torch.dtype | None = None, size: int = 0) -> dict[str, str | None]:
    """Fastest first, for weights of that dtype: None for a kernel that runs there, else why not."""
    reasons = {"native": native_tensors.reason(device, dtype), "cuda": triton_norm.reason(device, dtype, size)}
    return dict.fromkeys(KERNELS) | reasons


# Fastest first.
KERNELS = {"native": native_step.blocks, "cuda": triton_step.block, "plain": None}
