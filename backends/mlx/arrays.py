"""NumPy in and out, dtypes, devices, the settings of the process and differentiation in MLX."""

import os
import platform

import ml_dtypes
import mlx.core as mx
import numpy as np

from mamba_core.backends.gpu import driver

DTYPES = {
    "float32": mx.float32,
    "bfloat16": mx.bfloat16,
    "float16": mx.float16,
    "int8": mx.int8,
    "int16": mx.int16,
    "int32": mx.int32,
    "int64": mx.int64,
    "uint8": mx.uint8,
    "uint16": mx.uint16,
    "uint32": mx.uint32,
    "uint64": mx.uint64,
    "bool": mx.bool_,
}

# Whether MLX may round the factors of float32 products to TF32, on a GPU that has it: "1" by MLX's default.
TF32 = "MLX_ENABLE_TF32"
_asked_for, _set_by_user = False, False


def keep_float32() -> None:
    """Have MLX compute products of float32 in float32, as the other backends do, unless the user set the variable.

    The first model and the first op call this. MLX reads the variable once, at its first product: where the program
    has multiplied in MLX before that, the user's or MLX's own setting stays.
    """
    global _asked_for, _set_by_user
    if not _asked_for:
        _asked_for, _set_by_user = True, TF32 in os.environ
        os.environ.setdefault(TF32, "0")


def in_force() -> dict[str, str]:
    """The settings of the whole process that this backend depends on: name -> value, and who set it."""
    if TF32 not in os.environ:
        return {TF32: "not set; 0 from the first model or op of mamba_core"}
    who = "mamba_core" if _asked_for and not _set_by_user else "the user"
    return {TF32: f"{os.environ[TF32]}, set by {who}"}


def devices() -> list[str]:
    """ "gpu" (Metal or CUDA) where there is one, and "cpu"."""
    gpu = mx.metal.is_available() or mx.cuda.is_available()
    return ["gpu", "cpu"] if gpu else ["cpu"]


def default_device() -> str:
    """MLX's own default at the time: "cpu" or "gpu"."""
    return mx.default_device().type.name


def check_device(device: str | None) -> None:
    if device is not None and device not in devices():
        raise ValueError(f"device is {device!r}; MLX has {' and '.join(devices())} here")


def dtype_named(name: str) -> mx.Dtype:
    """float64 is refused: no MLX GPU has it."""
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; on MLX expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.").removesuffix("_")


def kind_of(value: object) -> str:
    """The full name of a value's class, for errors."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_array(name: str, value: object) -> None:
    """Check that an argument of a model's call is MLX's, or None."""
    if value is not None and not isinstance(value, mx.array):
        raise TypeError(f"{name} is {kind_of(value)}; expected mlx.core.array, so pass mx.array({name})")


def from_numpy(value, dtype: str | None = None, device: str | None = None) -> mx.array:
    """float64 becomes float32. MLX arrays live in memory that every device sees: `device` is only checked."""
    check_device(device)
    value = np.asarray(value)
    name = dtype or ("float32" if value.dtype == np.float64 else value.dtype.name)
    if value.dtype == ml_dtypes.bfloat16:
        # MLX does not read NumPy's bfloat16: the same bytes under a name that both know.
        return mx.array(value.view(np.uint16)).view(mx.bfloat16).astype(dtype_named(name))
    return mx.array(value).astype(dtype_named(name))


def to_numpy(array: mx.array) -> np.ndarray:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def random_key() -> int | None:
    """The state of MLX's random numbers; None inside `mx.compile`, where it may only stand for one."""
    try:
        high, low = mx.random.state[0].tolist()
    except ValueError:
        return None
    return high << 32 | low


def set_random_key(key: int | None) -> None:
    """Go on from a state of `random_key`."""
    if key is not None:
        mx.random.seed(key)


def on_device(device: str):
    """A context in which operations are computed on that device."""
    return mx.stream(getattr(mx, device))


def device_facts(device: str) -> dict[str, str]:
    """The device's name and the versions that its kernels depend on.

    Raises:
        ValueError: there is no such device.
    """
    check_device(device)
    facts = mx.device_info(getattr(mx, device)) if hasattr(mx, "device_info") else {}
    found = {"device": str(facts.get("device_name") or platform.processor() or platform.machine())}
    found |= {"mlx": mx.__version__}
    if device == "gpu":
        # On a Mac the driver is part of the system.
        found |= {"architecture": str(facts.get("architecture", "")), "system": platform.platform()}
        found |= {"driver": driver.version()}
    return found


def peak_memory(device: str) -> int | None:
    return mx.get_peak_memory() if device == "gpu" else None


def vjp(function, arguments, cotangents) -> tuple[list[np.ndarray], list[np.ndarray]]:
    outputs, gradients = mx.vjp(function, list(arguments), list(cotangents))
    return [to_numpy(output) for output in outputs], [to_numpy(gradient) for gradient in gradients]
