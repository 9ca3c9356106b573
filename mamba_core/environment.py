"""The environment variables that this project reads: one table, which `mamba-core info` prints from.

The table says what there is; each variable is read where it is used.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable.

    meaning: what it decides. values: what it may be set to. default: what holds where it is not set.
    """

    name: str
    meaning: str
    values: str
    default: str


VARIABLES = (
    Variable(
        "MAMBA_CORE_BACKEND",
        "the backend of calls that name none",
        "a backend's name",
        "the first one installed: MLX on a Mac with Apple silicon, torch, JAX, MLX",
    ),
    Variable(
        "MAMBA_CORE_NATIVE",
        "the library of CPU kernels in C++",
        "0 for none, or the path of another library",
        "the one that the installation built",
    ),
    Variable(
        "MAMBA_CORE_SELFTEST",
        'whether "auto" tries a kernel on a GPU, TPU or other accelerator before it uses it',
        "0 to use every kernel untried, 1 to try it in every process",
        "a kernel is tried once for each device, driver and version",
    ),
    Variable(
        "MAMBA_CORE_CACHE",
        "where compiled GPU kernels and the verdicts of self-tests are kept",
        "a folder",
        "mamba_core in XDG_CACHE_HOME",
    ),
    Variable(
        "MAMBA_CORE_TUNE",
        "whether malloc is told to keep freed memory for the next arrays",
        "0 to leave malloc alone",
        "it is told so, on Linux with glibc, when torch's first model on a CPU is built",
    ),
    Variable(
        "MAMBA_CORE_OPENMP",
        "whether the CPU kernels run on the threads of torch's OpenMP runtime",
        "0 for threads of their own",
        "they do where torch has loaded GNU's runtime",
    ),
    Variable(
        "XDG_CACHE_HOME",
        "where caches are kept, unless MAMBA_CORE_CACHE is set",
        "a folder",
        "~/Library/Caches on a Mac, LOCALAPPDATA on Windows, elsewhere ~/.cache",
    ),
    Variable(
        "LOCALAPPDATA",
        "where Windows keeps caches, unless XDG_CACHE_HOME is set",
        "a folder",
        "Windows sets it",
    ),
    Variable(
        "OMP_NUM_THREADS",
        "threads of the CPU kernels and of the frameworks that use OpenMP",
        "an integer from 1",
        "torch's own setting there, elsewhere a thread a core",
    ),
    Variable(
        "TRITON_INTERPRET",
        "whether the Triton kernels are interpreted on the CPU, for tests",
        "1 to interpret them, 0 to compile them",
        "compiled where torch has CUDA, else left out",
    ),
    Variable(
        "GLIBC_TUNABLES",
        "malloc's thresholds, among others; where it sets them malloc is left alone",
        "glibc.malloc.trim_threshold=BYTES:glibc.malloc.mmap_threshold=BYTES",
        "as MAMBA_CORE_TUNE",
    ),
    Variable(
        "MALLOC_TRIM_THRESHOLD_",
        "from how much free memory on malloc gives it back; where it is set malloc is left alone",
        "bytes",
        "as MAMBA_CORE_TUNE",
    ),
    Variable(
        "MALLOC_MMAP_THRESHOLD_",
        "from which size on an array's memory is the system's; where it is set malloc is left alone",
        "bytes",
        "as MAMBA_CORE_TUNE",
    ),
    Variable(
        "MLX_ENABLE_TF32",
        "whether MLX rounds the factors of float32 products to TF32 on GPUs that have it",
        "0 or 1",
        "0, set by the first model or op of the MLX backend",
    ),
)


def values_set(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of the table that are set, by name, in the table's order."""
    return {variable.name: environ[variable.name] for variable in VARIABLES if variable.name in environ}
