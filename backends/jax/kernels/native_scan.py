"""The scan in C++ on a CPU and its gradient: one pass over inputs as they come."""

from collections.abc import Callable

import jax.numpy as jnp

from mamba_core.backends.jax.kernels.operator import NATIVE, differentiable, library_calls
from mamba_core.backends.native import abi, library

ARGUMENTS = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "mask", "restart")


def beside(plain: Callable) -> Callable:
    """The kernel, with the arguments of its twin `plain` and `portable`.

    portable: an exported module, or one for another device than a CPU, has the twin in the kernel's place. If False,
    compiling such a module raises a ValueError.
    """
    calls = library_calls("scan", abi.Scan, ARGUMENTS, _settings, kept=("boundaries",))
    scan = differentiable(NATIVE, "scan", *calls, ARGUMENTS, plain, kept=[_boundaries])

    def native(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, **options):
        dtype = x.dtype
        if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
            x, delta, B, C, z = (None if value is None else value.astype(jnp.float32) for value in (x, delta, B, C, z))
        y, h = scan(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, **options)
        return y.astype(dtype), h

    return native


def _settings(x, delta, A, *_, delta_softplus):
    b, l, e = x
    return {"b": b, "l": l, "e": e, "n": A[1], "delta_softplus": delta_softplus}


def _boundaries(x, delta, A, *_):
    return (library.count_boundaries(*x, A[1]),)
