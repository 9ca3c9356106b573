"""The scan in C++ on a CPU: inputs as they come, all of the op fused, no (b, l, e, n) in memory.

MLX computes lazily, and this now: its inputs are evaluated when it is called. Inside `mx.compile` and `mx.vmap` that
cannot be.
"""

import mlx.core as mx
import numpy as np

from mamba_core.backends import native as library
from mamba_core.backends.mlx.arrays import dtype_name
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only

DTYPES = tuple(getattr(mx, name) for name in library.DTYPES)


def reason(device: str, dtype: mx.Dtype | None = None, arrays=()) -> str | None:
    """Why the kernel cannot run on that device, for x of that dtype and these arrays; None if it can."""
    if device != "cpu":
        return "it runs on a CPU only"
    if dtype is not None and dtype not in DTYPES:
        return f"x is {dtype_name(dtype)}, and it computes {' and '.join(library.DTYPES)}"
    if _are_traced(arrays):
        return "it computes at once, and inside mx.compile and mx.vmap there is nothing to compute with"
    return library.missing()


def native(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
    """The arguments as `selective_scan` is given them, but restart (b, l) bool for the segments."""
    dtype = x.dtype
    if any(value is not None and value.dtype != dtype for value in (delta, B, C, z)):
        x, delta, B, C, z = (_float32(value) for value in (x, delta, B, C, z))
    A, D, delta_bias, h0 = (_float32(value) for value in (A, D, delta_bias, h0))
    y, h, _ = _native(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, bool(delta_softplus))
    return y.astype(dtype), h


@mx.custom_function
def _native(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart, delta_softplus):
    """(y, final state, boundaries for the gradient)."""
    given = _named(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart)
    results = {"y": mx.zeros(x.shape, x.dtype), "final_state": mx.zeros((x.shape[0], *A.shape))}
    results["boundaries"] = mx.zeros(library.count_boundaries(*x.shape, A.shape[1]))
    _call(library.scan, given, results, delta_softplus)
    return tuple(results.values())


@_native.vjp
def _native_vjp(inputs, cotangents, outputs):
    *arrays, delta_softplus = inputs
    given, arriving = _named(*arrays), dict(zip(("dy", "dfinal_state"), cotangents, strict=False))
    gradients = {f"d{name}": mx.zeros(value.shape, value.dtype) for name, value in given.items() if value is not None}
    _call(library.scan_backward, given | arriving | {"boundaries": outputs[2]}, gradients, delta_softplus)
    gradients = first_derivative_only(gradients, arrays, cotangents)
    return *(gradients.get(f"d{name}") for name in given), None


def _refuse(*_):
    raise NotImplementedError("kernel 'native' has no vmap and no forward mode; pass kernel='sequential'")


_native.jvp(_refuse)
_native.vmap(_refuse)


def _named(x, delta, A, B, C, D, z, delta_bias, h0, mask, restart):
    """By the library's names."""
    named = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    return named | {"initial_state": h0, "mask": mask, "restart": restart}


def _call(function, given, results, delta_softplus):
    """The results, fresh arrays, are written in place; those that the library has no name for stay zero."""
    named = {name: _laid_out(name, value) for name, value in given.items() if value is not None} | results
    mx.eval(list(named.values()))
    x = given["x"]
    sizes = (*x.shape, given["A"].shape[1])
    arguments = library.Scan(*sizes, x.dtype == mx.bfloat16, delta_softplus, library.threads())
    for name in library.FIELDS & named.keys():
        view = _view(named[name])
        strides = (stride // view.itemsize for stride in view.strides[:2])
        pointer = view.ctypes.data
        setattr(arguments, name, library.Sequence(pointer, *strides) if name in library.SEQUENCES else pointer)
    function(arguments)


def _laid_out(name, value):
    """A sequence with its channels side by side, as a slice of a wider array has them too; the rest contiguous."""
    if name in library.SEQUENCES:
        mx.eval(value)
        if value.shape[2] == 1 or _view(value).strides[2] == value.itemsize:
            return value
    return mx.contiguous(value)


def _view(value) -> np.ndarray:
    """The array's own memory; NumPy knows no bfloat16."""
    return np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value, copy=False)


def _float32(value):
    return None if value is None else value.astype(mx.float32)


def _are_traced(arrays) -> bool:
    try:
        mx.eval(arrays)
    except ValueError:
        return True
    return False
