"""One position of all residual blocks, and the head of one position, each in one native call on a CPU.

With few rows such a step is as long as its weights take to be read; in single operations it is half as long again.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere

from mamba_core.backend import LayerState
from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels.memory import reason
from mamba_core.backends.torch.kernels.operator import KINDS, one_at_a_time

# More rows take longer to compute than their weights to be read.
MOST_ROWS = 8
# Tensors of a block, and which of them is its ssm state; the first is its conv state.
OPERANDS, SSM_STATE = 14, 10


def blocks(layers, residual: Tensor, states) -> tuple[Tensor, tuple[LayerState, ...]] | None:
    """The residual stream (b, 1, d) and the states after all blocks; None where plain operations are to compute it."""
    norm, mixer = layers[0].norm, layers[0].mixer
    if mixer.minimamba or not _runs(mixer.kernels, residual, norm.weight):
        return None
    (b, _, d), (e, n), r, k = residual.shape, mixer.A_log.shape, mixer.sizes[0], mixer.conv1d.weight.shape[-1]
    tensors = []
    for block, state in zip(layers, states, strict=True):
        if (own := _tensors(block, state, (b, d, e, n, r, k), norm.weight.dtype)) is None:
            return None
        tensors += own
    residual, *after = _blocks(residual, tensors, r, [block.norm.eps for block in layers])
    return residual, tuple(LayerState(*after[k : k + 2]) for k in range(0, len(after), 2))


def _tensors(block, state: LayerState, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor | None] | None:
    """OPERANDS tensors of a block, the first its conv state; None if it is not as it was built."""
    (b, d, e, n, r, k), norm, mixer = sizes, block.norm, block.mixer
    linears = in_proj, x_proj, dt_proj, out_proj = mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj
    if not (as_built(nn.Linear, *linears) and as_built(nn.Conv1d, mixer.conv1d) and x_proj.bias is None):
        return None
    stored = (
        (state.conv, (b, k - 1, e)),
        (norm.weight, (d,)),
        (in_proj.weight, (2 * e, d)),
        (in_proj.bias, (2 * e,)),
        (mixer.conv1d.weight, (e, 1, k)),
        (mixer.conv1d.bias, (e,)),
        (x_proj.weight, (r + 2 * n, e)),
        (dt_proj.weight, (e, r)),
        (out_proj.weight, (d, e)),
        (out_proj.bias, (d,)),
    )
    float32 = ((state.ssm, (b, e, n)), (dt_proj.bias, (e,)), (mixer.A_log, (e, n)), (mixer.D, (e,)))
    if not (_all(dtype, stored) and _all(torch.float32, float32)):
        return None
    return [value for value, _ in stored + float32]


def head(kernels: str, hidden: Tensor, weight: Tensor) -> Tensor | None:
    """Logits (b, ..., v) float32 of hidden (b, d) or (b, 1, d); None where plain operations are to compute them."""
    one = hidden.ndim == 2 or (hidden.ndim == 3 and hidden.shape[1] == 1)
    if not (
        one
        and hidden.shape[-1] == weight.shape[1]
        and _runs(kernels, hidden, weight)
        and _all(hidden.dtype, [(weight, weight.shape)])
    ):
        return None
    return _linear(hidden, weight)


def _runs(kernels: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the library computes here what the model would: in that dtype, and without derivatives of any mode."""
    return (
        kernels in ("auto", "native")
        and not torch.is_grad_enabled()
        and reason(weight.device, weight.dtype) is None
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        # An exported program is for any batch.
        and not torch.compiler.is_exporting()
        and x.device == weight.device
        and x.shape[0] <= MOST_ROWS
    )


# Loops, because a generator costs a fourth of what a block's call does in Python.
def as_built(kind: type, *modules: nn.Module) -> bool:
    """Whether nobody has put another module in their place, or asked to be called when they are."""
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        return False
    for module in modules:
        if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
            return False
        if module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
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


@torch.library.custom_op("mamba_core::mamba_steps", mutates_args=(), device_types="cpu")
def _blocks(residual: Tensor, tensors: list[Tensor | None], r: int, eps: list[float]) -> list[Tensor]:
    """The residual stream after all blocks, and each one's conv and ssm state; tensors are those of `_tensors`."""
    residual = residual.contiguous()
    results = _empty(residual, tensors)
    (b, _, d), (_, e, n), in_proj, conv = residual.shape, tensors[SSM_STATE].shape, tensors[2], tensors[4]
    fixed = (
        *(b, d, e, n, conv.shape[2], r),
        *(in_proj.dtype == torch.bfloat16, residual.dtype == torch.bfloat16, False, torch.get_num_threads(), 0),
    )
    after, *states = (value.data_ptr() for value in results)
    before, pointers = residual.data_ptr(), [None if value is None else value.data_ptr() for value in tensors]
    steps = []
    for k, its_eps in enumerate(eps):
        own = pointers[k * OPERANDS : (k + 1) * OPERANDS]
        steps.append(_block_step(fixed, its_eps, before, own, after, states[2 * k : 2 * k + 2]))
        before = after
    library.mamba_steps((abi.MambaStep * len(steps))(*steps))
    return results


def _block_step(fixed, eps, before, pointers, after, states) -> abi.MambaStep:
    conv_state, norm, in_proj, in_bias, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, ssm_state = pointers[:11]
    matrices = ((in_proj, in_bias), (conv, conv_bias), (x_proj, None), (out_proj, out_bias))
    read = (before, conv_state, ssm_state, norm, *matrices, dt_proj, *pointers[11:])
    return abi.MambaStep(*fixed, eps, *read, after, *states)


@torch.library.custom_op("mamba_core::linear_step", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (b, ..., in) times the transpose of weight (out, in), in float32."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
    library.linear_step(
        abi.LinearStep(
            *(len(x), weight.shape[1], len(weight)),
            *(weight.dtype == torch.bfloat16, False, torch.get_num_threads(), 0),
            x.data_ptr(),
            _matrix(weight),
            y.data_ptr(),
        )
    )
    return y


@_blocks.register_fake
def _(residual, tensors, r, eps):
    return _empty(residual, tensors)


@_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)


for operator in (_blocks, _linear):
    operator.register_vmap(one_at_a_time(operator))


def _empty(residual, tensors):
    """Memory for the results of `_blocks`."""
    states = [value for k in range(0, len(tensors), OPERANDS) for value in (tensors[k], tensors[k + SSM_STATE])]
    return [value.new_empty(value.shape) for value in (residual, *states)]


def _matrix(weight, bias=None) -> abi.Matrix:
    return abi.Matrix(weight.data_ptr(), None if bias is None else bias.data_ptr())
