"""The parts of Mamba-1's mixer (Gu and Dao 2023, figure 3), as functions that mixers like it are made of.

Each takes the mixer, whose layers are modules under the canonical names. `layers` calls those that are not as they were
built, so that others may stand in their place: LoRA, quantised layers.
"""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx import layers
from mamba_core.backends.mlx.mixers import Options
from mamba_core.backends.mlx.ops import linear, selective_scan
from mamba_core.backends.mlx.ops.rms_norm import rms_norm
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call

# Linear layers that look at each position alone.
LINEAR = (nn.Linear, layers.StepProjection, nn.QuantizedLinear)


def add_parameters(mixer: nn.Module, config, layer: int, options: Options) -> None:
    """Give the mixer its submodules, parameters and sizes."""
    d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer.layer = layer
    mixer.kernels = options.kernels
    mixer.dt_rank = r
    mixer.d_state = n
    mixer.in_proj = nn.Linear(d, 2 * e, bias=config.bias)
    mixer.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
    mixer.x_proj = nn.Linear(e, r + 2 * n, bias=False)
    mixer.dt_proj = layers.StepProjection(r, e)
    mixer.A_log = mx.zeros((e, n))
    mixer.D = mx.ones((e,))
    mixer.out_proj = nn.Linear(e, d, bias=config.bias)


def project_in(mixer: nn.Module, hidden: mx.array, call: Call) -> tuple[mx.array, mx.array]:
    """x (b, l, e), and the gate z for those positions whose output is wanted: (b, l, e), or (b, 1, e) of the last."""
    if is_last_only(mixer, hidden, call):
        e = len(mixer.in_proj.weight) // 2
        return project_rows(mixer, hidden, slice(e)), project_rows(mixer, hidden[:, -1:], slice(e, None))
    x, z = mx.split(call.observe("in_proj", _linear(mixer, mixer.in_proj, hidden)), 2, axis=-1)
    return call.observe("x", x), call.observe("z", z)


def is_last_only(mixer: nn.Module, hidden: mx.array, call: Call) -> bool:
    """Whether the last position's output alone is wanted, and may be computed."""
    # In bfloat16 the recurrence without z would round its output before the gate.
    wanted = call.last and not call.observed and hidden.shape[1] > 1 and hidden.dtype == mx.float32
    return wanted and untouched(nn.Linear, mixer.in_proj, mixer.out_proj)


def project_rows(mixer: nn.Module, hidden: mx.array, rows: slice) -> mx.array:
    """These outputs of in_proj alone."""
    y = linear.linear(hidden, mixer.in_proj.weight[rows], mixer.kernels.of("linear"))
    return y + mixer.in_proj.bias[rows] if "bias" in mixer.in_proj else y


def convolve(
    mixer: nn.Module, x: mx.array, state: mx.array, call: Call, activation: str | None = "silu"
) -> tuple[mx.array, mx.array]:
    """The causal convolution and its activation; x (b, l, e) -> (b, l, e) and the convolution's state."""
    kernel = mixer.kernels.of("causal_conv")
    y, state = layers.convolution(mixer.conv1d, x, state, call, kernel, name(mixer, "conv1d"), activation)
    return call.observe("conv", y), state


def select(mixer: nn.Module, x: mx.array, call: Call) -> tuple[mx.array, mx.array, mx.array]:
    """dt (b, l, r), B and C (b, l, n): what makes the scan depend on its input."""
    dtbc = call.observe("x_proj", _linear(mixer, mixer.x_proj, x))
    dt, B, C = mx.split(dtbc, [mixer.dt_rank, mixer.dt_rank + mixer.d_state], axis=-1)
    return call.observe("dt", dt), call.observe("B", B), call.observe("C", C)


def norm_selection(mixer: nn.Module, dt, B, C, eps: float, call: Call) -> tuple[mx.array, mx.array, mx.array]:
    """dt, B and C after an RMS norm without weight of each."""
    named, kernel = {"dt_norm": dt, "B_norm": B, "C_norm": C}, mixer.kernels.of("rms_norm")
    dt, B, C = (call.observe(name, rms_norm(value, None, eps, kernel=kernel)) for name, value in named.items())
    return dt, B, C


def step_sizes(mixer: nn.Module, dt: mx.array, call: Call) -> tuple[mx.array, mx.array | None]:
    """delta (b, l, e), and the bias that the scan still has to add to it; None where delta has it already."""
    delta, bias = layers.step_projection(mixer.dt_proj, dt, mixer.kernels.of("linear"))
    return call.observe("dt_proj", delta), bias


def recur(mixer: nn.Module, x, delta, B, C, z, bias, state, call: Call) -> tuple[mx.array, mx.array]:
    """The recurrence and, where z is given, the gate silu(z): the output at z's positions, and the new state."""
    settings = {"delta_bias": bias, "delta_softplus": True}
    A, D = -mx.exp(mixer.A_log), mixer.D
    if call.one:
        x, delta, B, C, z = (value if value is None else value[:, 0] for value in (x, delta, B, C, z))
        y, state = selective_scan.selective_step(x, delta, A, B, C, D, z=z, **settings, state=state)
        return call.observe("scan", y[:, None]), state
    fewer = z is not None and z.shape[1] < x.shape[1]
    y, state = selective_scan.scan(
        *(call, x, delta, A, B, C, D),
        z=None if fewer else z,
        **settings,
        initial_state=state,
        kernel=mixer.kernels.of("selective_scan"),
    )
    if fewer:
        y = at_positions_of(z, y) * nn.silu(z)
    return call.observe("scan", y), state


def at_positions_of(z: mx.array, y: mx.array) -> mx.array:
    """y where there is a z: everywhere, or at the last position."""
    return y if z.shape[1] == y.shape[1] else y[:, -z.shape[1] :]


def project_out(mixer: nn.Module, y: mx.array, call: Call) -> mx.array:
    return call.observe("out_proj", _linear(mixer, mixer.out_proj, y))


def name(mixer: nn.Module, module: str) -> str:
    """The canonical name of one of the mixer's modules."""
    return f"backbone.layers.{mixer.layer}.mixer.{module}"


def _linear(mixer, layer, x):
    return layers.linear(layer, x, mixer.kernels.of("linear"))


def width(mixer: nn.Module) -> int | None:
    """Elements of its widest array, in_proj's output, for each position; None if a layer was replaced.

    Another layer may look along the sequence.
    """
    linears = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    known = all(any(untouched(kind, layer) for kind in LINEAR) for layer in linears)
    return 2 * len(mixer.A_log) if known and layers.is_convolution(mixer.conv1d) else None
