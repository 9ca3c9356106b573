"""What mixers share that read a sequence in both directions: functions of the module `s6.add_parameters` has filled.

The reverse direction is that of the flipped sequence, so that it is an op as any other: with masks and segments too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_core.backends.torch.kernels import triton_directions
from mamba_core.backends.torch.kernels.triton_mixer import Weights
from mamba_core.backends.torch.layers import DropPath, StepProjection
from mamba_core.backends.torch.mixers import Options, s6
from mamba_core.call import Call


class Direction(NamedTuple):
    """The parts of one direction under the names that `s6` knows."""

    conv1d: Any
    x_proj: Any
    dt_proj: Any
    A_log: Tensor
    D: Tensor
    kernels: Any
    sizes: tuple[int, int, int]


def add_parameters(mixer: nn.Module, config, layer: int, options: Options, own_selection: bool) -> None:
    """Gives the mixer the parameters of both directions.

    own_selection: the reverse one has all of its own but in_proj and out_proj.
    """
    s6.add_parameters(mixer, config, options)
    e, n, k, r = config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer.taps, mixer.factor = k, config.merge_factor
    mixer.A_b_log = nn.Parameter(torch.empty(e, n))
    if own_selection:
        mixer.conv1d_b = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        mixer.x_proj_b = nn.Linear(e, r + 2 * n, bias=False)
        mixer.dt_proj_b = StepProjection(r, e)
        mixer.D_b = nn.Parameter(torch.empty(e))
    mixer.drop_path = DropPath(config.drop_rate(layer)).eval()


def project_in(mixer, hidden: Tensor, call: Call) -> Tensor:
    """x and z side by side, (b, l, 2e)."""
    return call.observe("in_proj", s6.project(mixer, "in_proj", hidden))


def halves(xz: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """x and z (b, l, e)."""
    x, z = xz.chunk(2, dim=-1)
    return call.observe("x", x), call.observe("z", z)


def convolve(mixer, direction, x: Tensor, call: Call) -> Tensor:
    """From a window of zeros."""
    return s6.convolve(direction, x, x.new_zeros(len(x), mixer.taps - 1, x.shape[2]), call)[0]


def is_fused(directions, xz: Tensor, call: Call) -> bool:
    """Whether `fused` computes these two directions here."""
    return all(s6.is_fused(direction, xz, call) for direction in directions)


def fused(directions, xz: Tensor, factor: float, call: Call) -> Tensor:
    """What is between in_proj and out_proj, both directions merged, (b, l, e), as one operator."""
    restarts = call.restart, None if call.reverse is None else call.reverse.restart
    return triton_directions.merged(xz, *map(_weights, directions), factor, *restarts)


def _weights(direction) -> Weights:
    conv, steps = direction.conv1d, direction.dt_proj
    layers = (conv.weight[:, 0], conv.bias, direction.x_proj.weight, steps.weight, steps.bias)
    return Weights(*layers, -torch.exp(direction.A_log), direction.D)


def steps_of(direction, x: Tensor, call: Call) -> tuple:
    """delta, B, C and the bias of the steps."""
    dt, B, C = s6.select(direction, x, call)
    delta, bias = s6.step_sizes(direction, dt, call)
    return delta, B, C, bias


def recur(direction, x: Tensor, z: Tensor, selection: tuple, call: Call) -> Tensor:
    """From a state of zeros, with the gate."""
    delta, B, C, bias = selection
    return s6.recur(direction, x, delta, B, C, z, bias, None, call)[0]


def merge(mixer, y: Tensor, y_b: Tensor, call: Call) -> Tensor:
    """The mean or the sum of the two directions."""
    return call.observe("merged", (y + y_b) * mixer.factor)


def project_out(mixer, merged: Tensor, call: Call) -> Tensor:
    """The mixer's output, (b, l, d)."""
    return mixer.drop_path(call.observe("out_proj", s6.project(mixer, "out_proj", merged)))


def whole(call: Call) -> Call:
    """The call, without the step of one position, which needs a state."""
    return call._replace(one=False)


def reversed_call(call: Call) -> Call:
    """That of the flipped sequence. It reports its nodes as the positions lie, with "_b" behind their names."""
    turned = whole(call if call.reverse is None else call.reverse)
    if not call.observed:
        return turned
    return turned._replace(observe=lambda name, value: (call.observe(name + "_b", flip(value)), value)[1])


def flip(value: Tensor) -> Tensor:
    """Its positions in reverse order."""
    return value.flip(1)
