"""What the native library takes, and tensors as it takes them: by pointer and strides."""

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library

DTYPES = tuple(getattr(torch, name) for name in abi.DTYPES)
# Asked once, and not by what the compiler traces.
MISSING = library.missing()
if MISSING is None:
    library.use_openmp()


def reason(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why no native kernel can run on that device, for x of that dtype; None if one can."""
    if device.type != "cpu":
        return "it runs on a CPU only"
    if dtype is not None and dtype not in DTYPES:
        return f"x is {str(dtype).removeprefix('torch.')}, and it computes {' and '.join(abi.DTYPES)}"
    return MISSING


def laid_out(named: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors by the library's names, sequences with their channels side by side and the rest contiguous."""
    return {
        name: value if value is None else rows(value) if name in abi.SEQUENCES else value.contiguous()
        for name, value in named.items()
    }


def rows(value: Tensor) -> Tensor:
    """With the channels side by side; a slice of a wider array has them so, and is not copied."""
    return value if value.stride(2) == 1 or value.shape[2] == 1 else value.contiguous()


def point(arguments, tensors: dict[str, Tensor | None]):
    """The arguments, pointing to the tensors, which it does not keep alive."""
    for name, value in tensors.items():
        if value is not None:
            pointer = value.data_ptr()
            sequence = name in abi.SEQUENCES
            setattr(arguments, name, abi.Sequence(pointer, *value.stride()[:2]) if sequence else pointer)
    return arguments
