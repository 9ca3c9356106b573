"""Arrays as the native library takes them: computed, by pointer and strides."""

import mlx.core as mx
import numpy as np

from mamba_core.backends.mlx.arrays import dtype_name
from mamba_core.backends.native import abi, library

DTYPES = tuple(getattr(mx, name) for name in abi.DTYPES)


def reason(device: str, dtype: mx.Dtype | None = None, arrays=()) -> str | None:
    """Why no native kernel can run on that device, for x of that dtype and these arrays; None if one can."""
    if device != "cpu":
        return "it runs on a CPU only"
    if dtype is not None and dtype not in DTYPES:
        return f"x is {dtype_name(dtype)}, and it computes {' and '.join(abi.DTYPES)}"
    if are_traced(arrays):
        return "it computes at once, and inside mx.compile and mx.vmap there is nothing to compute with"
    return library.missing()


def call(function, arguments, given: dict[str, mx.array | None], results: dict[str, mx.array]) -> None:
    """Run a function of the library. It writes the results, fresh arrays, in place, where it knows their names."""
    named = {name: _laid_out(name, value) for name, value in given.items() if value is not None} | results
    mx.eval(list(named.values()))
    for name in dict(arguments._fields_).keys() & named.keys():
        memory = view(named[name])
        strides = (stride // memory.itemsize for stride in memory.strides[:2])
        pointer = memory.ctypes.data
        setattr(arguments, name, abi.Sequence(pointer, *strides) if name in abi.SEQUENCES else pointer)
    function(arguments)


def zeros_like(given: dict[str, mx.array | None]) -> dict[str, mx.array]:
    """An array for the gradient of each array, under the gradient's name."""
    return {f"d{name}": zeros(value.shape, value.dtype) for name, value in given.items() if value is not None}


def zeros(shape, dtype: mx.Dtype = mx.float32) -> mx.array:
    """As `mx.zeros`, but filled by bytes: that takes half the time on a CPU. MLX has no arrays that are not filled."""
    return mx.zeros((*shape, dtype.size), mx.uint8).view(dtype).squeeze(-1)


def detached_copies(values) -> list[mx.array]:
    """Computed copies of the arrays, which do not keep alive what the arrays were computed from."""
    mx.eval(values)
    return [mx.array(view(value)).view(value.dtype) for value in values]


def _laid_out(name, value):
    """A sequence needs its channels side by side, as in a slice of a wider array; all else must be contiguous."""
    if name in abi.SEQUENCES:
        mx.eval(value)
        if value.shape[2] == 1 or view(value).strides[2] == value.itemsize:
            return value
    return mx.contiguous(value)


def view(value) -> np.ndarray:
    """The array's own memory; NumPy knows no bfloat16."""
    return np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value, copy=False)


def are_traced(arrays) -> bool:
    """Whether the arrays only stand for arrays, inside a transformation, and cannot be computed."""
    try:
        mx.eval(arrays)
    except ValueError:
        return True
    return False
