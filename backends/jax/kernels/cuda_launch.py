"""Launches our own CUDA kernels through jaxlib's Triton custom call, which accepts any kernel.

jaxlib's Python cannot describe a compiled kernel, so this file writes the message of jaxlib/gpu/triton.proto itself.
"""

import functools
import hashlib
import importlib
import zlib
from collections.abc import Sequence

import jax
import jaxlib
import numpy as np

TARGET = "triton_kernel_call_ffi"
# Older versions compile PTX themselves.
TAKES_CUBIN = (0, 11, 1)


def takes_cubin() -> bool:
    return jaxlib.version.__version_info__ >= TAKES_CUBIN


def launch(
    image: bytes,
    name: str,
    blocks: int | tuple[int, int],
    threads: int,
    shared: int,
    parameters: Sequence,
    updated: int | None = None,
) -> list[jax.Array]:
    """The arrays that a kernel writes.

    image: a cubin if `takes_cubin`, else PTX.
    blocks: along one axis or two.
    shared: bytes of dynamic shared memory.
    parameters: in the kernel's order an array, which it reads; a `jax.ShapeDtypeStruct`, which it writes, after all
        arrays; an np.int32 or np.int64; None for a pointer that it does not follow.
    updated: the place of an array that the kernel also writes. It comes first among the results.
    """
    _register()
    arrays = [value for value in parameters if isinstance(value, jax.Array)]
    results = [value for value in parameters if isinstance(value, jax.ShapeDtypeStruct)]
    aliases = {}
    if updated is not None:
        aliases = {updated: 0}
        results = [jax.ShapeDtypeStruct(arrays[updated].shape, arrays[updated].dtype), *results]
    message = zlib.compress(_message(image, name, blocks, threads, shared, parameters))
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)
    return call(*arrays, name=name, opaque=message)


@functools.cache
def _register() -> None:
    """The import registers the target."""
    importlib.import_module("jaxlib.gpu_triton")


def _message(image, name, blocks, threads, shared, parameters) -> bytes:
    """A TritonAnyKernelCall."""
    compiled = takes_cubin()
    # jaxlib recognises a kernel by its text.
    text = f"// {hashlib.sha256(image).hexdigest()}".encode() if compiled else image
    kernel = _field(1, name.encode()) + _field(2, threads // 32) + _field(10, 1) + _field(3, shared) + _field(4, text)
    kernel += _field(6, capability())
    if compiled:
        kernel += _field(11, _field(1, image) + _field(2, name.encode()) + _field(3, shared))
    x, y = (blocks, 1) if isinstance(blocks, int) else blocks
    grid = _field(2, x) + _field(3, y) + _field(4, 1)
    call = _field(1, kernel) + grid + b"".join(_field(5, _parameter(value)) for value in parameters)
    return _field(1, call) + _field(4, name.encode())


def _parameter(value) -> bytes:
    if value is None:
        return _field(6, 0)
    if isinstance(value, np.integer):
        return _field({"int32": 3, "int64": 5}[value.dtype.name], int(value))
    alignment = 16
    return _field(1, _field(2, alignment))


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message: a number that is not negative, or bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def capability() -> int:
    """The compute capability, such as 90."""
    return int(device().compute_capability.replace(".", ""))


def shared_memory() -> int:
    """Bytes that a program can have; what every GPU since Turing has, should this jaxlib not know."""
    return getattr(device(), "shared_memory_per_block_optin", 64 * 1024)


def device() -> jax.Device:
    """The device to compile for; all devices of a process are assumed to be alike.

    Raises:
        RuntimeError: there is none.
    """
    return jax.local_devices(backend="cuda")[0]
