"""One position of a block's feed-forward in Triton: with few rows two kernels, bound by reading their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_block, triton_linear
from mamba_core.backends.torch.kernels.triton import launching
from mamba_core.backends.torch.quantization import Packed


class FeedForward(NamedTuple):
    """The weights of a SwiGLU and of the norm before it: in_proj is the gate's rows and then the others."""

    norm: Tensor
    eps: float
    in_proj: Tensor | Packed
    out_proj: Tensor | Packed
    in_bias: None = None
    out_bias: None = None

    @property
    def matrices(self) -> tuple[Tensor | Packed, ...]:
        """Those that are read as they lie in memory, in the dtype of the norm."""
        return self.in_proj, self.out_proj

    def step(self, residual: Tensor, hidden: Tensor | None, counters: Tensor):
        """Of residual + hidden, (b, d) each: the residual stream, and what is still to be added to it or None."""
        with launching(residual):
            if triton_block.takes_few(residual):
                width = triton_block.size_of(self.out_proj)[1]
                active = self.norm.new_empty(len(residual), width)
                how = {"norm": self.norm, "eps": self.eps, "swiglu": True}
                triton_linear.multiply(residual, self.in_proj, None, active, **how)
                total = residual
            else:
                projected, total = triton_block.project(self, residual, hidden, counters)
                gate, up = projected.chunk(2, dim=-1)
                active = torch.mul(F.silu(gate), up)
            return triton_block.leave(self, active, total, counters)
