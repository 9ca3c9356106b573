"""The PyTorch backend: CPU, CUDA and MPS. Models are `torch.nn.Module`s.

This module is a `mamba_core.backend.Backend`.
"""

from mamba_core import discovery
from mamba_core.backends.torch import ops
from mamba_core.backends.torch.arrays import (
    device_facts,
    devices,
    from_numpy,
    in_force,
    is_capturing,
    on_device,
    peak_memory,
    to_numpy,
    vjp,
)
from mamba_core.backends.torch.decoding import choose, decode, distribution, fork, prefill
from mamba_core.backends.torch.ops import available_kernels
from mamba_core.backends.torch.quantization import quantize
from mamba_core.backends.torch.stack import explain
from mamba_core.backends.torch.state import cut, with_room
from mamba_core.backends.torch.training import Trainer as trainer  # noqa: N813 (the protocol's name)
from mamba_core.backends.torch.training import loss_and_gradients
from mamba_core.backends.torch.weights import build, foreign, layer, parameters

__all__ = [
    "available_kernels",
    "build",
    "choose",
    "cut",
    "decode",
    "device_facts",
    "devices",
    "distribution",
    "explain",
    "foreign",
    "fork",
    "from_numpy",
    "in_force",
    "is_capturing",
    "layer",
    "loss_and_gradients",
    "name",
    "on_device",
    "op",
    "parameters",
    "peak_memory",
    "prefill",
    "quantize",
    "to_numpy",
    "trainer",
    "vjp",
    "with_room",
]

name = "torch"


def op(name: str):
    return discovery.find(ops.FOLDER, name)
