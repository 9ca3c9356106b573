"""The RMS norm: x / sqrt(mean(x^2) + eps) * scale."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float, dtype) -> jax.Array:
    """Over the last axis, in float32, returned in `dtype`. Without a scale where that is None."""
    x = x.astype(jnp.float32)
    y = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return (y if scale is None else y * scale.astype(jnp.float32)).astype(dtype)


# XLA fuses it with what stands around it.
KERNELS = {"plain": rms_norm}


def kernels(device: str, dtype=None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS)
