"""The native library on NumPy arrays, with the vector width and the threads to choose."""

import ml_dtypes
import numpy as np

from mamba_core.backends.native import abi, library
from mamba_core.spec.ops.ssd import NO_LIMIT

SEQUENCES = ("x", "delta", "z", "B", "C")


def widths() -> list[int]:
    """Those that run on this CPU; none where there is no library."""
    return [] if library.missing() else [width for width in (4, 8, 16) if width <= library.width()]


def scan(threads=1, width=0, delta_softplus=False, keep=True, **arrays):
    """(y, final state, boundaries or None)."""
    b, l, e = arrays["x"].shape
    n = arrays["A"].shape[1]
    boundaries = np.empty(library.count_boundaries(b, l, e, n), np.float32) if keep else None
    results = {"y": np.empty((b, l, e), arrays["x"].dtype), "final_state": np.empty((b, e, n), np.float32)}
    library.scan(_scan(threads, width, delta_softplus, arrays | results | {"boundaries": boundaries}))
    return *results.values(), boundaries


def scan_backward(dy, dfinal_state, boundaries, threads=1, width=0, delta_softplus=False, **arrays):
    """name -> gradient, of every array of floats that was given and of the initial state."""
    b, _, e = arrays["x"].shape
    floats = {name: value for name, value in arrays.items() if name not in ("mask", "restart") and value is not None}
    gradients = {f"d{name}": np.empty(value.shape, value.dtype) for name, value in floats.items()}
    gradients["dinitial_state"] = np.empty((b, e, arrays["A"].shape[1]), np.float32)
    arriving = {"dy": dy, "dfinal_state": dfinal_state, "boundaries": boundaries}
    library.scan_backward(_scan(threads, width, delta_softplus, arrays | arriving | gradients))
    return {name.removeprefix("d"): value for name, value in gradients.items()}


def ssd(threads=1, width=0, dt_softplus=False, dt_limit=NO_LIMIT, keep=True, **arrays):
    """(y, final state, boundaries or None); arrays as `mamba_core.ssd` takes them."""
    x, B = arrays["x"], arrays["B"]
    b, l, h, p = x.shape
    boundaries = np.empty(library.count_ssd_boundaries(b, l, h, p, B.shape[3]), np.float32) if keep else None
    results = {"y": np.empty(x.shape, x.dtype), "final_state": np.empty((b, h, p, B.shape[3]), np.float32)}
    options = (dt_softplus, dt_limit)
    library.ssd(_ssd(threads, width, *options, arrays, results | {"boundaries": boundaries}))
    return *results.values(), boundaries


def ssd_backward(dy, dfinal_state, boundaries, threads=1, width=0, dt_softplus=False, dt_limit=NO_LIMIT, **arrays):
    """name -> gradient, as `scan_backward`."""
    b, _, h, p = arrays["x"].shape
    floats = {name: value for name, value in arrays.items() if name not in ("mask", "restart") and value is not None}
    gradients = {f"d{name}": np.empty(value.shape, value.dtype) for name, value in floats.items()}
    gradients["dinitial_state"] = np.empty((b, h, p, arrays["B"].shape[3]), np.float32)
    arriving = {"dy": dy, "dfinal_state": dfinal_state, "boundaries": boundaries}
    library.ssd_backward(_ssd(threads, width, dt_softplus, dt_limit, arrays, arriving | gradients))
    return {name[1:]: value for name, value in gradients.items()}


def conv(threads=1, width=0, silu=False, **arrays):
    """(y, final state); weight is (k, e)."""
    b, _, e = arrays["x"].shape
    results = {"y": np.empty_like(arrays["x"], order="C")}
    results["final_state"] = np.empty((b, len(arrays["weight"]) - 1, e), arrays["x"].dtype)
    library.conv(_conv(threads, width, silu, arrays | results))
    return tuple(results.values())


def conv_backward(dy, dfinal_state, threads=1, width=0, silu=False, **arrays):
    """name -> gradient, as `scan_backward`."""
    floats = {name: value for name, value in arrays.items() if name not in ("mask", "restart") and value is not None}
    gradients = {f"d{name}": np.empty(value.shape, value.dtype) for name, value in floats.items()}
    library.conv_backward(_conv(threads, width, silu, arrays | gradients | {"dy": dy, "dfinal_state": dfinal_state}))
    return {name.removeprefix("d"): value for name, value in gradients.items()}


def add_norm(residual, hidden, weight, eps, threads=1, width=0):
    """(normed, total), total None without a hidden."""
    normed = np.empty(residual.shape, weight.dtype)
    total = None if hidden is None else np.empty_like(residual)
    bfloat16 = [value.dtype == ml_dtypes.bfloat16 for value in (weight, residual)]
    arrays = {"residual": residual, "hidden": hidden, "weight": weight, "normed": normed, "total": total}
    library.add_norm(_point(abi.AddNorm(*residual.shape, *bfloat16, threads, width, eps), arrays))
    return normed, total


def _scan(threads, width, delta_softplus, arrays):
    x, A = arrays["x"], arrays["A"]
    bfloat16 = x.dtype == ml_dtypes.bfloat16
    return _point(abi.Scan(*x.shape, A.shape[1], bfloat16, delta_softplus, threads, width), arrays)


def _ssd(threads, width, dt_softplus, dt_limit, arrays, others):
    x, B, D = arrays["x"], arrays["B"], arrays.get("D")
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    bfloat16, per_channel = x.dtype == ml_dtypes.bfloat16, D is not None and D.ndim == 2
    return _point(
        abi.Ssd(b, l, h, p, n, g, bfloat16, dt_softplus, per_channel, threads, width, *dt_limit), arrays | others
    )


def _conv(threads, width, silu, arrays):
    x, weight = arrays["x"], arrays["weight"]
    bfloat16 = x.dtype == ml_dtypes.bfloat16
    return _point(abi.Conv(*x.shape, len(weight), bfloat16, silu, threads, width), arrays)


def _point(arguments, arrays):
    """It does not keep the arrays alive."""
    for name, value in arrays.items():
        if value is None:
            continue
        if name in abi.SEQUENCES:
            strides = (stride // value.itemsize for stride in value.strides[:2])
            setattr(arguments, name, abi.Sequence(value.ctypes.data, *strides))
        else:
            assert value.flags.c_contiguous
            setattr(arguments, name, value.ctypes.data)
    return arguments
