"""Linear layers in float32 on a CPU by oneDNN, on processors where it is faster than MKL, which torch uses for them.

MKL uses AVX-512 on Intel's processors only. On others it has half the speed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch import private
from mamba_core.backends.torch.kernels.operator import KINDS

# Multiply-adds. With fewer, the copies to oneDNN's tensors and back cost what is saved.
LEAST = 2**23


def _onednn_is_faster() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


ONEDNN_IS_FASTER = _onednn_is_faster()
# On dense tensors, without copies and without a gradient; None if this torch has no such operator.
ONEDNN_LINEAR = private.onednn_linear


def reason(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why oneDNN is not used on that device, for that dtype; None if it is."""
    if device.type != "cpu":
        return "it runs on a CPU only"
    if dtype not in (None, torch.float32):
        return f"x is {str(dtype).removeprefix('torch.')}, and it computes float32"
    return None if ONEDNN_IS_FASTER else "torch's own is as fast on this processor"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`, once differentiable; for x and weight that `runs` accepts."""
    if ONEDNN_LINEAR is not None and not _is_differentiated(x, weight, bias):
        return ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x.to_mkldnn(), weight, bias).to_dense()


def runs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the faster for this product, and may compute it: neither compiled nor transformed."""
    return (
        ONEDNN_IS_FASTER
        and type(x) is Tensor
        and type(weight) in KINDS
        and x.dtype is torch.float32 is weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.shape[-1] == weight.shape[1]
        and not torch.compiler.is_compiling()
        and x.shape[:-1].numel() * weight.numel() >= LEAST
        and not torch.is_autocast_enabled("cpu")
        and not private.transformed()
        and not private.in_forward_mode()
    )


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
