"""Arrays in and out of JAX: devices, dtypes, NumPy, and the vector-Jacobian product that the tests compare."""

import contextlib
import platform

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from mamba_core.backends.gpu import triton_image

# The platforms that JAX lowers for -> their devices as `devices` names them.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}


def devices() -> list[str]:
    """The platforms JAX sees, its default first: "gpu" for CUDA and ROCm alike, "tpu", "cpu"."""
    found = [jax.default_backend()]
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
        found.append(jax.devices("cpu")[0].platform)
    return list(dict.fromkeys(found))


def dtype_of(name: str) -> np.dtype:
    """float64 and int64 need jax_enable_x64; JAX would otherwise halve them without a word."""
    dtype = jnp.dtype(name)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype {name!r} needs jax.config.update('jax_enable_x64', True)")
    return dtype


def dtype_name(dtype) -> str:
    return jnp.dtype(dtype).name


def from_numpy(value, dtype: str | None = None, device: str | None = None) -> jax.Array:
    """Without `dtype`, 64-bit values come in as 32-bit ones unless jax_enable_x64 is on, as everywhere in JAX."""
    place = None if device is None else jax.local_devices(backend=device)[0]
    return jnp.array(value, None if dtype is None else dtype_of(dtype), device=place)


def as_array(name: str, value) -> jax.Array | None:
    """An argument of a model, which may be None or a NumPy array, as everywhere in JAX.

    Raises:
        TypeError: it is a list, or an array of another framework.
    """
    if value is None or isinstance(value, jax.Array):
        return value
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} is {kind}; expected a jax.Array or a NumPy array, such as of numpy.asarray({name})")
    if value.dtype.kind in "iu" and not jax.config.jax_enable_x64:
        value = np.clip(value, np.iinfo(np.int32).min, np.iinfo(np.int32).max)  # JAX would cut off their upper bits
    return jnp.asarray(value)


def to_numpy(array) -> np.ndarray:
    return np.asarray(array)


def on_device(device: str):
    """A context in which arrays without a place of their own are on that device."""
    return jax.default_device(jax.local_devices(backend=device)[0])


def device_facts(device: str) -> dict[str, str]:
    """The device's name and the versions that its kernels depend on.

    Raises:
        RuntimeError: there is no such device.
    """
    first = jax.local_devices(backend=device)[0]
    name = first.device_kind if device != "cpu" else platform.processor() or platform.machine()
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    if (triton := triton_image.version()) is not None:
        versions["triton"] = triton
    return {"device": name, **versions, "driver": " ".join(first.client.platform_version.split())}


def peak_memory(device: str) -> int | None:
    return (jax.devices(device)[0].memory_stats() or {}).get("peak_bytes_in_use")


def vjp(function, arguments, cotangents) -> tuple[list, list]:
    """By `jax.vjp` of the jitted function."""
    outputs, pullback = jax.vjp(jax.jit(function), *arguments)
    gradients = pullback(tuple(jnp.asarray(value, out.dtype) for value, out in zip(cotangents, outputs, strict=True)))
    return [to_numpy(out) for out in outputs], [to_numpy(gradient) for gradient in gradients]
