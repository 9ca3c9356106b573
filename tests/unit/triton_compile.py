"""Triton's kernels where there is no GPU: interpreted in a process of their own, or compiled for sm_90.

What an operator would launch is caught and compiled.
"""

import inspect
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
OPTIONS = ("enable_fp_fusion", "num_warps", "num_stages", "launch_pdl", "maxnreg")


def run_in_the_interpreter(file: str) -> None:
    """Runs a test file again in a process where Triton interprets: that must be asked for before Triton is imported."""
    # Without the project's -q, the last line says how many have passed.
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=--import-mode=importlib", file]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]


@contextmanager
def compiled(*modules):
    """Inside, the modules' kernels are not launched but compiled; gives the list of (name, compiled kernel)."""
    import triton

    found, kernels = [], []
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                kernels.append((module, name, value))
                setattr(module, name, _Caught(value, found))
    try:
        yield found
    finally:
        for module, name, value in kernels:
            setattr(module, name, value)


class _Caught:
    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **named):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: named.pop(name) for name in OPTIONS if name in named}
        bound = inspect.signature(self.kernel.fn).bind(*arguments, **named).arguments
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + NAMES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.found.append((self.kernel.fn.__name__, built))


def built_for(call, launch):
    """The image of a launch of `mamba_core.backends.gpu.ssd`, for sm_90."""
    from mamba_core.backends.gpu import triton_image

    def kind(name):
        if name in call.shapes:
            return call.dtype_of(name)
        return call.dtype if name in ("x", "dt", "B", "C", "z", "dy") else "float32"

    kinds = [kind(name) for name in (*launch.reads, *launch.writes)]
    numbers = [size for value in launch.numbers for size in ((1024, 512) if isinstance(value, str) else (value,))]
    module = "mamba_core.backends.gpu.ssd_kernels"
    return triton_image.compiled(module, launch.kernel, (*kinds, *numbers), launch.constants, launch.options, 90)


def resources(built) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory of a kernel or its machine code, as the assembler reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built if isinstance(built, bytes) else built.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED")}
