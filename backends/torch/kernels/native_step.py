"""One position of consecutive blocks in one native call on a CPU, whatever their mixer, and the head of one position.

For small batches a step is bound by reading the weights. As separate operations it takes 1.5 times as long.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch import private
from mamba_core.backends.torch.kernels import native_tensors
from mamba_core.backends.torch.kernels.operator import KINDS, one_at_a_time

# With more rows, computing takes longer than reading the weights.
MOST_ROWS = 8


class Operands(Protocol):
    """The weights of one mixer, and how the library computes a block that has it.

    A mixer gives them to the way `native_step`, which computes consecutive blocks with operands of one class, of the
    same sizes and dtype, in one call of `blocks`.
    """

    def tensors(self, norm: Tensor, state, b: int) -> list[Tensor | None] | None:
        """The block's tensors for a batch of b rows, in the order that `blocks` takes.

        The first are the states of convolution and recurrence, the weight of the block's norm, and that of in_proj.
        None if the library cannot read them as they are.
        """

    def numbers(self, eps: float) -> list[float]:
        """What else `blocks` is told of a block whose norm has this eps."""

    @staticmethod
    def blocks(residual: Tensor, tensors: list[Tensor | None], numbers: list[float]) -> list[Tensor]:
        """The residual stream after all blocks, and each block's conv and ssm state."""


# Where the tensors that every block has stand in its list.
CONV_STATE, SSM_STATE, NORM, IN_PROJ = 0, 1, 2, 3


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


def same_sizes(tensors: list[Tensor | None], first: list[Tensor | None]) -> bool:
    """Whether two blocks have the dtype and the shapes that one native call is for."""
    return tensors[NORM].dtype is first[NORM].dtype and all(
        tensors[k].shape == first[k].shape for k in (CONV_STATE, SSM_STATE, NORM, IN_PROJ)
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


def compute(residual: Tensor, tensors: list[Tensor | None], per_block: int, step_of: Callable, steps: Callable):
    """The results of `Operands.blocks` by `steps`, a function of the library.

    step_of(k, settings, before, pointers, after): the struct of block k. `settings` are the fields bfloat16 to width,
    `pointers` those of its tensors, `before` and `after` those of the residual stream and of the results.
    """
    native_tensors.share_threads()
    residual = residual.contiguous()
    results = _empty(residual, tensors, per_block)
    dtypes = (tensors[NORM].dtype == torch.bfloat16, residual.dtype == torch.bfloat16)
    settings = (*dtypes, False, torch.get_num_threads(), 0)
    after, *states = (value.data_ptr() for value in results)
    before, pointers = residual.data_ptr(), [None if value is None else value.data_ptr() for value in tensors]
    structs = []
    for k in range(len(tensors) // per_block):
        own = pointers[k * per_block : (k + 1) * per_block]
        structs.append(step_of(k, settings, before, own, (after, *states[2 * k : 2 * k + 2])))
        before = after
    steps((type(structs[0]) * len(structs))(*structs))
    return results


def register(operator, per_block: int) -> None:
    """Shapes for the compiler, and a rule for vmap, of a custom operator with the arguments of `Operands.blocks`."""
    operator.register_fake(lambda residual, tensors, numbers: _empty(residual, tensors, per_block))
    operator.register_vmap(one_at_a_time(operator))


def _empty(residual, tensors, per_block):
    """Memory for the results of blocks."""
    states = (tensors[k + which] for k in range(0, len(tensors), per_block) for which in (CONV_STATE, SSM_STATE))
    return [value.new_empty(value.shape) for value in (residual, *states)]


def few_rows(hidden: Tensor, weight: Tensor) -> Tensor:
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


head = torch.library.custom_op("mamba_core::linear_step", few_rows, mutates_args=(), device_types="cpu")


@head.register_fake
def _(hidden, weight):
    return hidden.new_empty(*hidden.shape[:-1], len(weight), dtype=torch.float32)


head.register_vmap(one_at_a_time(head))
