"""A Mamba-1 mixer between in_proj and out_proj as one operator. Its plain form is the mixer's own lines."""

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_conv, triton_mixer
from mamba_core.backends.torch.ops import selective_scan
from mamba_core.kernels import Kernels


def kernels(
    device: torch.device, dtype: torch.dtype | None = None, width: int | None = None, states: int | None = None
) -> dict[str, str | None]:
    """Fastest first, for a filter of that width and so many states: None for a kernel that runs there, else why not."""
    return {"triton": _reason(device, dtype, width, states), "plain": None}


def is_fused(policy: Kernels, xz: Tensor, width: int, states: int) -> bool:
    """Whether the operator computes it. Chosen by "auto", it leaves alone who asks for another scan or convolution."""
    asked, scan, conv = policy.of("fused_mixer"), policy.of("selective_scan"), policy.of("causal_conv")
    if asked not in ("auto", "triton") or (asked == "auto" and not {scan, conv} <= {"auto", "cuda", "native"}):
        return False
    return _reason(xz.device, xz.dtype, width, states) is None


def _reason(device, dtype, width, states) -> str | None:
    if (why := triton_conv.reason(device, dtype, width)) is not None:
        return why
    # Triton's interpreter, on a CPU, goes with the native scan.
    return selective_scan.kernels(device, dtype, states)["native" if device.type == "cpu" else "cuda"]


# Fastest first.
KERNELS = {"triton": triton_mixer.inner, "plain": None}
