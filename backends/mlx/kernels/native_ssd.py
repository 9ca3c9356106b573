"""The recurrence of Mamba-2 in C++ on a CPU: all of the op in one pass over its inputs, by chunks.

MLX is lazy, but this kernel computes when it is called, and has its inputs computed. Inside `mx.compile` and `mx.vmap`
it cannot.
"""

import mlx.core as mx

from mamba_core.backends.mlx.kernels.native_tensors import call as run
from mamba_core.backends.mlx.kernels.native_tensors import zeros, zeros_like
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only
from mamba_core.backends.native import abi, library


def native(call, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, h0):
    """(y, final state), as `ops.ssd.sequential`."""
    dtype = x.dtype
    if any(value is not None and value.dtype != dtype for value in (dt, B, C, z)):
        x, dt, B, C, z = (_float32(value) for value in (x, dt, B, C, z))
    A, D, dt_bias, h0 = (_float32(value) for value in (A, D, dt_bias, h0))
    settings = (x.shape, B.shape[2], bool(dt_softplus), tuple(map(float, dt_limit)))
    x, B, C, z = (None if value is None else value.flatten(2) for value in (x, B, C, z))
    y, h, _ = _native(x, dt, A, B, C, D, z, dt_bias, h0, call.mask, call.restart, settings)
    return y.reshape(settings[0]).astype(dtype), h


@mx.custom_function
def _native(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart, settings):
    """(y, final state, boundaries for the gradient). x, y and z (b, l, h p), B and C (b, l, g n).

    settings: the shape (b, l, h, p), the groups, whether with the softplus, and the limit of the step sizes.
    """
    (batch, length, heads, channels), groups, *_ = settings
    states = B.shape[2] // groups
    results = {"y": zeros(x.shape, x.dtype), "final_state": zeros((batch, heads, channels, states))}
    results["boundaries"] = zeros((library.count_ssd_boundaries(batch, length, heads, channels, states),))
    given = _named(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart)
    run(library.ssd, _arguments(given, settings), given, results)
    return tuple(results.values())


@_native.vjp
def _native_vjp(inputs, cotangents, outputs):
    *arrays, settings = inputs
    given = _named(*arrays)
    dy, dfinal_state, _ = cotangents
    arriving = {"dy": dy, "dfinal_state": dfinal_state, "boundaries": outputs[2]}
    gradients = zeros_like(given)
    run(library.ssd_backward, _arguments(given, settings), given | arriving, gradients)
    gradients = first_derivative_only(gradients, arrays, cotangents)
    return *(gradients.get(f"d{name}") for name in given), None


reverse_only(_native)


def _named(x, dt, A, B, C, D, z, dt_bias, h0, mask, restart):
    """By the library's names."""
    named = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    return named | {"initial_state": h0, "mask": mask, "restart": restart}


def _arguments(given, settings):
    (batch, length, heads, channels), groups, dt_softplus, (least, most) = settings
    x, B, D = given["x"], given["B"], given["D"]
    options = (x.dtype == mx.bfloat16, dt_softplus, D is not None and D.ndim == 2, library.threads())
    sizes = (batch, length, heads, channels, B.shape[2] // groups, groups)
    return abi.Ssd(*sizes, *options, least=least, most=most)


def _float32(value):
    return None if value is None else value.astype(mx.float32)
