"""The scan in C++ on a CPU: all of the op in one pass over its inputs, no (b, l, e, n) in memory.

MLX is lazy, but this kernel computes when it is called, and has its inputs computed. Inside `mx.compile` and `mx.vmap`
it cannot.
"""

import mlx.core as mx

from mamba_core.backends.mlx.kernels.native_tensors import call as run
from mamba_core.backends.mlx.kernels.native_tensors import zeros, zeros_like
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only
from mamba_core.backends.native import abi, library


def native(call, x, delta, A, B, C, D, z, delta_bias, h0, delta_softplus):
    """(y, final state), as `ops.selective_scan.sequential`."""
    dtype = x.dtype
    if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
        x, delta, B, C, z = (_float32(value) for value in (x, delta, B, C, z))
    A, D, delta_bias, h0 = (_float32(value) for value in (A, D, delta_bias, h0))
    y, h, _ = _native(x, delta, A, B, C, D, z, delta_bias, h0, call.mask, call.restart, bool(delta_softplus))
    return y.astype(dtype), h


@mx.custom_function
def _native(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
    """(y, final state, boundaries for the gradient)."""
    results = {"y": zeros(x.shape, x.dtype), "final_state": zeros((x.shape[0], *A.shape))}
    results["boundaries"] = zeros((library.count_boundaries(*x.shape, A.shape[1]),))
    given = _named(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart)
    run(library.scan, _arguments(x, A, delta_softplus), given, results)
    return tuple(results.values())


@_native.vjp
def _native_vjp(inputs, cotangents, outputs):
    *arrays, delta_softplus = inputs
    given = _named(*arrays)
    dy, dfinal_state, _ = cotangents
    arriving = {"dy": dy, "dfinal_state": dfinal_state, "boundaries": outputs[2]}
    gradients = zeros_like(given)
    arguments = _arguments(given["x"], given["A"], delta_softplus)
    run(library.scan_backward, arguments, given | arriving, gradients)
    gradients = first_derivative_only(gradients, arrays, cotangents)
    return *(gradients.get(f"d{name}") for name in given), None


reverse_only(_native)


def _named(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart):
    """By the library's names."""
    named = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    return named | {"initial_state": h0, "mask": mask, "restart": restart}


def _arguments(x, A, delta_softplus):
    return abi.Scan(*x.shape, A.shape[1], x.dtype == mx.bfloat16, delta_softplus, library.threads())


def _float32(value):
    return None if value is None else value.astype(mx.float32)
