"""What the native library accepts, and tensors in the form it reads: a pointer and strides."""

import functools
import os

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library

DTYPES = tuple(getattr(torch, name) for name in abi.DTYPES)
# Evaluated at import, so that torch.compile never traces it.
MISSING = library.missing()


def reason(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why no native kernel can run on that device, for x of that dtype; None if one can."""
    if device.type != "cpu":
        return "it runs on a CPU only"
    if dtype is not None and dtype not in DTYPES:
        return f"x is {str(dtype).removeprefix('torch.')}, and it computes {' and '.join(abi.DTYPES)}"
    return MISSING


@functools.cache
def share_threads() -> None:
    """Has the native kernels run on torch's OpenMP threads, unless MAMBA_CORE_OPENMP=0. Every native call asks first.

    It is called inside operators, or where nothing is traced, so that torch.compile does not see it.
    """
    if os.environ.get("MAMBA_CORE_OPENMP") != "0":
        library.use_openmp()


def threads_in_force() -> str:
    """Whose threads the native kernels run on."""
    if MISSING is not None:
        return f"none: {MISSING}"
    if os.environ.get("MAMBA_CORE_OPENMP") == "0":
        return "their own, as MAMBA_CORE_OPENMP=0 asks"
    called = share_threads.cache_info().currsize > 0
    return "torch's OpenMP, where this process has GNU's" if called else "their own, until the first call"


def laid_out(named: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors by the library's names: sequences with adjacent channels, the others contiguous."""
    return {
        name: value if value is None else rows(value) if name in abi.SEQUENCES else value.contiguous()
        for name, value in named.items()
    }


def rows(value: Tensor) -> Tensor:
    """The value with adjacent channels. A slice of a wider array has them already and is not copied."""
    return value if value.stride(2) == 1 or value.shape[2] == 1 else value.contiguous()


def point(arguments, tensors: dict[str, Tensor | None]):
    """Makes the arguments point to the tensors; they do not keep the tensors alive."""
    share_threads()
    for name, value in tensors.items():
        if value is not None:
            pointer = value.data_ptr()
            sequence = name in abi.SEQUENCES
            setattr(arguments, name, abi.Sequence(pointer, *value.stride()[:2]) if sequence else pointer)
    return arguments
