"""Kernels of MLX for GPUs, without a GPU: their sources, for CUDA and for Metal, compiled as C++ and run on a CPU.

Of MLX only the signature is written here that it puts before a kernel's body.
"""

import ctypes
import functools
import re
import subprocess
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np

from mamba_core.backends.mlx.kernels import gpu_language

HERE = Path(__file__).parent
TYPES = {"float32": "float", "bfloat16": "bfloat16_t", "float16": "float16_t", "bool": "bool"}
# What a thread asks for, and its value.
ATTRIBUTES = {
    "thread_position_in_threadgroup": "fibers::block.current",
    "threadgroup_position_in_grid": "fibers::block.number",
    "threadgroups_per_grid": "blocks",
}
CUDA_WORDS = """
#define __shared__
#define threadIdx (fibers::Index{fibers::block.current})
#define blockIdx (fibers::Index{fibers::block.number})
#define gridDim (fibers::Index{blocks_of_grid})
typedef uint16_t bfloat16_t;
typedef _Float16 float16_t;
static int blocks_of_grid;
"""


def language(name: str, folder, monkeypatch) -> gpu_language.Language:
    """That language, for kernels that are made as MLX would have them and run on the CPU."""
    cuda = name == "cuda"
    monkeypatch.setattr(mx.fast, f"{name}_kernel", functools.partial(compiled, folder, cuda))
    # The words of CUDA's own prelude are assembly.
    return gpu_language.CUDA._replace(prelude=str(HERE / "gpu_on_cpu.h")) if cuda else gpu_language.METAL


def as_numpy(value):
    return _numpy(value).astype(np.float64)


def compiled(folder, cuda, *, name, input_names, output_names, source, header, ensure_row_contiguous, shared_memory=0):
    """In the place of `mx.fast.cuda_kernel` and `mx.fast.metal_kernel`."""
    assert ensure_row_contiguous
    declared = re.search(r"threadgroup float4 memory\[(\d*)\];", source)
    size = 16 * int(declared[1]) if declared else shared_memory
    assert size <= (200 if cuda else 32) * 1024

    def run(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
        assert grid[0] % threadgroup[0] == 0
        assert min(value.size for value in inputs) >= gpu_language.LEAST_METAL_SIZE or cuda
        given = [_numpy(value) for value in inputs]
        # What is not written is seen: NaN.
        dtypes = [
            np.dtype(ml_dtypes.bfloat16) if d == mx.bfloat16 else _numpy(mx.zeros(1, d)).dtype for d in output_dtypes
        ]
        results = [np.full(shape, np.nan, dtype) for shape, dtype in zip(output_shapes, dtypes, strict=True)]
        text = _text(cuda, name, input_names, given, output_names, results, source, header)
        library = _library(folder, name, text)
        shapes = [np.array(value.shape, np.int32) for value in given]
        arrays = [array for pair in zip(given, shapes, strict=True) for array in pair] + results
        pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
        assert library.run(pointers, grid[0] // threadgroup[0], size) == 0, "more memory was written than there is"
        return [mx.array(value) for value in results]

    return run


def _numpy(value):
    if value.dtype == mx.bfloat16:
        return np.array(value.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(value)


def _text(cuda, name, input_names, given, output_names, results, source, header):
    """The kernel as MLX writes it, and a function that runs it block by block."""
    parameters, arguments = [], []

    def add(declaration, kind):
        arguments.append(f"({kind})arrays[{len(arguments)}]")
        parameters.append(f"{declaration} [[buffer({len(parameters)})]]")

    for array, value in zip(input_names, given, strict=True):
        kind = f"const device {TYPES[value.dtype.name]}*"
        add(f"{kind} {array}", kind)
        add(f"const constant int* {array}_shape", "const int*")
    for array, value in zip(output_names, results, strict=True):
        kind = f"device {TYPES[value.dtype.name]}*"
        add(f"{kind} {array}", kind)
    asked = [] if cuda else [attribute for attribute in ATTRIBUTES if attribute in source]
    parameters += [f"uint3 {attribute} [[{attribute}]]" for attribute in asked]
    arguments += [f"uint3{{uint({ATTRIBUTES[attribute]}), 0, 0}}" for attribute in asked]
    words = CUDA_WORDS + "#define device\n#define constant\n" if cuda else '#include "metal_on_cpu.h"\n'
    # Memory of the block, and not of the thread.
    body = re.sub(r"(threadgroup|extern __shared__) float4 memory\[\d*\];", "extern float4 memory[];", source)
    before = "#include <cstdint>\n" + ("" if cuda else words)
    after = words if cuda else ""
    return f"""
{before}
{header}
{after}
alignas(16) float4 memory[1 << 14];
[[kernel]] void {name}({", ".join(parameters)}) {{
{body}
}}
extern "C" int run(void** arrays, int blocks, int size) {{
  {"blocks_of_grid = blocks;" if cuda else ""}
  const char* bytes = (const char*)memory;
  for (fibers::block.number = 0; fibers::block.number < blocks; ++fibers::block.number) {{
    memset(memory, 0xff, sizeof memory);
    fibers::run_block(THREADS, [=] {{ {name}({", ".join(arguments)}); }});
    for (size_t at = size; at < sizeof memory; ++at)
      if (bytes[at] != char(0xff)) return 1;
  }}
  return 0;
}}
"""


def _library(folder, name, text):
    source = folder / f"{name}.cpp"
    if not source.exists():
        source.write_text(text)
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{HERE}"]
        subprocess.run(["g++", *options, str(source), "-o", str(source.with_suffix(".so"))], check=True)
    assert source.read_text() == text, "MLX takes two kernels of one name for the same"
    return ctypes.CDLL(str(source.with_suffix(".so")))
