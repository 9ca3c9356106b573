"""The MLX backend: Apple silicon, CUDA and CPU. Models are `mlx.nn.Module`s.

This module is a `mamba_core.backend.Backend`.
"""

# ruff: noqa: F401, N813 (a backend is the functions that stand here)

from mamba_core.backends.mlx.arrays import devices, from_numpy, in_force, peak_memory, to_numpy, vjp
from mamba_core.backends.mlx.decoding import choose, decode, distribution, fork, prefill
from mamba_core.backends.mlx.ops import kernels
from mamba_core.backends.mlx.ops.causal_conv import causal_conv, causal_conv_step
from mamba_core.backends.mlx.ops.selective_scan import selective_scan, selective_step
from mamba_core.backends.mlx.stack import explain
from mamba_core.backends.mlx.training import Trainer as trainer
from mamba_core.backends.mlx.training import loss_and_gradients
from mamba_core.backends.mlx.weights import build, parameters

name = "mlx"
