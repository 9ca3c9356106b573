"""The product of linear layers: MLX's own product, or on a CPU NumPy's."""

import mlx.core as mx

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import numpy_linear
from mamba_core.kernels import choose


def linear(x: mx.array, weight: mx.array, kernel: str = "auto") -> mx.array:
    """x (..., in) times the transpose of weight (out, in)."""
    keep_float32()
    return KERNELS[chosen(kernel, x, weight)](x, weight)


def kernels(device: str | None = None, dtype: mx.Dtype | None = None) -> dict[str, str | None]:
    return {"numpy": numpy_linear.reason(device or default_device()), "plain": None}


def chosen(kernel: str, x: mx.array, weight: mx.array) -> str:
    """The kernel of that name, or for "auto" the fastest, for these arrays on MLX's default device.

    Raises:
        ValueError: there is no such kernel, or not for them.
    """
    if kernel == "plain" or (kernel == "auto" and not numpy_linear.pays(x, weight)):
        return "plain"
    return choose(kernel, {"numpy": numpy_linear.reason(default_device(), x, weight), "plain": None}, "linear")


def plain(x, weight):
    return x @ weight.T


KERNELS = {"numpy": numpy_linear.linear, "plain": plain}
