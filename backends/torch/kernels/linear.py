"""Linear layers in float32 on a CPU, by oneDNN where it is faster than MKL, which torch takes for them.

MKL uses AVX-512 on Intel's processors only: on others it has half the speed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from mamba_core.backends.torch.kernels.operator import KINDS, transformed
from mamba_core.backends.torch.kernels.step import as_built

# Multiply-adds: of fewer the copies to oneDNN's tensors and back take as long as is saved.
LEAST = 2**23


def _faster() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


FASTER = _faster()
# oneDNN on dense tensors, as torch's compiler calls it: without copies to oneDNN's and back, and without a gradient.
DIRECT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def call(layer: nn.Module, x: Tensor, kernels: str) -> Tensor:
    """layer(x). kernels: the model's."""
    own = FASTER and as_built(nn.Linear, layer)
    return linear(x, layer.weight, layer.bias, kernels=kernels) if own else layer(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernels: str) -> Tensor:
    """As `F.linear`."""
    if not _runs(x, weight, kernels):
        return F.linear(x, weight, bias)
    if DIRECT is not None and not _is_differentiated(x, weight, bias):
        return DIRECT(x, weight, bias, "none", [], "")
    return F.linear(x.to_mkldnn(), weight, bias).to_dense()


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)


def _runs(x: Tensor, weight: Tensor, kernels: str) -> bool:
    """Whether oneDNN is to compute it: once differentiable, as all kernels but "sequential" are, and not compiled."""
    return (
        FASTER
        and kernels != "sequential"
        and type(x) is Tensor
        and type(weight) in KINDS
        and x.dtype is torch.float32 is weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.shape[-1] == weight.shape[1]
        and not torch.compiler.is_compiling()
        and x.shape[:-1].numel() * weight.numel() >= LEAST
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
        and forward_ad._current_level < 0
    )
