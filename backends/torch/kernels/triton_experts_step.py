"""One position of a mixture of experts in Triton: four kernels, of which two read the chosen experts' weights alone.

They are the router with the norm before it; the choice; the experts' first products with their gates; their second
products, weighted and summed, with the residual. A row's experts are read for that row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_block, triton_linear, triton_norm
from mamba_core.backends.torch.kernels.triton import (
    after_the_last,
    blocks_of,
    jit,
    launching,
    let_the_next_begin,
    overlapping,
    power_of_2,
    tl,
)

# Outputs of a program, and inputs that it reads at once.
OUTPUTS, INPUTS = 4, 512


class Experts(NamedTuple):
    """The weights of a norm, a router (experts, d), and experts: gate_up (experts, 2 i, d), down (experts, d, i)."""

    norm: Tensor
    eps: float
    router: Tensor
    gate_up: Tensor
    down: Tensor
    top_k: int

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Those that are read as they lie in memory, in the dtype of the norm."""
        return self.router, self.gate_up, self.down

    def step(self, residual: Tensor, hidden: Tensor | None, counters: Tensor):
        """Of residual + hidden, (b, d) each: the residual stream, and None, as nothing is still to be added to it."""
        (b, d), (experts, width, _), k = residual.shape, self.gate_up.shape, self.top_k
        with launching(residual):
            if hidden is not None or not triton_block.takes_few(residual):
                normed, residual, _ = triton_norm._forward(residual, hidden, self.norm, self.eps, self.norm.dtype)
                logits = torch.nn.functional.linear(normed, self.router)
            else:
                logits = self.norm.new_empty(b, experts)
                triton_linear.multiply(residual, self.router, None, logits, norm=self.norm, eps=self.eps)
            chosen = torch.empty(b, k, dtype=torch.int32, device=residual.device)
            weights = residual.new_empty(b, k, dtype=torch.float32)
            sizes = {"EXPERTS": experts, "TOP": k}
            _choice_kernel[(b,)](logits, chosen, weights, **sizes, PADDED=power_of_2(experts), **overlapping())
            active = self.norm.new_empty(b, k, width // 2)
            after = residual.new_empty(b, d)
            _gate_up_kernel[(blocks_of(width // 2, OUTPUTS), b * k)](
                *(residual, self.norm, self.gate_up, chosen, active, self.eps),
                D=d,
                WIDTH=width // 2,
                TOP=k,
                OUTPUTS=OUTPUTS,
                INPUTS=INPUTS,
                **overlapping(),
            )
            _down_kernel[(blocks_of(d, OUTPUTS), b)](
                *(active, self.down, chosen, weights, residual, after),
                D=d,
                WIDTH=width // 2,
                TOP=k,
                OUTPUTS=OUTPUTS,
                INPUTS=INPUTS,
                **overlapping(),
            )
            return after, None


@jit
def _choice_kernel(
    logits, chosen, weights, EXPERTS: tl.constexpr, TOP: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr
):
    """Of a row the likeliest experts, of equal ones the first, and their probabilities among all."""
    let_the_next_begin(OVERLAP)
    row, expert = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    after_the_last(OVERLAP)
    logit = tl.load(logits + row * EXPERTS + expert, mask=expert < EXPERTS, other=float("-inf")).to(tl.float32)
    weight = tl.exp(logit - tl.max(logit, 0))
    weight = weight / tl.sum(weight, 0)
    left = tl.where(expert < EXPERTS, weight, -1.0)
    for index in tl.static_range(TOP):
        # A NaN is in every weight: whichever expert is chosen gives NaN.
        best = tl.argmax(left, 0)
        tl.store(chosen + row * TOP + index, tl.minimum(best, EXPERTS - 1))
        tl.store(weights + row * TOP + index, tl.sum(tl.where(expert == best, weight, 0.0), 0))
        left = tl.where(expert == best, -1.0, left)


@jit
def _gate_up_kernel(
    residual,
    norm,
    gate_up,
    chosen,
    active,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """(b, top_k, i): silu(gate_e x) * up_e x of the normed residual, for some outputs of a row's expert."""
    let_the_next_begin(OVERLAP)
    pair = tl.program_id(1).to(tl.int64)
    n, k = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    after_the_last(OVERLAP)
    expert = tl.load(chosen + pair).to(tl.int64)
    weight = gate_up + expert * 2 * WIDTH * D + n[:, None] * D + k[None, :]
    row = residual + pair // TOP * D + k
    gate, up = tl.zeros((OUTPUTS, INPUTS), tl.float32), tl.zeros((OUTPUTS, INPUTS), tl.float32)
    squares = tl.zeros((INPUTS,), tl.float32)
    for start in tl.static_range(0, D, INPUTS):
        inside = start + k < D
        both = (n < WIDTH)[:, None] & inside[None, :]
        value = tl.load(row + start, mask=inside, other=0.0).to(tl.float32)
        squares += value * value
        value *= tl.load(norm + start + k, mask=inside, other=0.0).to(tl.float32)
        gate += tl.load(weight + start, mask=both, other=0.0).to(tl.float32) * value[None, :]
        up += tl.load(weight + WIDTH * D + start, mask=both, other=0.0).to(tl.float32) * value[None, :]
    scaling = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    opened = tl.sum(gate, 1) * scaling
    found = opened * tl.sigmoid(opened) * (tl.sum(up, 1) * scaling)
    tl.store(active + pair * WIDTH + n, found.to(active.dtype.element_ty), mask=n < WIDTH)


@jit
def _down_kernel(
    active,
    down,
    chosen,
    weights,
    residual,
    after,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """(b, d): the residual plus the weighted sum of the experts' outputs, for some channels of a row."""
    let_the_next_begin(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    n, k = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    after_the_last(OVERLAP)
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for index in tl.static_range(TOP):
        pair = row * TOP + index
        expert = tl.load(chosen + pair).to(tl.int64)
        share = tl.load(weights + pair)
        weight = down + expert * D * WIDTH + n[:, None] * WIDTH + k[None, :]
        for start in range(0, WIDTH, INPUTS):
            inside = start + k < WIDTH
            value = tl.load(active + pair * WIDTH + start + k, mask=inside, other=0.0).to(tl.float32) * share
            both = (n < D)[:, None] & inside[None, :]
            total += tl.load(weight + start, mask=both, other=0.0).to(tl.float32) * value[None, :]
    found = tl.sum(total, 1) + tl.load(residual + row * D + n, mask=n < D, other=0.0).to(tl.float32)
    tl.store(after + row * D + n, found.to(after.dtype.element_ty), mask=n < D)
