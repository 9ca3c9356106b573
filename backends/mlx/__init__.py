"""The MLX backend: Apple silicon, CUDA and CPU. Models are `mlx.nn.Module`s.

This module is a `mamba_core.backend.Backend`.
"""

# ruff: noqa: F401, N813 (a backend is the functions that stand here)

from mamba_core import discovery
from mamba_core.backends.mlx import ops
from mamba_core.backends.mlx.arrays import (
    device_facts,
    devices,
    from_numpy,
    in_force,
    on_device,
    peak_memory,
    to_numpy,
    vjp,
)
from mamba_core.backends.mlx.decoding import choose, decode, distribution, fork, prefill
from mamba_core.backends.mlx.ops import available_kernels
from mamba_core.backends.mlx.stack import explain
from mamba_core.backends.mlx.state import cut, with_room
from mamba_core.backends.mlx.training import Trainer as trainer
from mamba_core.backends.mlx.training import loss_and_gradients
from mamba_core.backends.mlx.weights import build, foreign, layer, parameters

name = "mlx"


def op(name: str):
    return discovery.find(ops.FOLDER, name)
