"""Linear layers on a CPU by NumPy: MLX's own product is slow there, because its wheels for Linux have no fast BLAS.

A few rows in bfloat16 are the native library's instead, since NumPy cannot read such weights as they are. The product
is computed when it is asked for, and its inputs with it; its plain twin is `ops.linear.plain`.
"""

import sys

import mlx.core as mx
import numpy as np

from mamba_core.backends.mlx.arrays import dtype_name
from mamba_core.backends.mlx.kernels.native_tensors import are_traced, view, zeros
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only
from mamba_core.backends.native import abi, library

NUMPY_IS_FASTER = sys.platform != "darwin"
# Multiply-adds from which the call pays.
LEAST = 2**16
FEW_ROWS = 8


def reason(device: str, x: mx.array | None = None, weight: mx.array | None = None) -> str | None:
    """Why NumPy cannot compute this product on that device; None if it can."""
    if not NUMPY_IS_FASTER:
        return "MLX's own product is as fast on this system"
    if device != "cpu":
        return "it runs on a CPU only"
    if x is not None and x.dtype != weight.dtype:
        return f"x is {dtype_name(x.dtype)} and the weight {dtype_name(weight.dtype)}"
    if x is not None and are_traced((x, weight)):
        return "it computes at once, and inside mx.compile and mx.vmap there is nothing to compute with"
    return None


def pays(x: mx.array, weight: mx.array) -> bool:
    """Whether there is more to multiply than the call costs."""
    return x.size * len(weight) >= LEAST


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """x (..., in) times the transpose of weight (out, in). One derivative, in reverse mode."""
    return _linear(x, weight)


@mx.custom_function
def _linear(x, weight):
    y = product(x.reshape(-1, x.shape[-1]), weight)
    return y.astype(x.dtype).reshape(*x.shape[:-1], len(weight))


@_linear.vjp
def _linear_vjp(inputs, dy, output):
    x, weight = inputs
    dy, rows = dy.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
    gradients = {"dx": _product(dy, weight).astype(x.dtype).reshape(x.shape)}
    gradients["dweight"] = _product(dy.T, rows).astype(x.dtype)
    return tuple(first_derivative_only(gradients, inputs, dy).values())


reverse_only(_linear)


def product(rows: mx.array, weight: mx.array) -> mx.array:
    """rows (b, in) times the transpose of weight (out, in), of one dtype, in float32 and without a derivative."""
    few = rows.dtype == mx.bfloat16 and len(rows) <= FEW_ROWS and library.missing() is None
    return _few(rows, weight) if few else _product(rows, weight.T)


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
