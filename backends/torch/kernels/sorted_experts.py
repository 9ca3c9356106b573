"""Mixtures of experts with the rows of each expert together, as an operator: an expert that has no row is not read.

The gradient keeps what gate and up give; the rest it computes again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_core.backends.native import abi, library
from mamba_core.backends.torch.arrays import at_least_float32
from mamba_core.backends.torch.kernels import native_step, native_tensors, onednn_linear
from mamba_core.backends.torch.kernels.operator import differentiable, refuse_tangents


class _Share(NamedTuple):
    """What an expert computes.

    rows, slots: (m,) which rows of x, and which entries of the weights, as these lie in memory. within: the same as a
    slice of what all experts give.
    """

    expert: int
    rows: Tensor
    slots: Tensor
    within: slice


def _shares(chosen: Tensor, experts: int) -> Iterator[_Share]:
    """Of each expert that computes something. The host waits for the device here."""
    flat, top_k = chosen.flatten(), chosen.shape[1]
    order = flat.argsort(stable=True)
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=experts)[:experts].tolist()):
        if count:
            within = slice(start, start + count)
            slots = order[within]
            yield _Share(expert, slots // top_k, slots, within)
            start += count


def _computed(x, weights, chosen, gate_up, down, keep: Tensor | None) -> Tensor:
    """y; into `keep` goes what gate and up give."""
    y, weights = torch.zeros_like(at_least_float32(x)), weights.reshape(-1, 1)
    for expert, rows, slots, within in _shares(chosen, len(gate_up)):
        projected = _product(x[rows], gate_up[expert])
        if keep is not None:
            keep[within] = projected
        found = _product(_swiglu(projected).to(x.dtype), down[expert])
        y.index_add_(0, rows, at_least_float32(found) * weights[slots])
    return y.to(x.dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (m, k) times the transpose of weight (n, k); of few rows in float32."""
    if native_step.head_reason(x, weight) is None:
        return native_step.few_rows(x, weight)
    return onednn_linear.linear(x, weight) if onednn_linear.runs(x, weight) else F.linear(x, weight)


def _swiglu(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.library.custom_op("mamba_core::experts", mutates_args=())
def _experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(y, what gate and up give of each row for each of its experts, the first expert's first)."""
    refuse_tangents(x, weights, gate_up, down)
    keep = _kept(x, chosen, gate_up)
    # The gradient needs what is kept, which the library does not give.
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        return _computed(x, weights, chosen, gate_up, down, keep), keep


@torch.library.custom_op("mamba_core::experts_backward", mutates_args=())
def _experts_backward(
    dy: Tensor, kept: Tensor, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor
) -> list[Tensor]:
    """Gradients of x, weights, gate_up and down."""
    dx, dweights = torch.zeros_like(at_least_float32(x)), weights.new_zeros(weights.numel())
    dgate_up, ddown, flat = torch.zeros_like(gate_up), torch.zeros_like(down), weights.reshape(-1, 1)
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        for expert, rows, slots, within in _shares(chosen, len(gate_up)):
            gate, up = kept[within].chunk(2, dim=-1)
            sigmoid, arriving = gate.sigmoid(), dy[rows]
            silu = gate * sigmoid
            active, dactive = silu * up, arriving @ down[expert]
            dweights[slots] = (at_least_float32(dactive) * active).sum(-1)
            weight = flat[slots]
            dactive = (dactive * weight).to(x.dtype)
            dprojected = torch.cat((dactive * up * (sigmoid + silu * (1 - sigmoid)), dactive * silu), -1)
            dx.index_add_(0, rows, at_least_float32(dprojected @ gate_up[expert]))
            dgate_up[expert] = dprojected.mT @ x[rows]
            ddown[expert] = (arriving * weight).to(x.dtype).mT @ active
    return [dx.to(x.dtype), dweights.view(weights.shape), dgate_up, ddown]


def _kept(x, chosen, gate_up):
    return x.new_zeros(chosen.numel(), gate_up.shape[1])


@_experts.register_fake
def _(x, weights, chosen, gate_up, down):
    return x.new_empty(x.shape), _kept(x, chosen, gate_up)


@_experts_backward.register_fake
def _(dy, kept, x, weights, chosen, gate_up, down):
    return [value.new_empty(value.shape) for value in (x, weights, gate_up, down)]


def _only_y(x, weights, chosen, gate_up, down):
    step = _native if _is_native(x, gate_up, down) else _computed
    return (step(x, weights, chosen, gate_up, down, None),)


def _is_native(x, gate_up, down) -> bool:
    """Whether the library computes these rows in one call."""
    sizes = [(value, value.shape) for value in (gate_up, down)]
    return native_step.reason(x) is None and native_step.fits(x.dtype, sizes)


def _native(x, weights, chosen, gate_up, down, keep: None) -> Tensor:
    native_tensors.share_threads()
    x, chosen, weights = x.contiguous(), chosen.to(torch.int32).contiguous(), weights.contiguous()
    (experts, both, d), y = gate_up.shape, x.new_empty(x.shape, dtype=torch.float32)
    settings = (x.dtype == torch.bfloat16, torch.get_num_threads(), 0, 0)
    pointers = (value.data_ptr() for value in (x, chosen, weights, gate_up, down, y))
    library.experts_step(abi.ExpertsStep(len(x), d, both // 2, chosen.shape[1], experts, *settings, *pointers))
    return y.to(x.dtype)


_run = differentiable(_experts, _experts_backward, results=1, kept=(1,), function=_only_y)


def experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """(n, d): see `ops.mixture_of_experts.KERNELS`."""
    return _run(x, weights, chosen, gate_up, down)[0]
