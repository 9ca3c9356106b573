"""The causal convolution and its SiLU in C++ on a CPU, and its gradient: one pass over inputs as they come."""

from collections.abc import Callable

import jax.numpy as jnp

from mamba_core.backends.jax.kernels.operator import NATIVE, differentiable, library_calls
from mamba_core.backends.native import abi

ARGUMENTS = ("x", "weight", "bias", "initial_state", "mask", "restart")


def beside(plain: Callable) -> Callable:
    """The kernel, with the arguments of its twin `plain` and `portable` as the scan's kernel has it."""

    def run_plain(x, weight, bias, state, mask, restart, *, silu):
        return plain(x, weight.T, bias, state, mask, restart, activation="silu" if silu else None)

    calls = library_calls("conv", abi.Conv, ARGUMENTS, _settings)
    conv = differentiable(NATIVE, "conv", *calls, ARGUMENTS, run_plain)

    def native(x, weight, bias, state, mask, restart, order=None, inverse=None, *, activation, portable=False):
        weight, bias = weight.T.astype(jnp.float32), None if bias is None else bias.astype(jnp.float32)
        return conv(x, weight, bias, state, mask, restart, silu=activation == "silu", portable=portable)

    return native


def _settings(x, weight, *_, silu):
    b, l, e = x
    return {"b": b, "l": l, "e": e, "k": weight[0], "silu": silu}
