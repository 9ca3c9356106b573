"""The recurrence of Mamba-2 in C++ on a CPU and its gradient: one pass over inputs as they come, by chunks."""

from collections.abc import Callable

import jax.numpy as jnp

from mamba_core.backends.jax.kernels.operator import NATIVE, differentiable, library_calls
from mamba_core.backends.native import abi, library

ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "mask", "restart")


def beside(plain: Callable) -> Callable:
    """The kernel, with the arguments of its twin `plain` and `portable`.

    portable: an exported module, or one for another device than a CPU, has the twin in the kernel's place. If False,
    compiling such a module raises a ValueError.
    """

    def plain_flat(x, dt, A, B, C, D, z, *others, groups, **options):
        """The twin of sequences with one axis of channels."""
        y, h = plain(
            *(_parted(x, len(A)), dt, A, _parted(B, groups), _parted(C, groups), D, _parted(z, len(A)), *others),
            **options,
        )
        return _flat(y), h

    calls = library_calls("ssd", abi.Ssd, ARGUMENTS, _settings, kept=("boundaries",))
    ssd = differentiable(NATIVE, "ssd", *calls, ARGUMENTS, plain_flat, kept=[_boundaries])

    def native(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, **options):
        dtype = x.dtype
        if any(value is not None and value.dtype != dtype for value in (dt, B, C, z)):
            x, dt, B, C, z = (None if value is None else value.astype(jnp.float32) for value in (x, dt, B, C, z))
        A, D, dt_bias, h0 = (None if value is None else value.astype(jnp.float32) for value in (A, D, dt_bias, h0))
        if h0 is None:
            h0 = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[3]), jnp.float32)
        flat = (_flat(x), dt, A, _flat(B), _flat(C), D, _flat(z))
        y, h = ssd(*flat, dt_bias, h0, mask, restart, groups=B.shape[2], **options)
        return y.reshape(x.shape).astype(dtype), h

    return native


def _settings(x, dt, A, B, C, D, *_, groups, dt_softplus, dt_limit):
    b, l, channels = x
    sizes = {"b": b, "l": l, "h": A[0], "p": channels // A[0], "n": B[2] // groups, "g": groups}
    least, most = map(float, dt_limit)
    return sizes | {"dt_softplus": dt_softplus, "D_per_channel": len(D) == 2, "least": least, "most": most}


def _boundaries(x, dt, A, B, C, D, z, dt_bias, h0, *_):
    return (library.count_ssd_boundaries(*x[:2], *h0[1:]),)


def _flat(value):
    return None if value is None else value.reshape(*value.shape[:2], value.shape[2] * value.shape[3])


def _parted(value, count: int):
    return None if value is None else value.reshape(*value.shape[:2], count, value.shape[2] // count)
