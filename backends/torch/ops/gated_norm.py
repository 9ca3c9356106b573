"""The norm of Mamba-2 between its recurrence and its output projection, with the gate."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.arrays import at_least_float32
from mamba_core.backends.torch.kernels import triton_gated_norm
from mamba_core.backends.torch.kernels.triton import linear_dtype
from mamba_core.backends.torch.ops.rms_norm import rms_norm
from mamba_core.kernels import takes
from mamba_core.selftest import Trial


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, norm_before_gate: bool, kernel: str = "auto"
) -> Tensor:
    """RMSNorm(y * silu(z)) * weight, or RMSNorm(y) * weight * silu(z), of each group of channels in float32.

    y and z are (..., e), weight (e,). The result is in the dtype of the weight, or of autocast where a kernel runs.
    """
    name = "triton" if is_fused(kernel, y, z, weight, groups) else "plain"
    return KERNELS[name](y, z, weight, groups, eps, norm_before_gate)


def kernels(device: torch.device, dtype: torch.dtype | None = None, width: int = 0) -> dict[str, str | None]:
    """Fastest first, for weights of that dtype and groups of that width: None for a kernel that runs there."""
    dtypes = () if dtype is None else (dtype,)
    return {"triton": triton_gated_norm.reason(device, width, *dtypes), "plain": None}


def is_fused(asked: str, y: Tensor, z: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether the kernel computes it, of those that a policy asks for."""
    if asked not in ("auto", "triton"):
        return False
    # What a replaced layer gives may have another shape, or a dtype that no kernel reads.
    if not (y.shape == z.shape and y.shape[-1:] == weight.shape and y.device == z.device == weight.device):
        return False
    if len(weight) % groups:
        return False
    dtypes = (y.dtype, z.dtype, weight.dtype)
    if triton_gated_norm.reason(y.device, len(weight) // groups, *dtypes) is not None:
        return False
    return takes(asked, "triton", "gated_norm", "torch", y.device)


def _triton(y, z, weight, groups, eps, norm_before_gate):
    return triton_gated_norm.gated_norm(y, z, weight, groups, eps, norm_before_gate, linear_dtype(weight))


def plain(y, z, weight, groups, eps, norm_before_gate):
    gate = F.silu(at_least_float32(z))
    y = at_least_float32(y)
    y = y if norm_before_gate else y * gate
    grouped = y.unflatten(-1, (groups, y.shape[-1] // groups))
    normed = rms_norm(grouped, None, eps).flatten(-2)
    normed = normed * at_least_float32(weight)
    return (normed * gate if norm_before_gate else normed).to(weight.dtype)


# Fastest first.
KERNELS = {"triton": _triton, "plain": plain}
# A call each to try the kernel with: dtype, shape, groups, and whether the norm comes before the gate.
TRIALS = (("float32", (2, 33, 66), 2, False), ("float32", (1, 7, 9), 1, True), ("bfloat16", (2, 1, 129), 3, False))


def trials(device: str):
    for dtype, shape, groups, before in TRIALS:
        rng, wide = np.random.default_rng(0), (*shape[:-1], 2 * shape[-1])
        arrays = {"yz": (rng.normal(size=wide), dtype), "weight": (rng.normal(size=shape[-1:]), dtype)}

        def call(kernel, yz, weight, groups=groups, before=before):
            # Slices of a wider array, as in a mixer.
            return (KERNELS[kernel](*yz.chunk(2, dim=-1), weight, groups, 1e-5, before),)

        yield Trial(f"{dtype} {shape}, {groups} groups", dtype, arrays, {"normed": (shape, dtype)}, call)
