"""Finds, loads and calls the native library: the CPU kernels in C++.

It reads two variables of the environment. $MAMBA_CORE_NATIVE, read once, names another library to load, or is 0 for
none. $OMP_NUM_THREADS, read again at each call of `threads`, is how many threads a kernel computes on.
"""

import ctypes
import functools
import os
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from mamba_core.backends.native.abi import ABI, AddNorm, Conv, ExpertsStep, LinearStep, MambaStep, Scan, Ssd, SsdStep


def missing() -> str | None:
    """Why the native kernels cannot be used here; None if they can."""
    found = _find()
    return found if isinstance(found, str) else None


@functools.cache
def warn_if_left_out() -> None:
    """Warns once that the installation has no native kernels, unless $MAMBA_CORE_NATIVE says which to use, or none."""
    if "MAMBA_CORE_NATIVE" not in os.environ and (reason := missing()) is not None:
        text = "the CPU kernels in C++ are left out of this installation, so models on a CPU run more slowly"
        warnings.warn(f"{text}: {reason}", stacklevel=4)


def loaded() -> ctypes.CDLL:
    """The library, loaded at the first call.

    Raises:
        RuntimeError: `missing()`.
    """
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(f"the native kernels cannot be used: {found}")
    return found


def width() -> int:
    """Float32 lanes of a vector here: 16 with AVX-512, 8 with AVX2, 4 with NEON or plain C++."""
    return loaded().mamba_scan_width()


def threads() -> int:
    """The threads of a call: $OMP_NUM_THREADS where it is set, else one a core that this process may use."""
    # OpenMP allows a list, of one number a level of nested threads. A call has the outermost level.
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_openmp() -> None:
    """Lets the library compute on the threads of GNU's OpenMP runtime, if this process has loaded that.

    A framework that computes on those threads calls this before its first native call, and may call it again. Those
    threads wait for the next operation by spinning, so that others beside them would have half of each core.
    """
    try:
        runtime = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return
    loaded().mamba_use_threads_of(ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p))


def count_boundaries(b: int, l: int, e: int, n: int) -> int:
    """How many floats a gradient needs for the states between chunks: `mamba_scan_boundaries`.

    It is computed here and not asked of the library, because a compiler's or an exporter's sizes may be symbols.
    """
    return b * -(-e // 64) * -(-l // 32) * -(-n // 2) * 2 * 64


def count_ssd_boundaries(b: int, l: int, h: int, p: int, n: int) -> int:
    """The same for the ssd: `mamba_ssd_boundaries`."""
    return b * -(-l // 64) * h * n * -(-p // 16) * 16


def scan(arguments: Scan) -> None:
    """Fills y, and final_state and boundaries where they are given.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_scan_forward(ctypes.byref(arguments)))


def scan_backward(arguments: Scan) -> None:
    """Fills the gradients. `boundaries` are those that `scan` filled.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_scan_backward(ctypes.byref(arguments)))


def scan_floor(b: int, l: int, e: int, n: int) -> None:
    """Does the scan's arithmetic on nothing that comes from memory, for benchmarks: no scan could be faster.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_scan_floor(b, l, e, n, threads()))


def ssd(arguments: Ssd) -> None:
    """Fills y and final_state, and boundaries where they are given.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_ssd_forward(ctypes.byref(arguments)))


def ssd_backward(arguments: Ssd) -> None:
    """Fills the gradients. `boundaries` are those that `ssd` filled.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_ssd_backward(ctypes.byref(arguments)))


def conv(arguments: Conv) -> None:
    """Fills y, and final_state where it is given.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_conv_forward(ctypes.byref(arguments)))


def conv_backward(arguments: Conv) -> None:
    """Fills the gradients.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_conv_backward(ctypes.byref(arguments)))


def mamba_steps(arguments: ctypes.Array) -> None:
    """Fills new_residual, new_conv_state and new_ssm_state of `MambaStep`s of the same sizes, one after another.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_mamba_steps(arguments, len(arguments)))


def ssd_steps(arguments: ctypes.Array) -> None:
    """The same for `SsdStep`s.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_ssd_steps(arguments, len(arguments)))


def linear_step(arguments: LinearStep) -> None:
    """Fills y.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_linear_step(ctypes.byref(arguments)))


def experts_step(arguments: ExpertsStep) -> None:
    """Fills y.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_experts_step(ctypes.byref(arguments)))


def add_norm(arguments: AddNorm) -> None:
    """Fills normed, and total where there is something to add.

    Raises:
        MemoryError: there is not the memory for its workspace.
    """
    _check(loaded().mamba_add_norm(ctypes.byref(arguments)))


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the workspace of a native kernel")


@functools.cache
def _find() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    chosen = os.environ.get("MAMBA_CORE_NATIVE")
    if chosen == "0":
        return "switched off by MAMBA_CORE_NATIVE=0"
    paths = [Path(chosen)] if chosen else _built()
    if not paths:
        return "not built; with a C++ compiler (gcc or clang) at hand, install mamba_core from its source again"
    try:
        return _load(paths[0])
    except (OSError, AttributeError, ValueError) as error:
        if chosen:
            warnings.warn(f"MAMBA_CORE_NATIVE={chosen} cannot be loaded, so none is used: {error}", stacklevel=2)
        return f"{paths[0].name} cannot be loaded: {error}"


def _built() -> list[Path]:
    candidates = [Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    return [path for path in candidates if path.is_file()]


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(os.fspath(path))
    if (built := found.mamba_native_abi()) != ABI:
        raise ValueError(f"it has ABI {built} and this package {ABI}; install the package again")
    found.mamba_use_threads_of.argtypes = [ctypes.c_void_p]
    found.mamba_use_threads_of.restype = None
    found.mamba_scan_boundaries.argtypes = [ctypes.c_int64] * 4
    found.mamba_scan_boundaries.restype = ctypes.c_int64
    found.mamba_ssd_boundaries.argtypes = [ctypes.c_int64] * 5
    found.mamba_ssd_boundaries.restype = ctypes.c_int64
    for name, kind in {"scan": Scan, "ssd": Ssd, "conv": Conv}.items():
        for function in ("forward", "backward"):
            getattr(found, f"mamba_{name}_{function}").argtypes = [ctypes.POINTER(kind)]
    found.mamba_scan_floor.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_int32]
    found.mamba_mamba_steps.argtypes = [ctypes.POINTER(MambaStep), ctypes.c_int64]
    found.mamba_ssd_steps.argtypes = [ctypes.POINTER(SsdStep), ctypes.c_int64]
    found.mamba_linear_step.argtypes = [ctypes.POINTER(LinearStep)]
    found.mamba_experts_step.argtypes = [ctypes.POINTER(ExpertsStep)]
    found.mamba_add_norm.argtypes = [ctypes.POINTER(AddNorm)]
    return found
