"""The head and the cross-entropy of a large vocabulary as one operator, a few rows of logits in memory at a time.

Its gradient is computed with it, from the same logits (as Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels.operator import differentiable, refuse_tangents
from mamba_core.backends.torch.kernels.triton import add_product, jit, launching, power_of_2, tl

# Logits in memory at once.
BYTES = 1 << 28
BLOCK = 4096
IGNORED = -100


def linear_cross_entropy(hidden, weight, targets):
    """The sum of the cross-entropies of the targets that are not IGNORED, () float32.

    hidden (rows, d), in whose dtype logits are; weight (v, d); targets (rows,) int, NaN outside the vocabulary. Plain
    operations:

        cross_entropy(linear(hidden, weight).float(), targets, ignore_index=IGNORED, reduction="sum")
    """
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _loss(hidden, weight, targets, keep)[0]


@torch.library.custom_op("mamba_core::linear_cross_entropy", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum, and where they are kept the gradients of hidden and, in float32, of weight)."""
    refuse_tangents(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, targets, own = hidden.contiguous(), targets.contiguous(), weight.to(hidden.dtype)
        (rows, _), v = hidden.shape, len(weight)
        losses, dhidden, dweight = hidden.new_empty(rows, dtype=torch.float32), *_empty_gradients(hidden, weight, keep)
        dweight.zero_()
        each = max(1, min(rows, BYTES // (v * hidden.element_size())))
        logits = hidden.new_empty(each, v)
        for start in range(0, rows, each):
            part = hidden[start : start + each]
            torch.mm(part, own.mT, out=logits[: len(part)])
            _cross_entropy(logits[: len(part)], targets[start : start + each], losses[start : start + each], keep)
            if keep:
                torch.mm(logits[: len(part)], own, out=dhidden[start : start + each])
                add_product(dweight, logits[: len(part)].mT, part)
        return losses.sum(), dhidden, dweight


@torch.library.custom_op("mamba_core::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: Tensor, dhidden: Tensor, dweight: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, keep: bool
) -> list[Tensor]:
    if not keep:  # torch.func may ask for the gradient of tensors that did not say that they require one
        _, dhidden, dweight = _forward(hidden, weight, targets, True)
    return [(dhidden * dloss).to(hidden.dtype), (dweight * dloss).to(weight.dtype)]


@_forward.register_fake
def _(hidden, weight, targets, keep):
    return hidden.new_empty((), dtype=torch.float32), *_empty_gradients(hidden, weight, keep)


@_backward.register_fake
def _(dloss, dhidden, dweight, hidden, weight, targets, keep):
    return [hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)]


_loss = differentiable(_forward, _backward, results=1, kept=(1, 2))


def _empty_gradients(hidden, weight, keep):
    shapes = (hidden.shape, weight.shape) if keep else ((0,), (0,))
    return hidden.new_empty(shapes[0]), hidden.new_empty(shapes[1], dtype=torch.float32)


def _cross_entropy(logits, targets, losses, keep):
    """Fills losses, and makes of the logits their gradients."""
    v = logits.shape[1]
    with launching(logits):
        _cross_entropy_kernel[(len(logits),)](
            logits, targets, losses, V=v, KEEP=keep, IGNORE=IGNORED, BLOCK=min(BLOCK, power_of_2(v)), num_warps=8
        )


@jit
def _cross_entropy_kernel(
    logits,
    targets,
    losses,
    V: tl.constexpr,
    KEEP: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    k = tl.arange(0, BLOCK)
    target = tl.load(targets + row).to(tl.int64)
    known = (target >= 0) & (target < V)
    counts = target != IGNORE
    # The largest so far and the sum of exponentials below it, of each place in the block.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        value = tl.load(logits + start + k, mask=start + k < V, other=float("-inf")).to(tl.float32)
        greater = tl.maximum(largest, value)
        # A place that has seen nothing yet has nothing to rescale.
        total = total * tl.where(total > 0, tl.exp(largest - greater), 0.0)
        total += tl.where(start + k < V, tl.exp(value - greater), 0.0)
        largest = greater
    most = tl.max(largest, 0)
    total = tl.sum(tl.where(total == 0, 0.0, total * tl.exp(largest - most)), 0)
    own = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    loss = most + tl.log(total) - own
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if KEEP:
        tl.debug_barrier()
        factor = tl.where(counts, tl.where(known, 1.0, float("nan")), 0.0)
        for start in range(0, V, BLOCK):
            value = tl.load(logits + start + k, mask=start + k < V, other=float("-inf")).to(tl.float32)
            value = tl.exp(value - most) / total - tl.where(start + k == target, 1.0, 0.0)
            value = tl.where(counts, value * factor, 0.0)
            tl.store(logits + start + k, value.to(logits.dtype.element_ty), mask=start + k < V)
