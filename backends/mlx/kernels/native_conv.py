"""The causal convolution and its SiLU in C++ on a CPU, in one pass; computed when it is called, as the native scan."""

import mlx.core as mx

from mamba_core.backends.mlx.kernels.native_tensors import call as run
from mamba_core.backends.mlx.kernels.native_tensors import zeros, zeros_like
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only
from mamba_core.backends.native import abi, library


def native(call, x, weight, bias, activation, state):
    """(y, final state), as `ops.causal_conv.shifted`."""
    state = None if state is None else state.astype(x.dtype)
    bias = None if bias is None else bias.astype(mx.float32)
    return _native(x, weight.T.astype(mx.float32), bias, state, call.mask, call.restart, activation == "silu")


@mx.custom_function
def _native(x, weight, bias, state, mask, restart, silu):
    """weight is (k, e)."""
    batch, _, channels = x.shape
    results = {"y": zeros(x.shape, x.dtype)}
    results["final_state"] = zeros((batch, weight.shape[0] - 1, channels), x.dtype)
    run(library.conv, _arguments(x, weight, silu), _named(x, weight, bias, state, mask, restart), results)
    return tuple(results.values())


@_native.vjp
def _native_vjp(inputs, cotangents, outputs):
    *arrays, silu = inputs
    given, arriving = _named(*arrays), dict(zip(("dy", "dfinal_state"), cotangents, strict=True))
    gradients = zeros_like(given)
    arguments = _arguments(given["x"], given["weight"], silu)
    run(library.conv_backward, arguments, given | arriving, gradients)
    gradients = first_derivative_only(gradients, arrays, cotangents)
    return *(gradients.get(f"d{name}") for name in given), None


reverse_only(_native)


def _named(x, weight, bias, state, mask, restart):
    """By the library's names."""
    return {"x": x, "weight": weight, "bias": bias, "initial_state": state, "mask": mask, "restart": restart}


def _arguments(x, weight, silu):
    return abi.Conv(*x.shape, weight.shape[0], x.dtype == mx.bfloat16, silu, library.threads())
