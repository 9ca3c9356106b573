"""One position of consecutive Mamba-1 blocks, and the head of one position, each in one native call on a CPU.

For small batches a step is bound by reading the weights. As separate operations it takes 1.5 times as long.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch import private
from mamba_core.backends.torch.kernels import native_tensors
from mamba_core.backends.torch.kernels.operator import KINDS, one_at_a_time

# With more rows, computing takes longer than reading the weights.
MOST_ROWS = 8
# A smaller eps may be 0 in C, which says that nothing is normed.
SMALLEST_EPS = torch.finfo(torch.float32).tiny


class Operands(NamedTuple):
    """The weights of a Mamba-1 mixer; the biases of in_proj, conv1d and out_proj may be None.

    selection_eps: above 0, each of dt, B and C is divided by its root mean square, with this added to the mean square.
    """

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    selection_eps: float = 0.0


# Where a block's tensors stand in the list that `blocks` takes: its states, its norm's weight, then its weights.
CONV_STATE, SSM_STATE, NORM, WEIGHTS = 0, 1, 2, 3
PER_BLOCK = WEIGHTS + Operands._fields.index("selection_eps")


def reason(x: Tensor) -> str | None:
    """Why the library cannot compute a step of x here, (b, ...); None if it can. `fits` checks the weights."""
    if torch.is_grad_enabled():
        return "a gradient is recorded"
    if not x.is_cpu or x.dtype not in native_tensors.DTYPES:
        return "it computes float32 and bfloat16 on a CPU"
    if (why := native_tensors.reason(x.device, None)) is not None:
        return why
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if private.in_forward_mode():
        return "a derivative in forward mode may be recorded"
    # An exported program is for any batch.
    if torch.compiler.is_exporting():
        return "the model is being exported"
    return None if x.shape[0] <= MOST_ROWS else f"it computes at most {MOST_ROWS} rows"


def block_tensors(norm: Tensor, operands: Operands, state, b: int) -> list[Tensor | None] | None:
    """The block's PER_BLOCK tensors for a batch of b rows; None if the library cannot read them as they are."""
    (e, n), (d,), k, r = operands.A_log.shape, norm.shape, operands.conv.shape[-1], operands.dt_proj.shape[-1]
    stored = (
        (state.conv, (b, k - 1, e)),
        (norm, (d,)),
        (operands.in_proj, (2 * e, d)),
        (operands.in_bias, (2 * e,)),
        (operands.conv, (e, 1, k)),
        (operands.conv_bias, (e,)),
        (operands.x_proj, (r + 2 * n, e)),
        (operands.dt_proj, (e, r)),
        (operands.out_proj, (d, e)),
        (operands.out_bias, (d,)),
    )
    float32 = (
        (state.ssm, (b, e, n)),
        (operands.dt_bias, (e,)),
        (operands.A_log, (e, n)),
        (operands.D, (e,)),
    )
    if norm.dtype not in native_tensors.DTYPES or not (fits(norm.dtype, stored) and fits(torch.float32, float32)):
        return None
    return [state.conv, state.ssm, norm, *operands[:-1]]


def same_sizes(tensors: list[Tensor | None], first: list[Tensor | None]) -> bool:
    """Whether two blocks have the dtype and the shapes that one native call is for."""
    return tensors[NORM].dtype is first[NORM].dtype and all(
        tensors[k].shape == first[k].shape for k in (CONV_STATE, SSM_STATE, NORM, WEIGHTS)
    )


def head_reason(hidden: Tensor, weight: Tensor) -> str | None:
    """Why `head` cannot compute these logits here; None if it can."""
    if not (hidden.ndim == 2 or (hidden.ndim == 3 and hidden.shape[1] == 1)):
        return "it computes one position"
    if (why := reason(hidden)) is not None:
        return why
    if hidden.shape[-1] != weight.shape[1] or not fits(hidden.dtype, [(weight, weight.shape)]):
        return "the weight has another dtype, width or layout in memory"
    return None


def fits(dtype: torch.dtype, tensors) -> bool:
    """Whether the tensors have the form that the library reads; a subclass, such as a quantised weight, has not."""
    for value, shape in tensors:
        if value is None:
            continue
        if type(value) not in KINDS or value.dtype is not dtype or value.shape != shape:
            return False
        if not (value.is_cpu and value.is_contiguous()):
            return False
    return True


@torch.library.custom_op("mamba_core::mamba_steps", mutates_args=(), device_types="cpu")
def blocks(
    residual: Tensor, tensors: list[Tensor | None], eps: list[float], selection_eps: list[float]
) -> list[Tensor]:
    """The residual stream after all blocks, and each block's conv and ssm state.

    Of each block: PER_BLOCK of tensors, the eps of its norm, and its `Operands.selection_eps`.
    """
    native_tensors.share_threads()
    residual = residual.contiguous()
    results = _empty(residual, tensors)
    (b, _, d), (_, e, n) = residual.shape, tensors[SSM_STATE].shape
    first = Operands(*tensors[WEIGHTS:PER_BLOCK])
    fixed = (
        *(b, d, e, n, first.conv.shape[2], first.dt_proj.shape[1]),
        *(first.in_proj.dtype == torch.bfloat16, residual.dtype == torch.bfloat16, False),
        *(torch.get_num_threads(), 0),
    )
    after, *states = (value.data_ptr() for value in results)
    before, pointers = residual.data_ptr(), [None if value is None else value.data_ptr() for value in tensors]
    steps = []
    for k, (norm_eps, own_eps) in enumerate(zip(eps, selection_eps, strict=True)):
        conv_state, ssm_state, norm, *weights = pointers[k * PER_BLOCK : (k + 1) * PER_BLOCK]
        in_proj, in_bias, conv, conv_bias, x_proj, out_proj, out_bias, *float32 = weights
        matrices = ((in_proj, in_bias), (conv, conv_bias), (x_proj, None), (out_proj, out_bias))
        read = (before, conv_state, ssm_state, norm, *matrices, *float32)
        steps.append(abi.MambaStep(*fixed, norm_eps, *read, after, *states[2 * k : 2 * k + 2], own_eps))
        before = after
    library.mamba_steps((abi.MambaStep * len(steps))(*steps))
    return results


@torch.library.custom_op("mamba_core::linear_step", mutates_args=(), device_types="cpu")
def head(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (b, ..., d) times the transpose of weight (v, d), in float32; where `head_reason` is None."""
    native_tensors.share_threads()
    hidden = hidden.contiguous()
    logits = hidden.new_empty(*hidden.shape[:-1], len(weight), dtype=torch.float32)
    library.linear_step(
        abi.LinearStep(
            *(len(hidden), weight.shape[1], len(weight)),
            *(weight.dtype == torch.bfloat16, False, torch.get_num_threads(), 0),
            hidden.data_ptr(),
            abi.Matrix(weight.data_ptr(), None),
            logits.data_ptr(),
        )
    )
    return logits


@blocks.register_fake
def _(residual, tensors, eps, selection_eps):
    return _empty(residual, tensors)


@head.register_fake
def _(hidden, weight):
    return hidden.new_empty(*hidden.shape[:-1], len(weight), dtype=torch.float32)


for operator in (blocks, head):
    operator.register_vmap(one_at_a_time(operator))


def _empty(residual, tensors):
    """Memory for the results of `blocks`."""
    states = (tensors[k + which] for k in range(0, len(tensors), PER_BLOCK) for which in (CONV_STATE, SSM_STATE))
    return [value.new_empty(value.shape) for value in (residual, *states)]
