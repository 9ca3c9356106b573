"""The short causal convolution: k shifted multiply-adds, which XLA fuses; on a CPU and an NVIDIA GPU in one pass."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mamba_core.backends.jax.arrays import PLATFORMS
from mamba_core.backends.jax.kernels import cuda_conv, cuda_scan, native_conv
from mamba_core.backends.jax.kernels.operator import HOMES
from mamba_core.backends.jax.kernels.operator import reason as why_not_native
from mamba_core.backends.jax.positions import call_of, compaction
from mamba_core.kernels import choose
from mamba_core.spec.ops.causal_conv import check_conv, check_conv_step


def causal_conv(
    x,
    weight,
    bias=None,
    *,
    activation=None,
    initial_state=None,
    return_final_state=False,
    mask=None,
    segment_ids=None,
    kernel="auto",
):
    """kernel="auto" is resolved as that of `selective_scan`."""
    check_conv(x, weight, bias, activation, initial_state, mask, segment_ids)
    call = call_of(mask, segment_ids, length=x.shape[1])
    y, state = conv(call, x, weight, bias, activation=activation, initial_state=initial_state, kernel=kernel)
    return (y, state) if return_final_state else y


def conv(call, x, weight, bias=None, *, activation=None, initial_state=None, kernel="auto"):
    """`causal_conv` in a call whose positions are known: (y, final state)."""
    check_conv(x, weight, bias, activation, initial_state, call.mask, call.segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], weight.shape[1] - 1, x.shape[2]), x.dtype)
    positions = (call.mask, call.restart, call.order, call.inverse)
    return _conv(x, weight, bias, initial_state, *positions, activation=activation, kernel=kernel)


def causal_conv_step(x, weight, bias=None, *, activation=None, state):
    check_conv_step(x, weight, bias, activation, state)
    state, x = state.astype(x.dtype), x[:, None]
    y = _filter(x, state, weight, bias, None, activation)
    return y[:, 0].astype(x.dtype), jnp.concatenate([state, x], axis=1)[:, 1:]


def kernels(device: str, dtype=None) -> dict[str, str | None]:
    """The plain one is made of JAX's own operations and runs on every device."""
    reasons = {"native": why_not_native(device, dtype), "cuda": cuda_scan.reason(device, dtype)}
    return dict.fromkeys(KERNELS) | reasons


@functools.partial(jax.jit, static_argnames=("activation", "kernel"))
def _conv(x, weight, bias, state, mask, restart, order, inverse, *, activation, kernel):
    arguments = (x, weight, bias, state.astype(x.dtype), mask, restart, order, inverse)
    if kernel != "auto":
        run = shifted if kernel == "plain" else KERNELS[_that_runs(kernel, x.dtype)]
        return run(*arguments, activation=activation)
    fastest = {
        platform: choose("auto", kernels(device, x.dtype), "causal_conv", "jax", device)
        for platform, device in PLATFORMS.items()
    }
    branches = {
        platform: functools.partial(KERNELS[name], activation=activation, portable=True)
        for platform, name in fastest.items()
        if name in HOMES
    }
    return lax.platform_dependent(*arguments, **branches, default=functools.partial(shifted, activation=activation))


def _that_runs(kernel, dtype):
    """The kernel of that name, which must run on its own device: the true one is known only when it is lowered."""
    return choose(kernel, kernels(HOMES.get(kernel, "cpu"), dtype), "causal_conv")


def shifted(x, weight, bias, state, mask, restart, order=None, inverse=None, *, activation):
    """A multiply-add of the whole length for each tap. order and inverse: the mask's, computed here where absent."""
    length, carried = x.shape[1], state.shape[1]
    if mask is None:
        end = jnp.full(x.shape[:1], length)
    else:
        order, inverse = compaction(mask) if order is None else (order, inverse)
        end = mask.sum(1)
        x = jnp.take_along_axis(jnp.where(mask[..., None], x, 0), order[..., None], axis=1)
        restart = None if restart is None else jnp.take_along_axis(restart, order, axis=1)
    run = None if restart is None else jnp.pad(jnp.cumsum(restart, axis=1), ((0, 0), (carried, 0)))

    y = _filter(x, state, weight, bias, run, activation).astype(x.dtype)
    if mask is not None:
        y = jnp.where(mask[..., None], jnp.take_along_axis(y, inverse[..., None], axis=1), 0)

    last = end[:, None] + jnp.arange(carried)
    state = jnp.take_along_axis(jnp.concatenate([state, x], axis=1), last[..., None], axis=1)
    if run is not None:
        in_last_run = jnp.take_along_axis(run, last, axis=1) == restart.sum(1, keepdims=True)
        state = jnp.where(in_last_run[..., None], state, 0)
    return y, state


