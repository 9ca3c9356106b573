"""The JAX backend: CPU, GPU and TPU. Models are `flax.nnx.Module`s. This module is the `mamba_core.backend.Backend`."""

from mamba_core.backends.jax import ops, training
from mamba_core.backends.jax.arrays import devices, from_numpy, peak_memory, to_numpy, vjp
from mamba_core.backends.jax.decoding import choose, decode, distribution, fork, prefill
from mamba_core.backends.jax.ops.causal_conv import causal_conv, causal_conv_step
from mamba_core.backends.jax.ops.selective_scan import selective_scan, selective_step
from mamba_core.backends.jax.stack import explain
from mamba_core.backends.jax.training import loss_and_gradients
from mamba_core.backends.jax.weights import build, parameters

name = "jax"
# After all imports of the package of this name, each of which would take the function's place.
kernels = ops.kernels
trainer = training.Trainer

__all__ = [
    "build",
    "causal_conv",
    "causal_conv_step",
    "choose",
    "decode",
    "devices",
    "distribution",
    "explain",
    "fork",
    "from_numpy",
    "kernels",
    "loss_and_gradients",
    "name",
    "parameters",
    "peak_memory",
    "prefill",
    "selective_scan",
    "selective_step",
    "to_numpy",
    "trainer",
    "vjp",
]
