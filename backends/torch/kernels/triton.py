"""What the kernels in Triton share: whether they run here, and how they are launched.

Triton comes with PyTorch for CUDA and compiles a kernel when it is first used. Elsewhere it is not imported, unless
TRITON_INTERPRET=1 asks for its interpreter, in which the tests run the kernels on a CPU.
"""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import nullcontext

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether a kernel may begin while the one before it ends; the interpreter runs one after another.
OVERLAP = not INTERPRETED

try:
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET") is None:
        raise ImportError("it comes with PyTorch for CUDA")
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    jit, MISSING = triton.jit, None
except ImportError as fault:
    # A kernel's module can be imported all the same: its annotations are strings, and nothing launches it.
    triton, tl, MISSING = None, None, f"Triton is missing: {fault}"

    def jit(kernel):
        return kernel


def reason(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why no kernel in Triton can run on that device, for tensors of those dtypes; None if one can."""
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return "it runs on a CUDA device only"
    if other := [dtype for dtype in dtypes if dtype not in DTYPES]:
        return f"x is {str(other[0]).removeprefix('torch.')}, and it computes float32, bfloat16 and float16"
    return MISSING


def linear_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which a linear of it is computed: its own, or that of autocast."""
    device = value.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def overlapping(overlap: bool = True) -> dict[str, bool]:
    """What a launch is told for its kernel to begin while the one before it ends (programmatic dependent launch).

    The kernel calls `let_the_next_begin` and, before it reads what others write or writes itself, `after_the_last`.
    """
    overlap = overlap and OVERLAP and _limits()[0] >= 9
    return {"OVERLAP": overlap} | ({"launch_pdl": True} if overlap else {})


def shared_memory() -> int:
    """Bytes that a program can have on the current device."""
    return _limits()[1]


def _limits() -> tuple[int, int]:
    """(compute capability, shared memory of a program) of the current device; without one, of an H100."""
    return _limits_of(torch.cuda.current_device()) if torch.cuda.is_available() else (9, 227 * 1024)


@functools.cache
def _limits_of(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    # What every GPU since Turing has, should this PyTorch not know.
    return properties.major, getattr(properties, "shared_memory_per_block_optin", 64 * 1024)


@jit
def after_the_last(OVERLAP: tl.constexpr):
    """Waits until what the kernels before have written can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@jit
def let_the_next_begin(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def fetch(places):
    """Asks for what lies at these pointers, and in their lines, into the second cache; reads nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def softplus(value):
    """Without overflow where the value is large, and without loss where it is very negative."""
    small = tl.exp(-tl.abs(value))
    rest = tl.where(small < 1e-4, small * (1.0 - 0.5 * small), tl.log(1.0 + small))
    return tl.maximum(value, 0.0) + rest


def launching(x: Tensor):
    """A context in which kernels are launched where x is."""
    # Entering a device costs the host as much as a small kernel, so that the current one is not entered.
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def power_of_2(count: int) -> int:
    """The smallest that is at least count, as the sizes of Triton's blocks must be."""
    return 1 << max(0, count - 1).bit_length()


def blocks_of(size: int, block: int) -> int:
    return -(-size // block)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) times b (k, n) in float32, from whatever dtype."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a (m, k) times b (k, n) to total, which is float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
