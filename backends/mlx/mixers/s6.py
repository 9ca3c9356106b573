"""The parts of Mamba-1's mixer (Gu and Dao 2023, figure 3), as functions that mixers like it are made of.

Each takes the mixer, whose projections are modules under the canonical names and are called, so that others may stand
in their place: LoRA, quantised layers. What is read instead, the weights of conv1d, may not be replaced.
"""

import mlx.core as mx
import mlx.nn as nn

from mamba_core.backends.mlx.mixers import Options
from mamba_core.backends.mlx.ops import causal_conv, linear, selective_scan
from mamba_core.backends.mlx.ops.rms_norm import rms_norm
from mamba_core.backends.mlx.untouched import untouched
from mamba_core.call import Call


class StepProjection(nn.Module):
    """dt_proj without its bias, which the scan adds in float32.

    Not an `nn.Linear`, so that `nn.quantize` leaves it alone: its rank is small and seldom a multiple of a group.
    """

    def __init__(self, rank: int, channels: int, options: Options):
        super().__init__()
        self.kernel = options.kernels.of("linear")
        self.weight = mx.zeros((channels, rank))
        self.bias = mx.zeros((channels,))

    def __call__(self, dt: mx.array) -> mx.array:
        return linear.linear(dt, self.weight, self.kernel)


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
    mixer.dt_proj = StepProjection(r, e, options)
    mixer.A_log = mx.zeros((e, n))
    mixer.D = mx.ones((e,))
    mixer.out_proj = nn.Linear(e, d, bias=config.bias)


def project_in(mixer: nn.Module, hidden: mx.array, call: Call) -> tuple[mx.array, mx.array]:
    """x (b, l, e), and the gate z for those positions whose output is wanted: (b, l, e), or (b, 1, e) of the last."""
    # In bfloat16 the scan without z would round its output before the gate.
    last_only = call.last and not call.observed and hidden.shape[1] > 1 and hidden.dtype == mx.float32
    if last_only and untouched(nn.Linear, mixer.in_proj, mixer.out_proj):
        return _project_in_last(mixer, hidden)
    x, z = mx.split(call.observe("in_proj", _linear(mixer, mixer.in_proj, hidden)), 2, axis=-1)
    return call.observe("x", x), call.observe("z", z)


def _project_in_last(mixer, hidden):
    kernel, bias = mixer.kernels.of("linear"), mixer.in_proj.get("bias")
    to_x, to_z = mx.split(mixer.in_proj.weight, 2)
    x, z = linear.linear(hidden, to_x, kernel), linear.linear(hidden[:, -1:], to_z, kernel)
    if bias is not None:
        for_x, for_z = mx.split(bias, 2)
        x, z = x + for_x, z + for_z
    return x, z


def convolve(mixer: nn.Module, x: mx.array, state: mx.array, call: Call) -> tuple[mx.array, mx.array]:
    """The causal convolution and its SiLU; x (b, l, e) -> (b, l, e) and the convolution's state."""
    if not untouched(nn.Conv1d, mixer.conv1d):
        kind = type(mixer.conv1d)
        raise TypeError(
            f"{name(mixer, 'conv1d')} is {kind.__module__}.{kind.__qualname__}; expected mlx.nn.Conv1d: "
            "its weights are read and it is not called, so that another module would be ignored"
        )
    weight, bias = mixer.conv1d.weight[..., 0], mixer.conv1d.get("bias")
    if call.one:
        y, state = causal_conv.causal_conv_step(x[:, 0], weight, bias, activation="silu", state=state)
        return call.observe("conv", y[:, None]), state
    kernel = mixer.kernels.of("causal_conv")
    y, state = causal_conv.conv(call, x, weight, bias, activation="silu", initial_state=state, kernel=kernel)
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
    """delta (b, l, e), and the bias that the scan still has to add to it.

    A `StepProjection` leaves its bias to the scan; so does a module that has one inside, such as an adapter. Any other
    module in the place of dt_proj adds its own bias, as an `nn.Linear` does: there is none left then.
    """
    delta = call.observe("dt_proj", mixer.dt_proj(dt))
    if untouched(StepProjection, mixer.dt_proj):
        return delta, mixer.dt_proj.bias
    inside = [module for module in mixer.dt_proj.modules() if isinstance(module, StepProjection)]
    return delta, inside[0].bias if inside else None


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
    return linear.call(layer, x, mixer.kernels.of("linear"))


def width(mixer: nn.Module) -> int | None:
    """Elements of its widest array, in_proj's output, for each position; None if a layer was replaced.

    Another layer may look along the sequence.
    """
    linears = [mixer.in_proj, mixer.x_proj, mixer.out_proj]
    own = untouched(StepProjection, mixer.dt_proj) and untouched(nn.Conv1d, mixer.conv1d)
    known = all(untouched(nn.Linear, layer) or untouched(nn.QuantizedLinear, layer) for layer in linears)
    return 2 * len(mixer.A_log) if own and known else None
