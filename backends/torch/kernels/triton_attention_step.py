"""One position of a block of attention in Triton, in the memory of its cache.

The kernels are in_proj with the norm before it; scores and sums over parts of the cache, which also writes the new key
and value; what joins the parts; out_proj with the residual sum. The work follows how much of the cache is filled, not
its capacity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_core.backends.torch.kernels import triton_block
from mamba_core.backends.torch.kernels.triton import (
    INTERPRETED,
    after_the_last,
    blocks_of,
    jit,
    launching,
    let_the_next_begin,
    overlapping,
    power_of_2,
    tl,
)
from mamba_core.backends.torch.quantization import Packed
from mamba_core.spec.ops.attention import Rotary

# Positions that a program looks at together, and the most programs that share a row's heads of a group.
BLOCK, MOST_PARTS = 64, 64
# Programs that fill a GPU twice.
PROGRAMS = 264
# The widest head, and the most heads that share keys.
WIDEST, MOST_SHARING = 256, 64


class Layer(NamedTuple):
    """The weights of the norm and of attention: in_proj gives q, k and v; in_bias and out_bias may be None."""

    norm: Tensor
    eps: float
    in_proj: Tensor | Packed
    in_bias: Tensor | None
    out_proj: Tensor | Packed
    out_bias: Tensor | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary

    @property
    def matrices(self) -> tuple[Tensor | Packed, ...]:
        """Those that are read as they lie in memory, in the dtype of the norm."""
        return self.in_proj, self.out_proj

    def reason(self) -> str | None:
        """Why `step` does not compute it; None if it does."""
        if self.head_dim > WIDEST or self.heads // self.kv_heads > MOST_SHARING:
            return (
                f"{self.heads // self.kv_heads} heads of {self.head_dim} channels share keys, and it takes at most "
                f"{MOST_SHARING} of {WIDEST}"
            )
        return None

    def step(self, residual: Tensor, hidden: Tensor | None, keys, values, filled, after, counters: Tensor):
        """Of residual + hidden, (b, d) each: the residual stream, and what is still to be added to it or None.

        keys, values (b, capacity, g, p) and filled (b,) int32 are written in place; `after` is the same.
        """
        with launching(residual):
            projected, total = triton_block.project(self, residual, hidden, counters)
            y = _attend(self, projected, keys, values, filled)
            return triton_block.leave(self, y, total, counters)


def _attend(layer: Layer, projected: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> Tensor:
    """(b, h p), with the new key and value written, and one more filled."""
    b, capacity, g, p = keys.shape
    h = layer.heads
    parts = max(1, min(MOST_PARTS, blocks_of(capacity, BLOCK), blocks_of(PROGRAMS, b * g)))
    sums = projected.new_empty(b, h, parts, p, dtype=torch.float32)
    logs = projected.new_empty(b, h, parts, dtype=torch.float32)
    y = projected.new_empty(b, h * p)
    rotary = layer.rotary
    sizes = {"HEADS": h, "GROUPS": g, "P": p, "PP": max(16, power_of_2(p)), "PARTS": parts}
    _attend_kernel[(b * g, parts)](
        projected,
        keys,
        values,
        filled,
        sums,
        logs,
        capacity,
        layer.scale,
        **sizes,
        SHARING=max(16, power_of_2(h // g)),
        TURNED=rotary.size,
        LOG_BASE=math.log2(rotary.base),
        INTERLEAVED=rotary.interleaved,
        BLOCK=BLOCK,
        # The interpreter multiplies matrices of bfloat16 as if they were whole numbers.
        WIDENS=INTERPRETED,
        num_warps=4,
        **overlapping(),
    )
    _join_kernel[(b * h,)](
        sums, logs, filled, y, HEADS=h, P=p, PP=power_of_2(p), PARTS=parts, PADDED=power_of_2(parts), **overlapping()
    )
    return y


@jit
def _turned(place, at, p, TURNED: tl.constexpr, LOG_BASE: tl.constexpr, INTERLEAVED: tl.constexpr, inside):
    """What lies at a place, component p of a head, turned as the position `at` asks."""
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if TURNED:
        if INTERLEAVED:
            other, index, first = p ^ 1, p // 2, p % 2 == 0
        else:
            other, index = tl.where(p < TURNED // 2, p + TURNED // 2, p - TURNED // 2), p % (TURNED // 2)
            first = p < TURNED // 2
        turns = p < TURNED
        partner = tl.load(place + tl.where(turns, other - p, 0), mask=inside, other=0.0).to(tl.float32)
        # In float32 the angle of a late position would be wrong by hundredths.
        turns_of = at.to(tl.float64) * tl.exp2(index.to(tl.float64) * (-2.0 / TURNED * LOG_BASE)) / 6.283185307179586
        angle = ((turns_of - tl.floor(turns_of)) * 6.283185307179586).to(tl.float32)
        value = tl.where(turns, value * tl.cos(angle) + tl.where(first, -partner, partner) * tl.sin(angle), value)
    return value


@jit
def _attend_kernel(
    projected,
    keys,
    values,
    filled,
    sums,
    logs,
    capacity,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    PARTS: tl.constexpr,
    SHARING: tl.constexpr,
    TURNED: tl.constexpr,
    LOG_BASE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDENS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The heads of a group over a part of the positions: sums of values, and the logarithms of the weights' sums."""
    let_the_next_begin(OVERLAP)
    row, group, part = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS, tl.program_id(1)
    OF_GROUP: tl.constexpr = HEADS // GROUPS
    h, p, s = tl.arange(0, SHARING), tl.arange(0, PP), tl.arange(0, BLOCK)
    inside, exists = p < P, h < OF_GROUP
    after_the_last(OVERLAP)
    last = tl.load(filled + row)
    own = projected + row * (HEADS + 2 * GROUPS) * P
    queries = own + (group * OF_GROUP + h)[:, None] * P + p[None, :]
    both = exists[:, None] & inside[None, :]
    query = _turned(queries, last, p[None, :], TURNED, LOG_BASE, INTERLEAVED, both)
    query = query.to(keys.dtype.element_ty)
    new_key = _turned(own + (HEADS + group) * P + p, last, p, TURNED, LOG_BASE, INTERLEAVED, inside)
    new_key = new_key.to(keys.dtype.element_ty)
    new_value = tl.load(own + (HEADS + GROUPS + group) * P + p, mask=inside, other=0.0).to(values.dtype.element_ty)
    # Parts are of whole blocks, as equal as may be.
    blocks = (last + BLOCK) // BLOCK
    share = (blocks + PARTS - 1) // PARTS
    best = tl.full((SHARING,), -1e30, tl.float32)
    weight, total = tl.zeros((SHARING,), tl.float32), tl.zeros((SHARING, PP), tl.float32)
    cache = (row * capacity * GROUPS + group) * P
    block = part * share
    while block < tl.minimum((part + 1) * share, blocks):
        at = block * BLOCK + s
        place = cache + at.to(tl.int64)[:, None] * (GROUPS * P) + p[None, :]
        there = (at < tl.minimum(last, capacity))[:, None] & inside[None, :]
        newest = (at == last)[:, None]
        key = tl.where(newest, new_key[None, :], tl.load(keys + place, mask=there, other=0.0))
        value = tl.where(newest, new_value[None, :], tl.load(values + place, mask=there, other=0.0))
        scores = _product(query, tl.trans(key), WIDENS) * scale
        scores = tl.where((at <= last)[None, :], scores, float("-inf"))
        most = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp(scores - most[:, None])
        rescaled = tl.exp(best - most)
        weight = weight * rescaled + tl.sum(shares, 1)
        total = total * rescaled[:, None] + _product(shares.to(value.dtype), value, WIDENS)
        best = most
        block += 1
    if (part * share <= last // BLOCK) & (last // BLOCK < (part + 1) * share) & (last < capacity):
        place = cache + last.to(tl.int64) * (GROUPS * P) + p
        tl.store(keys + place, new_key, mask=inside)
        tl.store(values + place, new_value, mask=inside)
    head = row * HEADS + group * OF_GROUP + h
    # Nothing was added where the part is empty. A NaN is no zero.
    found = weight != 0.0
    tl.store(
        sums + (head * PARTS + part)[:, None] * P + p[None, :], total / weight[:, None], mask=both & found[:, None]
    )
    log = tl.where(found, best + tl.log(weight), -1e30)
    # What finds no room gives NaN.
    log = tl.where(last < capacity, log, float("nan"))
    tl.store(logs + head * PARTS + part, log, mask=exists)


@jit
def _join_kernel(
    sums,
    logs,
    filled,
    y,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A head of a row, of its parts; the first counts the new position."""
    let_the_next_begin(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    part, p = tl.arange(0, PADDED), tl.arange(0, PP)
    after_the_last(OVERLAP)
    log = tl.load(logs + head * PARTS + part, mask=part < PARTS, other=-1e30)
    weight = tl.exp(log - tl.max(log, 0))
    counts = (part < PARTS) & ~(log < -1e29)
    of_part = tl.load(
        sums + (head * PARTS + part)[:, None] * P + p[None, :], mask=counts[:, None] & (p < P)[None, :], other=0.0
    )
    value = tl.sum(of_part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(y + head * P + p, value.to(y.dtype.element_ty), mask=p < P)
    if head % HEADS == 0:
        row = filled + head // HEADS
        tl.store(row, tl.load(row) + 1)


@jit
def _product(a, b, WIDENS: tl.constexpr):
    if WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    # Not in TF32, which would round float32.
    return tl.dot(a, b, input_precision="ieee")
