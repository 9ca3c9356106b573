"""The RMS norm, and the sum of a residual block together with the norm of the next."""

import numpy as np
import torch
from torch import Tensor

from mamba_core.backends.torch.arrays import at_least_float32
from mamba_core.backends.torch.kernels import native_norm, native_tensors, triton_norm
from mamba_core.backends.torch.kernels.triton import linear_dtype
from mamba_core.kernels import Kernels, takes
from mamba_core.selftest import Trial


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, returned in the dtype of the weight; without one, in that of x.

    A float64 x is normed in float64.
    """
    dtype = x.dtype if weight is None else weight.dtype
    x = at_least_float32(x)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * at_least_float32(weight)).to(dtype)


def kernels(device: torch.device, dtype: torch.dtype | None = None, size: int = 0) -> dict[str, str | None]:
    """Fastest first, for weights of that dtype and size: None for a kernel that runs there, else why not."""
    reasons = {"native": native_tensors.reason(device, dtype), "triton": triton_norm.reason(device, dtype, size)}
    return dict.fromkeys(KERNELS) | reasons


def fused_kernel(policy: Kernels, residual: Tensor, weight: Tensor) -> str | None:
    """The kernel that adds and norms such a residual stream in one pass; None if the plain form is to be used."""
    asked = policy.of("rms_norm")
    if asked in ("auto", "native") and native_norm.reason(residual, weight) is None:
        return "native"
    if asked in ("auto", "triton") and triton_norm.reason(residual.device, residual.dtype, len(weight)) is None:
        if triton_norm.reason(weight.device, weight.dtype, len(weight)) is not None:
            return None
        return "triton" if takes(asked, "triton", "rms_norm", "torch", weight.device) else None
    return None


def add_norm(residual: Tensor, hidden: Tensor | None, weight: Tensor, eps: float, kernel: str) -> tuple[Tensor, Tensor]:
    """(the norm of residual + hidden in the dtype in which a linear is computed, that sum); hidden may be None."""
    # What a replaced layer gives may have another shape, or a dtype that no kernel reads.
    known = (weight.dtype, residual.dtype, linear_dtype(weight))
    if hidden is not None and not (hidden.shape == residual.shape and hidden.dtype in known):
        kernel = "plain"
    return KERNELS[kernel](residual, hidden, weight, eps)


def _triton(residual, hidden, weight, eps):
    return triton_norm.add_norm(residual, hidden, weight, eps, linear_dtype(weight))


def _plain(residual, hidden, weight, eps):
    total = residual if hidden is None else residual + hidden
    return rms_norm(total, weight, eps), total


# Fastest first.
KERNELS = {"native": native_norm.add_norm, "triton": _triton, "plain": _plain}
# A call each to try the kernels with: dtype, shape, and whether there is a sum.
TRIALS = (("float32", (2, 33, 67), True), ("float32", (1, 7, 8), False), ("bfloat16", (2, 1, 129), True))


def trials(device: str):
    def call(kernel, residual, weight, hidden=None):
        return add_norm(residual, hidden, weight, 1e-5, kernel)

    for dtype, shape, adds in TRIALS:
        rng = np.random.default_rng(0)
        arrays = {"residual": (rng.normal(size=shape), "float32"), "weight": (rng.normal(size=shape[-1:]), dtype)}
        arrays |= {"hidden": (rng.normal(size=shape), dtype)} if adds else {}
        outputs = {"norm": (shape, dtype), "sum": (shape, "float32")}
        yield Trial(f"{dtype} {shape}", dtype, arrays, outputs, call, forward_only=("native",))
