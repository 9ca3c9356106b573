"""The GPU kernels of scan and convolution, compiled as C++ and run block by block on a CPU: slow, and the same code."""

import ctypes
import functools
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np

from mamba_core.backends.gpu import launch as gpu
from mamba_core.backends.gpu.causal_conv import LAUNCHES, Conv

HERE = Path(__file__).parent
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def run(scan: gpu.Scan, arrays: dict, folder: Path) -> dict:
    """What the scan's kernels compute, by its names; arrays as INPUTS names them, and `kept` for a backward."""
    elements = ("y", "dx", "ddelta", "dz", "dB_sum", "dC_sum")
    # What is not written is seen: NaN.
    found = {
        name: np.full(shape, np.nan, DTYPES[scan.dtype] if name in elements else np.float32)
        for name, shape in (scan.shapes | (scan.sums if scan.backward else {})).items()
    }
    library = _library(folder, tuple(f"-D{name}={value}" for name, value in scan.defines.items()))
    for launch in scan.launches + [scan.adding_up] * scan.backward:
        given = arrays | found
        if launch.begins_from_added:
            given["begin"] = found["added"]
        words = [0 if given.get(name) is None else given[name].ctypes.data for name in launch.arrays]
        words += scan.sizes(launch)
        if launch.strided:
            words += [stride for name in gpu.SEQUENCES for stride in _strides(arrays.get(name))]
        _launch(library, launch, words)
    return found


def run_conv(conv: Conv, arrays: dict, folder: Path) -> dict:
    """What the convolution's kernel computes, by its names; arrays as LAUNCHES names them."""
    found = {
        name: np.full(shape, np.nan, np.float32 if name == "sums" else DTYPES[conv.dtype])
        for name, shape in conv.shapes.items()
    }
    library = _library(folder, ("-DCONV=1", *(f"-D{name}={value}" for name, value in conv.defines.items())))
    given = (arrays | found).get
    words = [0 if given(name) is None else given(name).ctypes.data for name in LAUNCHES[conv.kernel]]
    _launch(library, conv.launch, [*words, *conv.sizes])
    return found


def _launch(library: ctypes.CDLL, launch: gpu.Launch, words: list[int]) -> None:
    library.launch(launch.kernel.encode(), (ctypes.c_uint64 * len(words))(*words), launch.blocks)


def _strides(array):
    return (0, 0) if array is None else [stride // array.itemsize for stride in array.strides[:2]]


@functools.cache
def _library(folder: Path, defines: tuple[str, ...]) -> ctypes.CDLL:
    target = folder / f"kernels-{len(list(folder.iterdir()))}.so"
    source = Path(gpu.__file__).parent
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-w", f"-I{source}", f"-I{HERE}"]
    subprocess.run(["g++", *options, *defines, str(HERE / "gpu_on_cpu.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))
