"""One position of a residual block, and the head of one position, each in one native call on a CPU.

With few rows such a step is as long as its weights take to be read; in single operations it is half as long again.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mamba_core.backend import LayerState
from mamba_core.backends import native as library
from mamba_core.backends.torch.kernels.memory import reason
from mamba_core.backends.torch.kernels.operator import one_at_a_time

# More rows take longer to compute than their weights to be read.
MOST_ROWS = 8
KINDS = (nn.Parameter, Tensor)


def block(norm, mixer, residual: Tensor, state: LayerState) -> tuple[Tensor, LayerState] | None:
    """What `Block.forward` returns for residual (b, 1, d); None where plain operations are to compute it."""
    linears = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if mixer.minimamba or not (_runs(mixer.kernels, norm.weight) and residual.shape[0] <= MOST_ROWS):
        return None
    if not (as_built(nn.Linear, *linears) and as_built(nn.Conv1d, mixer.conv1d)):
        return None
    in_proj, x_proj, dt_proj, out_proj = linears
    e, _, k = mixer.conv1d.weight.shape
    (d,), (r, n, _), b, dtype = norm.weight.shape, mixer.sizes, residual.shape[0], norm.weight.dtype
    stored = (
        (norm.weight, (d,)),
        (in_proj.weight, (2 * e, d)),
        (in_proj.bias, (2 * e,)),
        (mixer.conv1d.weight, (e, 1, k)),
        (mixer.conv1d.bias, (e,)),
        (x_proj.weight, (r + 2 * n, e)),
        (dt_proj.weight, (e, r)),
        (out_proj.weight, (d, e)),
        (out_proj.bias, (d,)),
        (state.conv, (b, k - 1, e)),
    )
    float32 = ((dt_proj.bias, (e,)), (mixer.A_log, (e, n)), (mixer.D, (e,)), (state.ssm, (b, e, n)))
    if not (_all(dtype, stored) and _all(torch.float32, float32) and x_proj.bias is None):
        return None
    weights = (*(value for value, _ in stored[:-1]), *(value for value, _ in float32[:-1]))
    residual, conv, ssm = _block(residual, *state, *weights, norm.eps)
    return residual, LayerState(conv, ssm)


def head(kernels: str, hidden: Tensor, weight: Tensor) -> Tensor | None:
    """Logits (b, ..., v) float32 of hidden (b, d) or (b, 1, d); None where plain operations are to compute them."""
    one = hidden.ndim == 2 or hidden.shape[1] == 1
    if not (one and hidden.shape[0] <= MOST_ROWS and _runs(kernels, weight) and hidden.dtype is weight.dtype):
        return None
    return _linear(hidden, weight) if _all(weight.dtype, [(weight, weight.shape)]) else None


def _runs(kernels: str, weight: Tensor) -> bool:
    """Whether the library computes here what the model would: in that dtype, and without derivatives of any mode."""
    return (
        kernels in ("auto", "native")
        and not torch.is_grad_enabled()
        and reason(weight.device, weight.dtype) is None
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not torch.compiler.is_exporting()  # which would fix the batch
    )


# Loops, because a generator costs a fourth of what a block's call does in Python.
def as_built(kind: type, *modules: nn.Module) -> bool:
    """Whether nobody has put another module in their place, or asked to be called when they are."""
    for module in modules:
        if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
            return False
        if "forward" in module.__dict__:
            return False
    return True


def _all(dtype: torch.dtype, tensors) -> bool:
    """Whether they lie in memory as the library reads it; a subclass, such as a quantised weight, does not."""
    for value, shape in tensors:
        if value is None:
            continue
        if type(value) not in KINDS or value.dtype is not dtype or value.shape != shape:
            return False
        if not (value.is_cpu and value.is_contiguous()):
            return False
    return True


@torch.library.custom_op("mamba_core::block_step", mutates_args=(), device_types="cpu")
def _block(
    residual: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    norm: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    delta_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream and both states after the position."""
    residual = residual.contiguous()
    results = _empty(residual, conv_state, ssm_state)
    (e, n), (_, r), (_, d), k = A_log.shape, dt_proj.shape, in_proj.shape, conv.shape[2]
    library.block_step(
        library.BlockStep(
            *(residual.shape[0], d, e, n, k, r),
            *(in_proj.dtype == torch.bfloat16, residual.dtype == torch.bfloat16, False, torch.get_num_threads(), 0),
            eps,
            *(value.data_ptr() for value in (residual, conv_state, ssm_state, norm)),
            *(_matrix(in_proj, in_bias), _matrix(conv, conv_bias), _matrix(x_proj), _matrix(out_proj, out_bias)),
            *(value.data_ptr() for value in (dt_proj, delta_bias, A_log, D, *results)),
        )
    )
    return results


@torch.library.custom_op("mamba_core::linear_step", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (b, ..., in) times the transpose of weight (out, in), in float32."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
    library.linear_step(
        library.LinearStep(
            *(len(x), weight.shape[1], len(weight)),
            *(weight.dtype == torch.bfloat16, False, torch.get_num_threads(), 0),
            x.data_ptr(),
            _matrix(weight),
            y.data_ptr(),
        )
    )
    return y


@_block.register_fake
def _(residual, conv_state, ssm_state, *rest):
    return _empty(residual, conv_state, ssm_state)


@_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)


for operator in (_block, _linear):
    operator.register_vmap(one_at_a_time(operator))


def _empty(*values):
    return tuple(value.new_empty(value.shape) for value in values)


def _matrix(weight, bias=None) -> library.Matrix:
    return library.Matrix(weight.data_ptr(), None if bias is None else bias.data_ptr())
