"""The likeliest token of each row and its log-probability in Triton: one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels.triton import blocks_of, jit, launching, power_of_2, tl

BLOCK = 2048


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens (b,) int64, log-probabilities (b,)) of logits (b, v) float32, without gradients. Plain operations:

    tokens = logits.argmax(-1), 0 where the largest is not finite
    log_softmax(logits).gather(tokens), NaN where the largest is NaN or +inf, -inf where it is -inf
    """
    (b, v), count = logits.shape, blocks_of(logits.shape[1], BLOCK)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    largest, total = (logits.new_empty(b, count) for _ in range(2))
    places = torch.empty(b, count, dtype=torch.int32, device=logits.device)
    tokens, logprobs = torch.empty(b, dtype=torch.long, device=logits.device), logits.new_empty(b)
    with launching(logits):
        parts = (largest, places, total)
        _parts_kernel[(count, b)](logits, *parts, logits.stride(0), V=v, COUNT=count, BLOCK=BLOCK)
        _likeliest_kernel[(b,)](*parts, tokens, logprobs, COUNT=count, BLOCK=power_of_2(count), num_warps=1)
    return tokens, logprobs


@jit
def _parts_kernel(logits, largest, places, total, stride, V: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of each block of tokens the largest logit, the first place where it stands, and the sum of the exponentials."""
    b, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    k = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + b * stride + k, mask=k < V, other=float("-inf"))
    most = tl.max(value, 0)
    tl.store(largest + b * COUNT + block, most)
    tl.store(places + b * COUNT + block, tl.min(tl.where(value == most, k, V), 0))
    # -inf less -inf would be NaN, which is to come from NaN and +inf alone.
    tl.store(total + b * COUNT + block, tl.sum(tl.where(value == float("-inf"), 0.0, tl.exp(value - most)), 0))


@jit
def _likeliest_kernel(largest, places, total, tokens, logprobs, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    values = tl.load(largest + b * COUNT + k, mask=k < COUNT, other=float("-inf"))
    sums = tl.load(total + b * COUNT + k, mask=k < COUNT, other=0.0)
    most = tl.max(values, 0)
    place = tl.load(places + b * COUNT + k, mask=k < COUNT, other=2147483647)
    place = tl.min(tl.where(values == most, place, 2147483647), 0)
    together = tl.sum(tl.where(values == float("-inf"), sums, sums * tl.exp(values - most)), 0)
    known = (together == together) & (most != float("-inf"))
    logprob = tl.where((most == float("-inf")) & (together == together), float("-inf"), -tl.log(together))
    tl.store(tokens + b, tl.where(known, place, 0).to(tl.int64))
    tl.store(logprobs + b, logprob)
