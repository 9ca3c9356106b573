"""CUDA C++ compiled when it is first needed, by NVRTC, which every framework's CUDA build brings along; no toolkit.

What was compiled is kept in the user's cache: `mamba_core.cache`.
"""

import ctypes
import functools
import hashlib
import importlib.util
from pathlib import Path

from mamba_core import cache

# Newest first; what is loaded already wins.
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        _library()
    except OSError as fault:
        return str(fault)
    return None


@functools.cache
def compile_source(source: str, defines: tuple[tuple[str, int], ...], architecture: str, form: str = "CUBIN") -> bytes:
    """A source compiled for an architecture such as "sm_90": its cubin, or with form="PTX" that text.

    Raises:
        RuntimeError: the compiler refuses it; its own words.
        OSError: there is no NVRTC.
    """
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines)]
    key = hashlib.sha256("\0".join([source, *options, repr(_version())]).encode()).hexdigest()
    kept = cache.folder() / f"{key}.{form.lower()}"
    if kept.is_file():
        return kept.read_bytes()
    image = _compile(source, options, form)
    cache.keep(kept, image)
    return image


def _compile(source: str, options: list[str], form: str) -> bytes:
    library, program = _library(), ctypes.c_void_p()
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        if library.nvrtcCompileProgram(program, len(options), arguments):
            raise RuntimeError(f"NVRTC cannot compile the kernels:\n{_read(program, 'ProgramLog').decode()}")
        return _read(program, form)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, text))
    return text.raw if what == "CUBIN" else text.value


@functools.cache
def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _check(status: int) -> None:
    if status:
        _library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {_library().nvrtcGetErrorString(status).decode()}")


@functools.cache
def _library() -> ctypes.CDLL:
    for path in [*_packaged(), *_NAMES]:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise OSError("there is no NVRTC; pip install nvidia-cuda-nvrtc, or the CUDA build of a framework")


def _packaged() -> list[Path]:
    """NVIDIA's own packages, which the frameworks' CUDA builds depend on."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else [Path(folder) for folder in found.submodule_search_locations or ()]
    return [path for name in _NAMES[:2] for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
