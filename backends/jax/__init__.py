"""The JAX backend: CPU, GPU and TPU. Models are `flax.nnx.Module`s. This module is the `mamba_core.backend.Backend`."""

from mamba_core import discovery
from mamba_core.backends.jax import ops
from mamba_core.backends.jax.arrays import device_facts, devices, from_numpy, on_device, peak_memory, to_numpy, vjp
from mamba_core.backends.jax.decoding import choose, decode, distribution, fork, prefill
from mamba_core.backends.jax.ops import available_kernels
from mamba_core.backends.jax.stack import explain
from mamba_core.backends.jax.state import cut, with_room
from mamba_core.backends.jax.training import Trainer as trainer  # noqa: N813 (the protocol's name)
from mamba_core.backends.jax.training import loss_and_gradients
from mamba_core.backends.jax.weights import build, foreign, layer, parameters

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
    "layer",
    "loss_and_gradients",
    "name",
    "on_device",
    "op",
    "parameters",
    "peak_memory",
    "prefill",
    "to_numpy",
    "trainer",
    "vjp",
    "with_room",
]

name = "jax"


def op(name: str):
    return discovery.find(ops.FOLDER, name)
