"""Kernels for GPUs from one source, in what CUDA C++ and Metal have in common, as MLX compiles it.

MLX writes a kernel's signature, from the arrays' names and dtypes, and compiles it when it is first needed.
"""

import hashlib
from typing import NamedTuple

import mlx.core as mx

from mamba_core.backends.gpu import launch as gpu
from mamba_core.backends.mlx.arrays import dtype_name

DTYPES = tuple(getattr(mx, name) for name in gpu.ELEMENTS)
# Of smaller arrays MLX puts the elements into another address space of Metal.
LEAST_METAL_SIZE = 8


class Language(NamedTuple):
    """What its kernels call the thread, the block and how many blocks there are, and what comes before them."""

    name: str
    prelude: str
    thread: str
    block: str
    blocks: str

    @property
    def is_metal(self) -> bool:
        return self.name == "metal"


CUDA = Language("cuda", "cuda.h", "threadIdx.x", "blockIdx.x", "gridDim.x")
METAL = Language(
    *("metal", "metal.h"),
    *("thread_position_in_threadgroup.x", "threadgroup_position_in_grid.x", "threadgroups_per_grid.x"),
)


def reason(language: Language, device: str, dtype: mx.Dtype | None = None, arrays=()) -> str | None:
    """Why kernels cannot run on that device, for x of that dtype and these arrays; None if they can."""
    runs = {"cuda": getattr(mx, "cuda", None), "metal": mx.metal}[language.name]
    if device != "gpu" or runs is None or not runs.is_available():
        return f"it runs on {'an Apple' if language.is_metal else 'an NVIDIA'} GPU only"
    if dtype is not None and dtype not in DTYPES:
        return f"x is {dtype_name(dtype)}, and it computes {', '.join(gpu.ELEMENTS)}"
    if language.is_metal and any(value is not None and value.size < LEAST_METAL_SIZE for value in arrays):
        return f"it takes no array of fewer than {LEAST_METAL_SIZE} elements"
    return None


def header(language: Language, defines, file: str) -> str:
    """What stands before a kernel: the source in that file, with these (name, value)."""
    lines = [f"#define {name} {value}" for name, value in defines]
    if not language.is_metal:
        lines.append("#define ALIGNED_AT(address) ((unsigned long long)(address) % 16 == 0)")
    lines.append(gpu.source(language.prelude, file))
    if not language.is_metal:
        # MLX writes the word before the kernel, and knows no bounds.
        lines += ["#undef __global__", "#define __global__ __attribute__((global)) BOUNDS"]
    return "\n".join([*lines, ""])


def compiled(language: Language, name: str, header: str, body: str, reads, writes, shared: int = 0):
    """The kernel of that header and body, which reads and writes arrays of these names.

    shared: bytes of shared memory of a block, which CUDA is told here and Metal in the body.
    """
    # MLX takes kernels of one name for the same, also those that it finds compiled on the disk.
    digest = hashlib.sha256("\0".join((header, body, *reads, *writes)).encode()).hexdigest()[:16]
    options = {"name": f"{name}_{digest}", "input_names": reads, "output_names": writes}
    options |= {"header": header, "source": body, "ensure_row_contiguous": True}
    if language.is_metal:
        return mx.fast.metal_kernel(**options)
    return mx.fast.cuda_kernel(**options, shared_memory=shared)


def pointer(array: str, names, kind: str = "float", const: str = "const ") -> str:
    """An array's address, or null where it is not among the names."""
    return f"({const}GLOBAL {kind}*){array}" if array in names else "nullptr"
