"""One position of consecutive blocks with Mamba-1's mixer in one native call on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels import native_step, native_tensors

# A smaller eps may be 0 in C, which says that nothing is normed.
SMALLEST_EPS = torch.finfo(torch.float32).tiny


class Operands(NamedTuple):
    """`native_step.Operands` of a Mamba-1 mixer; the biases of in_proj, conv1d and out_proj may be None.

    selection_eps: above 0, each of dt, B and C is divided by its root mean square, with this added to the mean square,
        and multiplied by the weight of its norm, which may be None.
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
    dt_norm: Tensor | None = None
    B_norm: Tensor | None = None
    C_norm: Tensor | None = None
    selection_eps: float = 0.0

    def tensors(self, norm: Tensor, state, b: int) -> list[Tensor | None] | None:
        (e, n), (d,), k, r = self.A_log.shape, norm.shape, self.conv.shape[-1], self.dt_proj.shape[-1]
        stored = (
            (state.conv, (b, k - 1, e)),
            (norm, (d,)),
            (self.in_proj, (2 * e, d)),
            (self.in_bias, (2 * e,)),
            (self.conv, (e, 1, k)),
            (self.conv_bias, (e,)),
            (self.x_proj, (r + 2 * n, e)),
            (self.dt_proj, (e, r)),
            (self.out_proj, (d, e)),
            (self.out_bias, (d,)),
            (self.dt_norm, (r,)),
            (self.B_norm, (n,)),
            (self.C_norm, (n,)),
        )
        float32 = (
            (state.ssm, (b, e, n)),
            (self.dt_bias, (e,)),
            (self.A_log, (e, n)),
            (self.D, (e,)),
        )
        fits, dtype = native_step.fits, norm.dtype
        if dtype not in native_tensors.DTYPES or not (fits(dtype, stored) and fits(torch.float32, float32)):
            return None
        return [state.conv, state.ssm, norm, *self[:-1]]

    def numbers(self, eps: float) -> list[float]:
        return [eps, self.selection_eps]

    @staticmethod
    def blocks(residual: Tensor, tensors: list[Tensor | None], numbers: list[float]) -> list[Tensor]:
        return steps(residual, tensors, numbers)


PER_BLOCK = native_step.IN_PROJ + Operands._fields.index("selection_eps")


@torch.library.custom_op("mamba_core::mamba_steps", mutates_args=(), device_types="cpu")
def steps(residual: Tensor, tensors: list[Tensor | None], numbers: list[float]) -> list[Tensor]:
    """`Operands.blocks`. Of each block: PER_BLOCK of tensors, and the numbers of its operands."""
    (b, _, d), (_, e, n) = residual.shape, tensors[native_step.SSM_STATE].shape
    first = Operands(*tensors[native_step.IN_PROJ : PER_BLOCK])
    sizes = (b, d, e, n, first.conv.shape[2], first.dt_proj.shape[1])

    def step_of(k, settings, before, pointers, after):
        conv_state, ssm_state, norm, *weights = pointers
        in_proj, in_bias, conv, conv_bias, x_proj, out_proj, out_bias, *others = weights
        matrices = ((in_proj, in_bias), (conv, conv_bias), (x_proj, None), (out_proj, out_bias))
        eps, selection_eps = numbers[2 * k : 2 * k + 2]
        read = (before, conv_state, ssm_state, norm, *matrices, *others[:-3])
        return abi.MambaStep(*sizes, *settings, eps, *read, *after, *others[-3:], selection_eps)

    return native_step.compute(residual, tensors, PER_BLOCK, step_of, library.mamba_steps)


native_step.register(steps, PER_BLOCK)
