"""What mixers that are like Mamba-1's share: functions of a mixer module with its parameters."""

import torch
from torch import Tensor, nn

from mamba_core.backend import LayerState
from mamba_core.backends.torch import layers
from mamba_core.backends.torch.kernels import native_mamba_step, triton_step
from mamba_core.backends.torch.kernels.operator import KINDS
from mamba_core.backends.torch.layers import StepProjection
from mamba_core.backends.torch.mixers import Options
from mamba_core.backends.torch.ops import fused_mixer, linear, rms_norm, selective_scan
from mamba_core.backends.torch.quantization import QuantizedLinear, stored_weight
from mamba_core.backends.torch.untouched import untouched
from mamba_core.call import Call


def add_parameters(mixer: nn.Module, config, options: Options) -> None:
    """Gives the mixer the layers and parameters of Mamba-1, and its kernels."""
    d, e, n, k, r = config.d_model, config.d_inner, config.d_state, config.d_conv, config.dt_rank_size
    mixer.kernels = options.kernels
    mixer.sizes = (r, n, n)
    mixer.in_proj = nn.Linear(d, 2 * e, bias=config.bias)
    mixer.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
    mixer.x_proj = nn.Linear(e, r + 2 * n, bias=False)
    mixer.dt_proj = StepProjection(r, e)
    mixer.A_log = nn.Parameter(torch.empty(e, n))
    mixer.D = nn.Parameter(torch.empty(e))
    mixer.out_proj = nn.Linear(e, d, bias=config.bias)


# --- the parts of a forward, in their order ------------------------------------------------------


def project(mixer, name: str, value: Tensor) -> Tensor:
    """The output of the mixer's linear layer of that name."""
    return layers.linear(getattr(mixer, name), value, mixer.kernels.of("linear"))


def convolve(mixer, x: Tensor, state: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The convolution with its SiLU, (b, l, e), and its state."""
    y, state = layers.convolution(mixer.conv1d, x, state, call, mixer.kernels.of("causal_conv"))
    return call.observe("conv", y), state


def select(mixer, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """dt (b, l, r), B and C (b, l, n), which depend on the input."""
    dt, B, C = call.observe("x_proj", project(mixer, "x_proj", x)).split(mixer.sizes, dim=-1)
    return call.observe("dt", dt), call.observe("B", B), call.observe("C", C)


def norm_selection(dt, B, C, eps: float, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """dt, B and C after an RMS norm without weight of each."""
    named = {"dt_norm": dt, "B_norm": B, "C_norm": C}
    dt, B, C = (call.observe(name, rms_norm.rms_norm(value, None, eps)) for name, value in named.items())
    return dt, B, C


def step_sizes(mixer, dt: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """(b, l, e), and the bias that the scan adds to it in float32 before the softplus."""
    delta, bias = layers.step_projection(mixer.dt_proj, dt, mixer.kernels.of("linear"))
    return call.observe("dt_proj", delta), bias


def recur(mixer, x, delta, B, C, z, delta_bias, state: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The scan, (b, l, e), with its gate if z is there, and its state."""
    A, options = -torch.exp(mixer.A_log), {"delta_bias": delta_bias, "delta_softplus": True}
    if call.one:
        gate = None if z is None else z[:, 0]
        one = (x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], mixer.D)
        y, state = selective_scan.selective_step(*one, z=gate, **options, state=state)
        return call.observe("scan", y[:, None]), state
    kernel = mixer.kernels.of("selective_scan")
    y, state = selective_scan.scan(call, x, delta, A, B, C, mixer.D, z=z, **options, initial_state=state, kernel=kernel)
    return call.observe("scan", y), state


# --- one operator between in_proj and out_proj ---------------------------------------------------
# Here and below, selection_eps is the eps of `norm_selection`; 0 for a mixer that does not call it.


def is_fused(mixer, xz: Tensor, call: Call) -> bool:
    """Whether `fused` computes here what Mamba-1's mixer does between in_proj and out_proj."""
    if call.mask is not None or call.observed:
        return False
    if not _is_built_inside(mixer):
        return False
    return fused_mixer.is_fused(mixer.kernels, xz, mixer.conv1d.weight.shape[-1], mixer.A_log.shape[1])


def fused(
    mixer, xz: Tensor, state: LayerState, call: Call, selection_eps: float = 0.0, selection: Tensor | None = None
) -> tuple[Tensor, LayerState]:
    """y (b, l, e), and the state. selection: the weights of the norms of dt, B and C together, (r + 2n)."""
    y, conv, ssm = fused_mixer.KERNELS["triton"](
        xz,
        mixer.conv1d.weight[:, 0],
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        -torch.exp(mixer.A_log),
        mixer.D,
        state.conv,
        state.ssm,
        call.restart,
        selection_eps,
        selection,
    )
    return y, LayerState(conv, ssm)


