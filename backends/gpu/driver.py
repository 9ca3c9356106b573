"""Kernels launched through CUDA's driver, by ctypes: what a framework without a way of its own needs."""

import ctypes
import functools
import struct

_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_DEFAULT_SHARED_BYTES = 48 * 1024


class Kernel:
    """A kernel of a cubin, for every device that it is launched on.

    layout: of its parameters, as `struct` has them without their alignment, such as "PPii".
    """

    def __init__(self, cubin: bytes, name: str, layout: str, threads: int, shared: int):
        library, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuLibraryLoadData(ctypes.byref(library), cubin, None, None, 0, None, None, 0))
        _check(_driver().cuLibraryGetKernel(ctypes.byref(self._function), library, name.encode()))
        self._packing = struct.Struct(f"@{layout}")
        self._offsets = _offsets(layout)
        self._threads, self._shared, self._prepared = threads, shared, set()

    def launch(self, device: int, stream: int, blocks: int, *arguments) -> None:
        """In the device's primary context, which the frameworks compute in.

        Raises:
            RuntimeError: the driver refuses it; its own words.
        """
        _enter_context(device)
        if device not in self._prepared:
            if self._shared > _DEFAULT_SHARED_BYTES:
                value = ctypes.c_int(self._shared)
                _check(_driver().cuKernelSetAttribute(_DYNAMIC_SHARED_BYTES, value, self._function, device))
            self._prepared.add(device)
        packed = ctypes.create_string_buffer(self._packing.pack(*arguments), self._packing.size)
        start = ctypes.addressof(packed)
        pointers = (ctypes.c_void_p * len(self._offsets))(*[start + offset for offset in self._offsets])
        _check(
            _driver().cuLaunchKernel(
                *(self._function, blocks, 1, 1, self._threads, 1, 1, self._shared, ctypes.c_void_p(stream)),
                *(pointers, None),
            )
        )


@functools.cache
def multiprocessors(device: int = 0) -> int:
    count = ctypes.c_int()
    _check(_driver().cuInit(0))
    _check(_driver().cuDeviceGetAttribute(ctypes.byref(count), _MULTIPROCESSORS, device))
    return count.value


@functools.cache
def version() -> str:
    """The driver's, such as "12.8", as CUDA counts; "" where there is none."""
    number = ctypes.c_int()
    try:
        _check(_driver().cuDriverGetVersion(ctypes.byref(number)))
    except (OSError, RuntimeError):
        return ""
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _enter_context(device: int) -> None:
    """A thread that has not computed there yet, such as one that computes gradients, has none."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(_driver().cuCtxSetCurrent(context))


def _offsets(layout: str) -> list[int]:
    """Where each parameter lies in what `struct` packs natively."""
    return [
        struct.calcsize(f"@{layout[:end]}") - struct.calcsize(f"@{layout[end - 1]}")
        for end in range(1, len(layout) + 1)
    ]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(words))
        raise RuntimeError(f"CUDA: {(words.value or b'unknown error').decode()} ({status})")
