"""What mixers share that read a sequence in both directions: functions of the module `s6.add_parameters` has filled.

The reverse direction is that of the flipped sequence, so that it is an op as any other: with masks and segments too.
"""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.layers import DropPath, StepProjection
from mamba_core.backends.mlx.mixers import Options, s6
from mamba_core.call import Call


class Direction(NamedTuple):
    """The parts of one direction under the names that `s6` knows."""

    conv1d: Any
    x_proj: Any
    dt_proj: Any
    A_log: mx.array
    D: mx.array
    kernels: Any
    layer: int
    dt_rank: int
    d_state: int


def add_parameters(mixer: nn.Module, config, layer: int, options: Options, own_selection: bool) -> None:
    """Gives the mixer the parameters of both directions.

    own_selection: the reverse one has all of its own but in_proj and out_proj.
    """
    s6.add_parameters(mixer, config, layer, options)
    e, n, k, r = config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer.taps, mixer.factor = k, config.merge_factor
    mixer.A_b_log = mx.zeros((e, n))
    if own_selection:
        mixer.conv1d_b = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        mixer.x_proj_b = nn.Linear(e, r + 2 * n, bias=False)
        mixer.dt_proj_b = StepProjection(r, e)
        mixer.D_b = mx.ones((e,))
    mixer.drop_path = DropPath(config.drop_rate(layer)).eval()


def project_in(mixer, hidden: mx.array, call: Call) -> tuple[mx.array, mx.array]:
    """x and z (b, l, e)."""
    return s6.project_in(mixer, hidden, call._replace(last=False))


def convolve(mixer, direction, x: mx.array, call: Call) -> mx.array:
    """From a window of zeros."""
    return s6.convolve(direction, x, mx.zeros((len(x), mixer.taps - 1, x.shape[2]), x.dtype), call)[0]


def steps_of(direction, x: mx.array, call: Call) -> tuple:
    """delta, B, C and the bias of the steps."""
    dt, B, C = s6.select(direction, x, call)
    delta, bias = s6.step_sizes(direction, dt, call)
    return delta, B, C, bias


def recur(direction, x: mx.array, z: mx.array, selection: tuple, call: Call) -> mx.array:
    """From a state of zeros, with the gate."""
    delta, B, C, bias = selection
    return s6.recur(direction, x, delta, B, C, z, bias, None, call)[0]


def merge(mixer, y: mx.array, y_b: mx.array, call: Call) -> mx.array:
    """The output of the two directions, (b, l, d)."""
    return mixer.drop_path(s6.project_out(mixer, call.observe("merged", (y + y_b) * mixer.factor), call))


def whole(call: Call) -> Call:
    """The call, without the step of one position, which needs a state."""
    return call._replace(one=False)


def reversed_call(call: Call) -> Call:
    """That of the flipped sequence. It reports its nodes as the positions lie, with "_b" behind their names."""
    turned = whole(call if call.reverse is None else call.reverse)
    if not call.observed:
        return turned
    return turned._replace(observe=lambda name, value: (call.observe(name + "_b", flip(value)), value)[1])


def flip(value: mx.array) -> mx.array:
    """Its positions in reverse order."""
    return value[:, ::-1]