# --- in pieces -----------------------------------------------------------------------------------


def width(mixer) -> int | None:
    """Elements of its widest array, in_proj's output, for each position; None if a layer was changed.

    Another layer may look along the sequence.
    """
    built = _is_built_inside(mixer) and is_ours(mixer.in_proj) and is_ours(mixer.out_proj)
    return 2 * len(mixer.A_log) if built else None


def _is_built_inside(mixer) -> bool:
    """Whether the layers between in_proj and out_proj are as they were built, with those biases and no others."""
    return (
        untouched(nn.Linear, mixer.x_proj)
        and untouched(StepProjection, mixer.dt_proj)
        and layers.is_convolution(mixer.conv1d)
        and mixer.x_proj.bias is None
        and mixer.dt_proj.bias is not None
        and mixer.D is not None
    )


def is_ours(large) -> bool:
    return untouched(QuantizedLinear if type(large) is QuantizedLinear else nn.Linear, large)


def captures(mixer) -> bool:
    """Whether the scan is the CUDA kernel. Others have not been tried in a captured training step."""
    weight = mixer.conv1d.weight
    return selective_scan.kernel_for(mixer.kernels.of("selective_scan"), weight.device, weight.dtype) == "cuda"


# --- the last position alone ---------------------------------------------------------------------


def can_compute_last_only(mixer, hidden: Tensor) -> bool:
    """Whether the gates of all positions but the last may be skipped. In bfloat16 that would round before the gate."""
    return (
        hidden.shape[1] > 1
        and hidden.is_cpu
        and hidden.dtype is torch.float32
        and untouched(type(mixer), mixer)
        and untouched(nn.Linear, mixer.in_proj, mixer.out_proj)
        and type(mixer.in_proj.weight) in KINDS
    )


def project_for_last(mixer, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """in_proj in two parts: x of all positions, and z of the last position."""
    e = len(mixer.in_proj.weight) // 2
    z = project_rows(mixer, hidden[:, -1:], slice(e, None))
    return project_rows(mixer, hidden, slice(e)), z


def project_rows(mixer, hidden: Tensor, rows: slice) -> Tensor:
    """These outputs of in_proj alone."""
    bias = mixer.in_proj.bias
    kernel = mixer.kernels.of("linear")
    return linear.linear(hidden, mixer.in_proj.weight[rows], None if bias is None else bias[rows], kernel=kernel)


# --- for the ways: the weights that they read without calling the mixer's layers -----------------


def native_operands(mixer, selection_eps: float = 0.0, norms=(None, None, None)) -> native_mamba_step.Operands | str:
    """For the way native_step, or why it cannot compute this mixer. norms: the weights of those of dt, B and C."""
    in_proj, x_proj, dt_proj, out_proj = mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj
    conv = mixer.conv1d
    if not (_is_built_inside(mixer) and untouched(nn.Linear, in_proj, out_proj)):
        return "a layer of the mixer was changed"
    if 0 < selection_eps < native_mamba_step.SMALLEST_EPS:
        return f"the eps of its norms of dt, B and C, {selection_eps}, is too small for float32"
    return native_mamba_step.Operands(
        *(in_proj.weight, in_proj.bias, conv.weight, conv.bias, x_proj.weight, out_proj.weight, out_proj.bias),
        *(dt_proj.weight, dt_proj.bias, mixer.A_log, mixer.D, *norms, selection_eps),
    )


def cuda_operands(
    mixer, norm: nn.Module, selection_eps: float = 0.0, selection_norms: tuple[Tensor, Tensor, Tensor] | None = None
) -> triton_step.Layer | str:
    """For the way cuda_step, with the norm before the mixer, or why it cannot compute this mixer.

    selection_norms: the weights of the norms of dt, B and C, where these have some.
    """
    in_proj, x_proj, dt_proj, out_proj = mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj
    if not (_is_built_inside(mixer) and is_ours(in_proj) and is_ours(out_proj)):
        return "a layer of the mixer was changed"
    return triton_step.Layer(
        *(norm.weight, norm.eps, stored_weight(in_proj), in_proj.bias, mixer.conv1d.weight[:, 0], mixer.conv1d.bias),
        *(x_proj.weight, dt_proj.weight, dt_proj.bias, mixer.A_log, mixer.D),
        *(stored_weight(out_proj), out_proj.bias, selection_eps, selection_norms),
    )
