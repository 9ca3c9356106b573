"""Products with weights. `nnx.Linear` computes those inside a block; the head's and the loss's are computed here."""

import jax
import jax.numpy as jnp
from jax import lax

from mamba_core.backends.jax.kernels import native_step


def precision(dtype: str) -> lax.Precision | None:
    """Of products of that dtype: by default GPU and TPU would round float32 to TF32 or bfloat16."""
    return lax.Precision.HIGHEST if dtype == "float32" else None


def product(x: jax.Array, weight: jax.Array, *, transposed: bool) -> jax.Array:
    """x (b, ..., in) times the transpose of weight (out, in), or weight (in, out) where transposed, in float32."""
    weight = weight if transposed else weight.T
    return jnp.matmul(x, weight, precision=precision(str(x.dtype)), preferred_element_type=jnp.float32)


KERNELS = {"plain": product}


def kernels(device: str, dtype=None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS)


def product_of_one(x: jax.Array, weight: jax.Array, *, transposed: bool, kernel: str) -> jax.Array | None:
    """`product` of x (b, in) or (b, 1, in) by the native kernel; None where `product` itself is to compute it.

    kernel: the policy's for the op "block_step", because it is the head's part of a step.
    """
    one = x.ndim == 2 or (x.ndim == 3 and x.shape[1] == 1)
    fits = x.shape[-1] == weight.shape[0 if transposed else 1] and weight.dtype == x.dtype
    if not (one and fits) or native_step.why_not(kernel, x, weight.dtype) is not None:
        return None
    y = _native(x.reshape(x.shape[0], -1), weight, transposed=transposed, portable=kernel == "auto")
    return y.reshape(*x.shape[:-1], -1)


_native = native_step.product_beside(product)
