"""The kernels in Triton compiled without a framework, for whoever launches an image of machine code."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

# Triton's names of dtypes.
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "bool": "i1"}
# An address or a number of which Triton may know that it is a multiple of it.
MULTIPLE = 16
# Numbers below are 32 bits wide.
WIDE = 2**31
# Pointers that Triton adds to a kernel's arguments, for memory that these kernels do not ask for.
HIDDEN = 2


class Image(NamedTuple):
    """name: of the kernel inside. shared: bytes of shared memory. threads: of a program."""

    name: str
    cubin: bytes
    ptx: bytes
    shared: int
    threads: int


def missing() -> str | None:
    """Why kernels cannot be compiled; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing; install it with pip install triton"
    return None


def version() -> str | None:
    """Triton's, without importing it; None where it is missing."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def compiled(
    module: str, kernel: str, arguments: Sequence[str | int], constants: dict, options: dict, capability: int
) -> Image:
    """The kernel for arguments of these kinds, in its order: an array's dtype, or a number.

    module: of the kernels, by its whole name.
    """
    kinds = tuple(value if isinstance(value, str) else (value % MULTIPLE == 0, value >= WIDE) for value in arguments)
    return _compiled(module, kernel, kinds, tuple(constants.items()), tuple(options.items()), capability)


@functools.cache
def _compiled(module, kernel, kinds, constants, options, capability) -> Image:
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    function = getattr(importlib.import_module(module), kernel)
    fixed, rest = dict(constants), iter(kinds)
    signature, attributes = {}, {}
    for index, parameter in enumerate(function.params):
        if parameter.name in fixed:
            signature[parameter.name] = "constexpr"
            continue
        kind = next(rest)
        pointer = isinstance(kind, str)
        multiple, wide = (True, False) if pointer else kind
        signature[parameter.name] = f"*{TYPES[kind]}" if pointer else "i64" if wide else "i32"
        if multiple:
            attributes[(index,)] = [["tt.divisibility", MULTIPLE]]
    source = compiler.ASTSource(function, signature, fixed, attributes)
    built = triton.compile(source, target=target, options=dict(options))
    about = built.metadata
    return Image(about.name, built.asm["cubin"], built.asm["ptx"].encode(), about.shared, 32 * about.num_warps)
