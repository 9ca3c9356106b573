"""One position of consecutive blocks whose recurrence is the ssd in one native call on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.kernels import native_step, native_tensors


class Operands(NamedTuple):
    """`native_step.Operands` of such a mixer; the biases, and the weight of the gated norm, may be None.

    in_proj gives gate and gated, z, x, B, C, dt. D has a value a head or a channel. Without the norm there is the gate
    alone. Head j of `headdim` channels reads group j // (heads / groups). A group's channels are normed together.
    """

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gated_norm: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None
    headdim: int
    groups: int
    dt_limit: tuple[float, float]
    gated_eps: float
    norm_before_gate: bool

    def tensors(self, norm: Tensor, state, b: int) -> list[Tensor | None] | None:
        (d,), (h,), (filters, _, k), p, g = norm.shape, self.A_log.shape, self.conv.shape, self.headdim, self.groups
        e = h * p
        n, inner = (filters - e) // (2 * g), self.out_proj.shape[1]
        rows = 2 * (inner - e) + e + filters + h
        if n < 1 or inner < e or h % g or filters != e + 2 * g * n:
            return None
        stored = (
            (state.conv, (b, k - 1, filters)),
            (norm, (d,)),
            (self.in_proj, (rows, d)),
            (self.in_bias, (rows,)),
            (self.conv, (filters, 1, k)),
            (self.conv_bias, (filters,)),
            (self.gated_norm, (e,)),
            (self.out_proj, (d, inner)),
            (self.out_bias, (d,)),
        )
        float32 = (
            (state.ssm, (b, h, p, n)),
            (self.dt_bias, (h,)),
            (self.A_log, (h,)),
            (self.D, (h,) if len(self.D) == h else (e,)),
        )
        fits, dtype = native_step.fits, norm.dtype
        if dtype not in native_tensors.DTYPES or not (fits(dtype, stored) and fits(torch.float32, float32)):
            return None
        return [state.conv, state.ssm, norm, *self[:TENSORS]]

    def numbers(self, eps: float) -> list[float]:
        return [eps, self.gated_eps, *self.dt_limit, float(self.norm_before_gate)]

    @staticmethod
    def blocks(residual: Tensor, tensors: list[Tensor | None], numbers: list[float]) -> list[Tensor]:
        return steps(residual, tensors, numbers)


# How many tensors and numbers a block has, and where its operands stand among the tensors.
TENSORS = Operands._fields.index("headdim")
PER_BLOCK, NUMBERS = native_step.IN_PROJ + TENSORS, 5
PLACES = {name: native_step.IN_PROJ + k for k, name in enumerate(Operands._fields[:TENSORS])}


@torch.library.custom_op("mamba_core::ssd_steps", mutates_args=(), device_types="cpu")
def steps(residual: Tensor, tensors: list[Tensor | None], numbers: list[float]) -> list[Tensor]:
    """`Operands.blocks`. Of each block: PER_BLOCK of tensors, and the numbers of its operands."""
    (b, _, d), (_, h, p, n) = residual.shape, tensors[native_step.SSM_STATE].shape
    filters, _, k = tensors[PLACES["conv"]].shape
    inner = tensors[PLACES["out_proj"]].shape[1]
    sizes = (b, d, h, p, n, (filters - h * p) // (2 * n), k, inner - h * p)

    def step_of(k, settings, before, pointers, after):
        conv_state, ssm_state, norm, in_proj, in_bias, conv, conv_bias, *float32, gated, out_proj, out_bias = pointers
        matrices = ((in_proj, in_bias), (conv, conv_bias), (out_proj, out_bias))
        *of_norms, least, most, before_gate = numbers[k * NUMBERS : (k + 1) * NUMBERS]
        choices = (len(tensors[k * PER_BLOCK + PLACES["D"]]) > h, before_gate > 0)
        read = (before, conv_state, ssm_state, norm, *matrices, *float32, gated)
        return abi.SsdStep(*sizes, *settings, *choices, *of_norms, least, most, *read, *after)

    return native_step.compute(residual, tensors, PER_BLOCK, step_of, library.ssd_steps)


native_step.register(steps, PER_BLOCK)
