"""The layers of a mixer: as built their weights are read, and changed, whatever stands there is called.

A changed layer has no attributes that anything here depends on.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax.ops import causal_conv
from mamba_core.backends.jax.ops.linear import product_of_one
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call
from mamba_core.kernels import Kernels

ATTEND = nnx.Embed.attend


def linear(layer, x: jax.Array, policy: Kernels | None = None) -> jax.Array:
    """x (b, ..., i) -> (b, ..., o) in the dtype of x; an adapter may give another.

    policy: where one is given, a single position may be computed by the native library, as in a whole step.
    """
    y = None if policy is None else _of_one(layer, x, policy.of("block_step"))
    return in_dtype(x.dtype, layer(x) if y is None else y)


def _of_one(layer, x, kernel) -> jax.Array | None:
    """The product of a single position by the native library; None where the layer itself is to compute it."""
    if x.shape[1] != 1 or not untouched(nnx.Linear, layer):
        return None
    y = product_of_one(x, layer.kernel[...], transposed=True, kernel=kernel)
    return y if y is None or layer.bias is None else y + layer.bias[...]


def step_projection(layer, dt: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The step sizes before the softplus, and the bias that the scan is to add to them in float32.

    Of a layer that is called, the step sizes have the bias inside, and there is none to add.
    """
    if untouched(nnx.Linear, layer):
        bias = None if layer.bias is None else layer.bias[...]
        return jnp.matmul(dt, layer.kernel[...], precision=layer.precision), bias
    return linear(layer, dt), None


def bias(layer, dt: jax.Array) -> jax.Array:
    """The bias of a step projection, (e,) float32: what it gives for zeros."""
    if untouched(nnx.Linear, layer):
        return jnp.zeros(layer.kernel.shape[1]) if layer.bias is None else layer.bias[...]
    given = layer(jnp.zeros((1, 1, dt.shape[-1]), dt.dtype))[0, 0]
    return given.astype(jnp.promote_types(given.dtype, jnp.float32))


def convolution(
    layer, x: jax.Array, state: jax.Array, call: Call, kernel: str, name: str, activation: str | None = "silu"
) -> tuple[jax.Array, jax.Array]:
    """The causal convolution with its activation, (b, l, e), and its state: the last k-1 inputs, (b, k-1, e).

    name: of the layer, for errors.
    """
    if not is_convolution(layer):
        return causal_conv.by_module(layer, x, state, call, activation, name)
    weight, bias = layer.kernel[...][:, 0].T, None if layer.bias is None else layer.bias[...]
    if call.one:
        y, state = causal_conv.causal_conv_step(x[:, 0], weight, bias, activation=activation, state=state)
        return y[:, None], state
    return causal_conv.conv(call, x, weight, bias, activation=activation, initial_state=state, kernel=kernel)


def is_convolution(layer) -> bool:
    """Whether this is an untouched causal convolution of each channel."""
    return untouched(nnx.Conv, layer)


def attends(embeddings) -> bool:
    """Whether an embedding has a method `attend`, as a head, that is not flax's."""
    attend = getattr(embeddings, "attend", None)
    return attend is not None and getattr(attend, "__func__", None) is not ATTEND


def in_dtype(dtype, value: jax.Array) -> jax.Array:
    # Without jit even a conversion to the same dtype takes some microseconds.
    return value if value.dtype == dtype else value.astype(dtype)
