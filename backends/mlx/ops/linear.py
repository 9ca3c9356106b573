"""The product of linear layers: MLX's own product, or on a CPU NumPy's."""

import mlx.core as mx
import numpy as np

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import numpy_linear
from mamba_core.kernels import choose
from mamba_core.selftest import Trial


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
    available = {"numpy": numpy_linear.reason(default_device(), x, weight), "plain": None}
    return choose(kernel, available, "linear", "mlx", default_device())


def plain(x, weight):
    return x @ weight.T


KERNELS = {"numpy": numpy_linear.linear, "plain": plain}


def trials(device: str):
    for dtype, rows in (("float32", 300), ("bfloat16", 3)):
        rng = np.random.default_rng(0)
        arrays = {"x": (rng.normal(size=(2, rows, 67)), dtype), "weight": (rng.normal(size=(129, 67)) / 8, dtype)}
        outputs = {"y": ((2, rows, 129), dtype)}
        yield Trial(f"{dtype}, {rows} rows", dtype, arrays, outputs, lambda kernel, *given: (KERNELS[kernel](*given),))
