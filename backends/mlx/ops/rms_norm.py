"""RMS norm: x / sqrt(mean(x^2) + eps) * weight."""

import functools

import mlx.core as mx

from mamba_core.backends.mlx.arrays import keep_float32
from mamba_core.kernels import choose


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, *, kernel: str = "auto") -> mx.array:
    """In float32; returned in the dtype of the weight, or without a weight in that of x."""
    keep_float32()
    return KERNELS[chosen(kernel)](x, weight, eps)


def kernels(device: str | None = None, dtype: mx.Dtype | None = None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS)


@functools.cache
def chosen(kernel: str) -> str:
    """The kernel of that name, or for "auto" the fastest.

    Raises:
        ValueError: there is no such kernel.
    """
    return choose(kernel, kernels(), "rms_norm")


def plain(x, weight, eps):
    factor, dtype = (None, x.dtype) if weight is None else (weight.astype(mx.float32), weight.dtype)
    return mx.fast.rms_norm(x.astype(mx.float32), factor, eps).astype(dtype)


KERNELS = {"plain": plain}
