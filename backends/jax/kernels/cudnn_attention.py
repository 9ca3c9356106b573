"""Causal attention of whole rows by cuDNN, through `jax.nn.dot_product_attention`."""

import functools

import jax
import jax.numpy as jnp

DTYPES = ("bfloat16", "float16")
# The size of a head, on every GPU that cuDNN has it for, and what divides it.
LARGEST, DIVISOR = 128, 8


def reason(device: str, dtype=None, size: int | None = None) -> str | None:
    """Why it cannot run there, for q of that dtype and heads of that size; None if it can."""
    if device != "gpu":
        return "it runs on an NVIDIA GPU only"
    if dtype is not None and str(dtype) not in DTYPES:
        return f"q is {dtype}, and it computes {' and '.join(DTYPES)}"
    if size is not None and (size > LARGEST or size % DIVISOR):
        return f"heads have {size} components, and it takes a multiple of {DIVISOR} up to {LARGEST}"
    return _missing()


def causal(q, k, v, *, scale):
    """y (b, l, h, p) of q (b, l, h, p) and k, v (b, l, g, p)."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")


@functools.cache
def _missing() -> str | None:
    """Why there is no GPU with it; None where there is one."""
    try:
        platform = jax.local_devices(backend="gpu")[0].client.platform_version
    except RuntimeError:
        return "there is no GPU"
    if "cuda" not in platform.lower():
        return "the GPU is not NVIDIA's"
    shape = jax.ShapeDtypeStruct((1, 8, 1, DIVISOR), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(causal, scale=1.0), shape, shape, shape)
    except (RuntimeError, NotImplementedError, ValueError) as fault:
        return " ".join(str(fault).split())
    return None