def by_module(layer, x, state, call, activation, name):
    """`conv` by a module that somebody put in the place of the convolution, which is called: (y, final state).

    Masked positions and restarts are those of `shifted`. name: of the layer, for errors.
    """
    length, carried, state = x.shape[1], state.shape[1], state.astype(x.dtype)
    check_taps(layer, carried + 1, name)
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
        y = valid(layer, inputs, carried + 1, name)
    else:
        run = jnp.pad(jnp.cumsum(restart, axis=1), ((0, 0), (carried, 0)))
        y = _by_window(layer, inputs, run, carried + 1, name)
        in_last_run = jnp.take_along_axis(run, last, axis=1) == restart.sum(1, keepdims=True)
        after = jnp.where(in_last_run[..., None], after, 0)
    y = _activate(y.astype(jnp.promote_types(y.dtype, jnp.float32)), activation).astype(x.dtype)
    if call.mask is not None:
        y = jnp.where(call.mask[..., None], jnp.take_along_axis(y, call.inverse[..., None], axis=1), 0)
    return y, after


def check_taps(layer, taps: int, name: str) -> None:
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


def valid(layer, inputs: jax.Array, taps: int, name: str) -> jax.Array:
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


KERNELS = {"native": native_conv.beside(shifted), "cuda": cuda_conv.beside(shifted), "shifted": shifted}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _filter(x, state, weight, bias, run, activation):
    """The filter over x (b, l, e) after state (b, k-1, e), in float32; `run` (b, k-1+l) counts the restarts so far.

    The gradient is by hand: XLA turns JAX's own into a sum for each tap that is seven times slower on a CPU.
    """
    return _activate(_linear(_windows(x, state, run), weight, bias), activation)


def _filter_forward(x, state, weight, bias, run, activation):
    # `_filter` itself would refuse forward mode over reverse.
    y = _activate(_linear(_windows(x, state, run), weight, bias), activation)
    return y, (x, state, weight, bias, run)


def _filter_backward(activation, saved, dy):
    x, state, weight, bias, run = saved
    windows = _windows(x, state, run)
    _, pullback = jax.vjp(lambda linear: _activate(linear, activation), _linear(windows, weight, bias))
    (g,) = pullback(dy)
    dweight = jnp.stack([(g * window).sum((0, 1)) for window in windows], axis=1).astype(weight.dtype)
    dbias = None if bias is None else g.sum((0, 1)).astype(bias.dtype)
    length, carried = x.shape[1], state.shape[1]
    dx, dstate = 0.0, jnp.zeros(state.shape, g.dtype)
    for tap in range(carried + 1):
        through_tap = weight[:, tap] * _where_it_sees(g, run, tap, carried)
        dx += _moved(through_tap, tap - carried, length)
        dstate += _moved(through_tap, tap, carried)
    return dx.astype(x.dtype), dstate.astype(state.dtype), dweight, dbias, None


_filter.defvjp(_filter_forward, _filter_backward)


def _windows(x, state, run):
    """The inputs that each tap sees: (b, l, e), zero where they stand before the last restart."""
    x, state = (value.astype(jnp.promote_types(value.dtype, jnp.float32)) for value in (x, state))
    length, carried = x.shape[1], state.shape[1]
    windows = (_moved(x, carried - tap, length) + _moved(state, -tap, length) for tap in range(carried + 1))
    return [_where_it_sees(window, run, tap, carried) for tap, window in enumerate(windows)]


def _moved(values, later, length):
    """The values moved so many positions later: (b, length, e), zero where there are none."""
    return lax.pad(
        values, jnp.zeros((), values.dtype), [(0, 0, 0), (later, length - later - values.shape[1], 0), (0, 0, 0)]
    )


def _where_it_sees(values, run, tap, carried):
    """The values, zero where the tap would see an input from before the last restart."""
    if run is None:
        return values
    length = values.shape[1]
    return jnp.where((run[:, tap : tap + length] == run[:, carried:])[..., None], values, 0)


def _linear(windows, weight, bias):
    weight = weight.astype(windows[0].dtype)
    total = sum(weight[:, tap] * window for tap, window in enumerate(windows))
    return total if bias is None else total + bias.astype(total.dtype)


def _activate(linear, activation):
    return jax.nn.silu(linear) if activation == "silu" else linear


def _by_window(layer, inputs, run, taps, name):
    """Of each position's inputs alone, zero where they stand before the last restart: k times the work."""
    batch, _, channels = inputs.shape
    length = inputs.shape[1] - taps + 1
    at = jnp.arange(length)[:, None] + jnp.arange(taps)
    windows = jnp.where((run[:, at] == run[:, taps - 1 :, None])[..., None], inputs[:, at], 0)
    return valid(layer, windows.reshape(-1, taps, channels), taps, name).reshape(batch, length, channels)


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
