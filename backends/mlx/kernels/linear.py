"""Linear layers on a CPU, now, where MLX's own product is slow: its wheels for Linux have no fast BLAS.

By NumPy, which has; but for few rows in bfloat16, whose weights it could not read as they are, by the native library.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mamba_core.backends.mlx.kernels.memory import are_traced, view, zeros
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only
from mamba_core.backends.native import abi, library

FASTER = sys.platform != "darwin"
# Multiply-adds: fewer take no longer in MLX than the call does.
LEAST = 2**16
FEW_ROWS = 8


def call(layer: nn.Module, x: mx.array, kernels: str) -> mx.array:
    """layer(x). kernels: the model's."""
    if type(layer) is not nn.Linear:
        return layer(x)
    y = linear(x, layer.weight, kernels)
    return y + layer.bias if "bias" in layer else y


def linear(x: mx.array, weight: mx.array, kernels: str) -> mx.array:
    """x (..., in) times the transpose of weight (out, in)."""
    return _linear(x, weight) if _runs(x, weight, kernels) else x @ weight.T


def _runs(x, weight, kernels) -> bool:
    """Whether it is to be computed here: at once, and once differentiable, as all kernels but "sequential" are."""
    return (
        FASTER
        and kernels != "sequential"
        and mx.default_device().type.name == "cpu"
        and x.dtype == weight.dtype
        and x.size * len(weight) >= LEAST
        and not are_traced((x, weight))
    )


@mx.custom_function
def _linear(x, weight):
    rows = x.reshape(-1, x.shape[-1])
    few = x.dtype == mx.bfloat16 and len(rows) <= FEW_ROWS and library.missing() is None
    y = _few(rows, weight) if few else _product(rows, weight.T)
    return y.astype(x.dtype).reshape(*x.shape[:-1], len(weight))


@_linear.vjp
def _linear_vjp(inputs, dy, output):
    x, weight = inputs
    dy, rows = dy.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
    gradients = {"dx": _product(dy, weight).astype(x.dtype).reshape(x.shape)}
    gradients["dweight"] = _product(dy.T, rows).astype(x.dtype)
    return tuple(first_derivative_only(gradients, inputs, dy).values())


reverse_only(_linear)


def _product(a, b):
    """Of two matrices, in float32."""
    y, a, b = zeros((len(a), b.shape[1])), a.astype(mx.float32), b.astype(mx.float32)
    mx.eval(y, a, b)
    np.matmul(view(a), view(b), out=view(y))
    return y


def _few(x, weight):
    """x (b, in) times the transpose of weight (out, in), both bfloat16, in float32."""
    y, x, weight = zeros((len(x), len(weight))), mx.contiguous(x), mx.contiguous(weight)
    mx.eval(y, x, weight)
    settings = (*x.shape, len(weight), True, False, library.threads(), 0)
    matrix = abi.Matrix(_address(weight), None)
    library.linear_step(abi.LinearStep(*settings, _address(x), matrix, _address(y)))
    return y


def _address(value) -> int:
    return view(value).ctypes.data
