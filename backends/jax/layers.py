"""The layers of a mixer: as built their weights are read, and changed, whatever stands there is called.

A changed layer has no attributes that anything here depends on.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backends.jax.ops.causal_conv import causal_conv_step, conv
from mamba_core.backends.jax.untouched import untouched
from mamba_core.call import Call

ATTEND = nnx.Embed.attend


def linear(layer, x: jax.Array) -> jax.Array:
    """x (b, ..., i) -> (b, ..., o) in the dtype of x; an adapter may give another."""
    return in_dtype(x.dtype, layer(x))


def step_projection(layer, dt: jax.Array, times: int = 1) -> tuple[jax.Array, jax.Array | None]:
    """dt (b, l, r) -> (b, l, e), and (e,) float32 of its bias: what is still to be added, so that it enters so often.

    A changed layer has added its bias once.
    """
    if untouched(nnx.Linear, layer):
        bias = layer.bias[...]
        return jnp.matmul(dt, layer.kernel[...], precision=layer.precision), bias if times == 1 else times * bias
    delta = linear(layer, dt)
    if times == 1:
        return delta, None
    bias = layer(jnp.zeros((1, 1, dt.shape[-1]), dt.dtype))[0, 0]
    return delta, (times - 1) * bias.astype(jnp.promote_types(bias.dtype, jnp.float32))


def causal_conv(layer, name: str, x: jax.Array, state: jax.Array, call: Call, kernel: str):
    """(x (b, l, e) after the convolution and its SiLU, its state (b, k-1, e)). name: of the layer, for an error."""
    if untouched(nnx.Conv, layer):
        weight, bias = layer.kernel[...][:, 0].T, None if layer.bias is None else layer.bias[...]
        if not call.one:
            return conv(call, x, weight, bias, activation="silu", initial_state=state, kernel=kernel)
        y, after = causal_conv_step(x[:, 0], weight, bias, activation="silu", state=state)
        return y[:, None], after
    check_taps(layer, name, state.shape[1] + 1)
    y, after = _called(layer, name, x, state.astype(x.dtype), call)
    return jax.nn.silu(y.astype(jnp.promote_types(y.dtype, jnp.float32))).astype(x.dtype), after


def check_taps(layer, name: str, taps: int) -> None:
    """Check that the convolutions inside of a changed layer look at so many inputs, the position's own the last.

    Raises:
        TypeError: one does not.
    """
    for path, inside in nnx.iter_modules(layer) if isinstance(layer, nnx.Module) else ():
        if isinstance(inside, nnx.Conv) and (fault := _reaches_further(inside, taps)):
            where = ".".join(map(str, (name, *path)))
            raise TypeError(
                f"{where} has {fault}; expected a convolution of at most {taps} inputs, the position's own the last: "
                f"nnx.Conv(..., kernel_size={taps}, padding='CAUSAL')"
            )


def valid(layer, name: str, inputs: jax.Array, taps: int) -> jax.Array:
    """The layer's outputs at the positions that have all their inputs: (b, l, e) of inputs (b, l + k - 1, e).

    A layer may pad with k - 1 zeros on the left, on both sides, or not at all.
    """
    y, more = layer(inputs), taps - 1
    given = inputs.shape[1]
    if y.ndim == 3 and (y.shape[0], y.shape[2]) == (inputs.shape[0], inputs.shape[2]):
        for count, first in ((given, more), (given + more, more), (given - more, 0)):
            if y.shape[1] == count:
                return y[:, first : first + given - more]
    raise TypeError(
        f"{name}, {type(layer).__name__}, gave {y.shape} for {inputs.shape}; expected (b, l, e) with as many "
        f"positions, with {more} more, or with {more} fewer"
    )


def attends(embeddings) -> bool:
    """Whether an embedding has a method `attend`, as a head, that is not flax's."""
    attend = getattr(embeddings, "attend", None)
    return attend is not None and getattr(attend, "__func__", None) is not ATTEND


def in_dtype(dtype, value: jax.Array) -> jax.Array:
    # Without jit even a conversion to the same dtype takes some microseconds.
    return value if value.dtype == dtype else value.astype(dtype)


def _called(layer, name, x, state, call):
    """(what the layer gives, its state), as `ops.causal_conv.shifted` orders masked positions and restarts."""
    length, carried = x.shape[1], state.shape[1]
    if isinstance(length, int) and length == 0:
        return x, state
    restart, end = call.restart, jnp.full(x.shape[:1], length)
    if call.mask is not None:
        order, end = call.order, call.mask.sum(1)
        x = jnp.take_along_axis(jnp.where(call.mask[..., None], x, 0), order[..., None], axis=1)
        restart = None if restart is None else jnp.take_along_axis(restart, order, axis=1)
    inputs = jnp.concatenate([state, x], axis=1)
    last = end[:, None] + jnp.arange(carried)
    after = jnp.take_along_axis(inputs, last[..., None], axis=1)
    if restart is None:
        y = valid(layer, name, inputs, carried + 1)
    else:
        run = jnp.pad(jnp.cumsum(restart, axis=1), ((0, 0), (carried, 0)))
        y = _by_window(layer, name, inputs, run, carried + 1)
        in_last_run = jnp.take_along_axis(run, last, axis=1) == restart.sum(1, keepdims=True)
        after = jnp.where(in_last_run[..., None], after, 0)
    if call.mask is not None:
        y = jnp.where(call.mask[..., None], jnp.take_along_axis(y, call.inverse[..., None], axis=1), 0)
    return y, after


def _by_window(layer, name, inputs, run, taps):
    """Of each position's inputs alone, zero where they stand before the last restart: k times the work."""
    batch, _, channels = inputs.shape
    length = inputs.shape[1] - taps + 1
    at = jnp.arange(length)[:, None] + jnp.arange(taps)
    windows = jnp.where((run[:, at] == run[:, taps - 1 :, None])[..., None], inputs[:, at], 0)
    return valid(layer, name, windows.reshape(-1, taps, channels), taps).reshape(batch, length, channels)


def _reaches_further(layer: nnx.Conv, taps: int) -> str | None:
    """What makes a convolution look at other inputs than the last ones."""
    for name in ("strides", "input_dilation", "kernel_dilation"):
        value = getattr(layer, name)
        if value not in (None, 1) and any(each != 1 for each in jax.tree.leaves(value)):
            return f"{name}={value}"
    if len(layer.kernel_size) != 1 or layer.kernel_size[0] > taps:
        return f"kernel_size={layer.kernel_size}"
    more, padding = layer.kernel_size[0] - 1, layer.padding
    sides = {"CAUSAL": (more, 0), "VALID": (0, 0)}.get(padding) if isinstance(padding, str) else padding
    while isinstance(sides, (list, tuple)) and len(sides) == 1:
        sides = sides[0]
    sides = (sides, sides) if isinstance(sides, int) else sides
    if more and (sides is None or tuple(sides) not in ((0, 0), (more, 0), (more, more))):
        return f"padding={padding!r}"
    return None
