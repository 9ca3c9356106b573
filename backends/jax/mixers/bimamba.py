"""What mixers share that read a sequence in both directions: functions of the module `s6.add_parameters` has filled.

The reverse direction is that of the flipped sequence, so that it is an op as any other: with masks and segments too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_core.backend import LayerState
from mamba_core.backends.jax.mixers import Options, s6
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.call import Call


class Direction(NamedTuple):
    """The parts of one direction under the names that `s6` knows."""

    conv1d: Any
    x_proj: Any
    dt_proj: Any
    A_log: nnx.Param
    D: nnx.Param
    kernels: Any


def add_parameters(mixer: nnx.Module, config, layer: int, options: Options, own_selection: bool) -> None:
    """Gives the mixer the parameters of both directions.

    own_selection: the reverse one has all of its own but in_proj and out_proj.
    """
    s6.add_parameters(mixer, config, options)
    e, n, k, r = config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer.taps, mixer.factor = k, config.merge_factor
    mixer.A_b_log = nnx.Param(jnp.zeros((e, n)))
    of_layers = {"dtype": options.dtype, "param_dtype": options.dtype, "precision": precision(options.dtype)}
    of_layers |= {"rngs": options.rngs}
    if own_selection:
        filters = {"padding": "CAUSAL", "feature_group_count": e, "use_bias": config.conv_bias}
        mixer.conv1d_b = nnx.Conv(e, e, k, **filters, **of_layers)
        mixer.x_proj_b = nnx.Linear(e, r + 2 * n, use_bias=False, **of_layers)
        mixer.dt_proj_b = nnx.Linear(r, e, **of_layers)
        mixer.D_b = nnx.Param(jnp.ones(e))
    rate = config.drop_rate(layer)
    settings = {"broadcast_dims": (1, 2), "deterministic": True, "rngs": options.rngs}
    mixer.drop_path = nnx.Dropout(rate, **settings) if rate else None


def project_in(mixer, hidden: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
    """x and z (b, l, e)."""
    return s6.project_in(mixer, hidden, call)


def convolve(mixer, direction, x: jax.Array, call: Call) -> jax.Array:
    """From a window of zeros."""
    window = jnp.zeros((x.shape[0], mixer.taps - 1, x.shape[2]), x.dtype)
    return s6.convolve(direction, x, LayerState(window, None), call)[0]


def steps_of(direction, x: jax.Array, call: Call) -> tuple:
    """delta, B, C and the bias of the steps."""
    dt, B, C = s6.select(direction, x, call)
    delta, bias = s6.step_sizes(direction, dt, call)
    return delta, B, C, bias


def recur(direction, x: jax.Array, z: jax.Array, selection: tuple, call: Call) -> jax.Array:
    """From a state of zeros, with the gate."""
    delta, B, C, bias = selection
    return s6.recur(direction, x, delta, B, C, z, bias, LayerState(None, None), call)[0]


def merge(mixer, y: jax.Array, y_b: jax.Array, call: Call) -> jax.Array:
    """The output of the two directions, (b, l, d)."""
    y = s6.project_out(mixer, call.observe("merged", (y + y_b) * mixer.factor), call)
    return y if mixer.drop_path is None else mixer.drop_path(y)


def whole(call: Call) -> Call:
    """The call, without the step of one position, which needs a state."""
    return call._replace(one=False)


def reversed_call(call: Call) -> Call:
    """That of the flipped sequence. It reports its nodes as the positions lie, with "_b" behind their names."""
    turned = whole(call if call.reverse is None else call.reverse)
    if not call.observed:
        return turned
    return turned._replace(observe=lambda name, value: (call.observe(name + "_b", flip(value)), value)[1])


def flip(value: jax.Array) -> jax.Array:
    """Its positions in reverse order."""
    return value[:, ::-1]
