"""NumPy in and out, dtypes, devices and differentiation; the section "arrays" of `mamba_core.backend`."""

import ctypes
import functools
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from mamba_core.backends.gpu import driver
from mamba_core.backends.torch.kernels import native_tensors, triton

# From malloc.h, and the environment variables that set the same.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SETS_THRESHOLD = re.compile(r"(MALLOC_(TRIM|MMAP)_THRESHOLD_|glibc\.malloc\.(trim|mmap)_threshold)")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def devices() -> list[str]:
    """CUDA and MPS where this torch and this machine have them, the CPU always."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, present in available.items() if present]


def dtype_name(array: Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")


def from_numpy(value, dtype: str | None = None, device: str | None = None) -> Tensor:
    """MPS has no float64: ask for dtype="float32" there."""
    device, given = device or devices()[0], value
    value = np.asarray(value, order="C")
    # Elsewhere the tensor is a copy anyway.
    if value is given and (device.startswith("cpu") or not value.flags.writeable):
        value = value.copy()
    if value.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(value)
    return tensor.to(device, None if dtype is None else dtype_of(dtype))


def to_numpy(array: Tensor) -> np.ndarray:
    """A copy, also on the CPU, where the memory may be a parameter's."""
    array = array.detach().to("cpu", copy=True)
    if array.dtype == torch.bfloat16:
        return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array.numpy()


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Tensors say where they are. On CUDA, products of float32 are not rounded to TF32 meanwhile, in the process."""
    if not device.startswith("cuda"):
        yield
        return
    matmul = torch.backends.cuda.matmul
    try:
        before, exact, set_to = torch.get_float32_matmul_precision(), "highest", torch.set_float32_matmul_precision
    except RuntimeError:  # the program has set it by the other of PyTorch's interfaces
        before, exact, set_to = matmul.fp32_precision, "ieee", partial(setattr, matmul, "fp32_precision")
    set_to(exact)
    try:
        yield
    finally:
        set_to(before)


def device_facts(device: str) -> dict[str, str]:
    """The device's name and the versions that its kernels depend on.

    Raises:
        RuntimeError, AssertionError: there is no such device.
    """
    found, kind = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}, device[:4]
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found |= {"CUDA": str(torch.version.cuda or torch.version.hip), "driver": driver.version()}
    elif kind != "cpu":
        torch.zeros(1, device=device)
        found |= {"device": f"{device} of {platform.machine()}", "driver": platform.platform()}
    return found | ({} if triton.triton is None else {"triton": triton.triton.__version__})


def is_capturing() -> bool:
    """Whether this thread's work is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def peak_memory(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Refuses tensors on several devices: with one on "meta" an operator would return a tensor without values.

    Raises:
        ValueError: one of the others is not where x is.
    """
    for name, value in others.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}; expected {x.device}, where x is")


def anchor(module: nn.Module) -> Tensor:
    """A parameter in the compute dtype: the first one of two bytes, or the first one of floats."""
    floats = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    return next((parameter for parameter in floats if parameter.dtype.itemsize == 2), floats[0])


def at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def in_compute_dtype(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """All in float64 where x is, else in float32: what the ops compute in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [None if value is None else value.to(dtype) for value in (x, *others)]


def vjp(function, arguments, cotangents) -> tuple[list, list]:
    """By `torch.autograd.grad`; the gradient of an argument that no output depends on is zero."""
    arguments = [argument.detach().requires_grad_() for argument in arguments]
    outputs = function(*arguments)
    # An output that depends on no argument has no graph, and autograd refuses it.
    connected = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    gradients = torch.autograd.grad(
        [output for output, _ in connected],
        arguments,
        [cotangent for _, cotangent in connected],
        allow_unused=True,
        materialize_grads=True,
    )
    return [to_numpy(output) for output in outputs], [to_numpy(gradient) for gradient in gradients]


@functools.cache
def keep_freed_memory() -> str:
    """Has glibc keep up to 256 MB of freed memory for the next arrays, and says whether it does. Once a process.

    Otherwise glibc returns a layer's arrays to the system and gets the memory back page by page, which takes a CPU as
    long as computing in them. Arrays of 32 MB and more, the largest threshold that glibc accepts, are still returned.
    MAMBA_CORE_TUNE=0 forbids it, and so does an environment that sets the thresholds itself.
    """
    if os.environ.get("MAMBA_CORE_TUNE") == "0":
        return "the system's, as MAMBA_CORE_TUNE=0 asks"
    if not sys.platform.startswith("linux"):
        return "the system's"
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return "the system's"
    variables = [*os.environ, *os.environ.get("GLIBC_TUNABLES", "").split(":")]
    if any(map(SETS_THRESHOLD.match, variables)):
        return "as the environment sets it"
    library.mallopt(M_MMAP_THRESHOLD, 2**25)
    library.mallopt(M_TRIM_THRESHOLD, 2**28)
    return "keeps up to 256 MB of freed memory"


def in_force() -> dict[str, str]:
    """The settings of the whole process that this backend changes at first use, and what they are now."""
    asked = keep_freed_memory.cache_info().currsize > 0
    return {
        "malloc": keep_freed_memory() if asked else "the system's, until a model is built on the CPU",
        "threads of the native kernels": native_tensors.threads_in_force(),
    }
