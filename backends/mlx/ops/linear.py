"""Linear layers: MLX's own product, or on a CPU NumPy's."""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import numpy_linear
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.kernels import choose


def call(layer: nn.Module, x: mx.array, kernel: str = "auto") -> mx.array:
    """layer(x), by a kernel where the layer is an `nn.Linear` as it was built.

    Any other module is called with (b, l, i), also where x is (b, i).
    """
    if not untouched(nn.Linear, layer):
        return layer(x[:, None])[:, 0] if x.ndim == 2 else layer(x)
    y = linear(x, layer.weight, kernel)
    return y + layer.bias if "bias" in layer else y


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
