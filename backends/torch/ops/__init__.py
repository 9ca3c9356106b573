"""The ops, a file each: an op's plain form, its kernels by name, and the choice of one."""

import torch

from mamba_core import discovery, selftest
from mamba_core.backends.torch.arrays import devices
from mamba_core.kernels import Kernels, choose

FOLDER = "backends.torch.ops"
# torch.compile calls it while it traces, and does not trace it.
torch.compiler.assume_constant_result(selftest.passes)


def available_kernels(device: str | None = None, dtype: torch.dtype | None = None) -> dict[str, dict[str, str | None]]:
    """Op -> its kernels, fastest first: None for one that runs on the device, else why it does not."""
    device = torch.device(device or devices()[0])
    return {op: module.kernels(device, dtype) for op, module in discovery.modules(FOLDER).items()}


def chosen(policy: Kernels, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Op -> the kernel that a model with that policy uses on that device, in that dtype."""
    modules = discovery.modules(FOLDER)
    return {
        op: choose(policy.of(op), module.kernels(device, dtype), op, "torch", device) for op, module in modules.items()
    }
