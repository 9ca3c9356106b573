"""Causal attention in PyTorch: its plain form, the framework's own kernels, and the cache of keys and values.

Counting positions are brought together first. Where no sequence restarts, what is left of a mask is the causal one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamba_core.backends.torch import private
from mamba_core.backends.torch.arrays import check_devices, in_compute_dtype
from mamba_core.backends.torch.positions import call_of, where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.selftest import Trial
from mamba_core.spec.ops.attention import KeyValueCache, Rotary, check_attention

# Queries that are computed at once where each has a mask of its own over all keys.
QUERIES = 512


def attention(
    q,
    k,
    v,
    *,
    scale=None,
    rotary=Rotary(),  # noqa: B008 (a tuple)
    cache=None,
    return_cache=False,
    mask=None,
    segment_ids=None,
    kernel="auto",
):
    """Gradients of gradients and forward mode need kernel="plain"."""
    check_attention(q, k, v, scale, rotary, cache, mask, segment_ids)
    call = call_of(mask, segment_ids, length=q.shape[1], fresh=cache is None)
    if cache is None:
        filled = torch.zeros(len(q), dtype=torch.int32, device=q.device)
        cache = KeyValueCache(torch.zeros_like(k), torch.zeros_like(v), filled)
    y, cache = attend(call, q, k, v, cache, scale=scale, rotary=rotary, kernel=kernel)
    return (y, cache) if return_cache else y


def attend(call: Call, q, k, v, cache: KeyValueCache, *, scale=None, rotary=Rotary(), kernel):  # noqa: B008 (a tuple)
    """`attention` inside a call of a model: (y, the cache after). Where call.fresh, the cache has room for all."""
    check_attention(q, k, v, scale, rotary, cache, call.mask, call.segment_ids)
    check_devices(q, k=k, v=v, keys=cache.keys, values=cache.values, filled=cache.filled, mask=call.mask)
    run = KERNELS[choose(kernel, kernels(q.device, q.dtype), "attention", "torch", q.device)]
    if q.shape[1] == 0:
        return q, cache
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if call.mask is not None:
        q, k, v = (_taken(where_counting(call.mask, value), call.order) for value in (q, k, v))
    spots = Spots(call, cache.filled, q.shape[1])
    q, k = turned(q, spots.place, rotary), turned(k, spots.place, rotary)
    after = _written(cache, k, v, spots, call)
    if spots.restart is not None:
        y = _of_sequences(run, q, k, v, cache, spots, scale, call.fresh)
    elif call.fresh:
        y = run(q, k, v, scale, None)
    else:
        y = _with_cache(run, q, after, spots, scale)
    if not call.fresh:
        y = _where_room(y, cache.keys.shape[1], spots)
    if call.mask is not None:
        y = where_counting(call.mask, _taken(y, call.inverse))
    return y, after


class Spots:
    """Where the positions of a call stand in their sequences, once those that count stand together.

    place: (b, l), the index in its sequence, which may have begun in the cache.
    restart, sequence: (b, l) or None, which positions restart, and how many restarts there were.
    before: (b,), the index of a place of the last sequence is that place plus this.
    count: (b,) positions that count. filled_before, filled: (b,) those in the cache before and after them.
    most: the most that are filled before and after; None where the host cannot read it. equal: all rows have as many.
    """

    def __init__(self, call: Call, filled: Tensor, length: int):
        index = torch.arange(length, device=filled.device)[None]
        self.restart = self.sequence = None
        self.count = torch.full_like(filled, length) if call.mask is None else call.mask.sum(1)
        self.before, self.filled_before = -filled, filled
        self.place = index + filled[:, None]
        if call.restart is not None and length > 1:
            self.restart = call.restart if call.mask is None else call.restart.gather(1, call.order)
            begun = torch.where(self.restart, index, 0).cummax(1).values
            self.sequence = self.restart.cumsum(1)
            self.before = torch.where(begun[:, -1] > 0, begun[:, -1], -filled)
            self.place = index - begun + torch.where(self.sequence == 0, filled[:, None], 0)
        self.filled = torch.where(self.count > 0, self.count - self.before, filled).to(torch.int32)
        self.most, self.equal = None, False
        if not call.fresh and _host_reads(filled):
            counts = self.filled.tolist()
            self.most, self.equal = max(*counts, *filled.tolist()), min(counts) == max(counts)


def kernels(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Fastest first: None for a kernel that runs there, else why not."""
    return dict.fromkeys(KERNELS)


def fused(q, k, v, scale: float, allowed: Tensor | None) -> Tensor:
    """`scaled_dot_product_attention`. Of one position, the heads of a group are the queries of one head."""
    k, v = k.to(q.dtype).transpose(1, 2), v.to(q.dtype).transpose(1, 2)
    groups, repeats = k.shape[1], q.shape[2] // k.shape[1]
    mask = None if allowed is None else allowed[:, None]
    if q.shape[1] == 1:
        return _dot_product(q[:, 0].unflatten(1, (groups, repeats)), k, v, mask, scale=scale).flatten(1, 2)[:, None]
    q = q.transpose(1, 2)
    if mask is None:
        y = _dot_product(q, k, v, is_causal=True, scale=scale, enable_gqa=repeats > 1)
    else:  # no kernel takes both a mask and groups
        k, v = (value.repeat_interleave(repeats, 1) if repeats > 1 else value for value in (k, v))
        y = _dot_product(q, k, v, mask, scale=scale)
    return y.transpose(1, 2)


def _dot_product(q, *arguments, **options):
    """Without cuDNN's kernel: PyTorch 2.11 chooses it for a prompt of 262,144, at which it failed on an H200."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, *arguments, **options)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, *arguments, **options)


def plain(q, k, v, scale: float, allowed: Tensor | None) -> Tensor:
    """Differentiable any number of times.

    allowed: (b, l, s), the keys that each query sees. None where the last sees all and each before it one less.
    """
    dtype, groups = q.dtype, k.shape[2]
    q, k, v = in_compute_dtype(q, k, v)
    if allowed is None:
        allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    scores = torch.einsum("btgrp,bsgp->bgrts", q.unflatten(2, (groups, -1)), k) * scale
    scores = scores.masked_fill(~(allowed if allowed.ndim == 2 else allowed[:, None, None]), -torch.inf)
    return torch.einsum("bgrts,bsgp->btgrp", scores.softmax(-1), v).flatten(2, 3).to(dtype)


# Fastest first.
KERNELS = {"fused": fused, "plain": plain}


def turned(value: Tensor, place: Tensor, rotary: Rotary) -> Tensor:
    """(b, l, h, p) turned by its place."""
    size, base, interleaved = rotary
    if size == 0:
        return value
    dtype, (value,) = value.dtype, in_compute_dtype(value)
    rates = base ** (-torch.arange(0, size, 2, device=value.device, dtype=value.dtype) / size)
    angle = place[..., None, None] * rates
    cos, sin = angle.cos(), angle.sin()
    rest, value = value[..., size:], value[..., :size]
    first, second = (value[..., ::2], value[..., 1::2]) if interleaved else value.chunk(2, dim=-1)
    pair = first * cos - second * sin, first * sin + second * cos
    found = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((found, rest), -1).to(dtype)


# --- the cache -------------------------------------------------------------------------------------------


def _written(cache: KeyValueCache, k, v, spots: Spots, call: Call) -> KeyValueCache:
    """The cache after the call."""
    if call.one:
        write = _in_place if call.in_place else Tensor.scatter
        keys, values = (_with_one(write, old, new, spots) for old, new in ((cache.keys, k), (cache.values, v)))
    elif call.fresh and spots.restart is None:
        keys, values = (
            F.pad(new.to(old.dtype), (0, 0, 0, 0, 0, old.shape[1] - new.shape[1]))
            for old, new in ((cache.keys, k), (cache.values, v))
        )
    else:
        keys, values = (_with_many(old, new, spots) for old, new in ((cache.keys, k), (cache.values, v)))
    return KeyValueCache(keys, values, spots.filled)


def _in_place(old: Tensor, axis: int, index: Tensor, value: Tensor) -> Tensor:
    return old.scatter_(axis, index, value)


def _with_one(write, old, new, spots: Spots):
    """With one position more in each row that has room."""
    room, new = old.shape[1], new.to(old.dtype)
    place = spots.place.long().clamp(max=room - 1)[..., None, None].expand_as(new)
    if spots.most is None or spots.most > room:
        new = torch.where((spots.place < room)[..., None, None], new, old.gather(1, place))
    return write(old, 1, place, new)


def _with_many(old, new, spots: Spots):
    """With the last sequence's positions. Of a sequence that began in the call, what was there before is gone."""
    index = torch.arange(old.shape[1], device=old.device) + spots.before[:, None]
    taken = (index >= 0) & (index < spots.count[:, None])
    index = index.clamp(0, new.shape[1] - 1)[..., None, None].expand(-1, -1, *new.shape[2:])
    if spots.restart is not None:
        old = torch.where(spots.sequence[:, -1].view(-1, 1, 1, 1) == 0, old, 0.0)
    return torch.where(taken[..., None, None], new.to(old.dtype).gather(1, index), old)


# --- which keys a query sees -----------------------------------------------------------------------------


def _with_cache(run, q, after: KeyValueCache, spots: Spots, scale):
    """Of one sequence, whose keys are all in the cache, as far as they have found room."""
    keys, values = after.keys, after.values
    if spots.most is not None:
        keys, values = (value[:, : max(1, spots.most)] for value in (keys, values))
        if q.shape[1] == 1 and spots.equal:
            return run(q, keys, values, scale, None)
    index = torch.arange(keys.shape[1], device=q.device)
    return _in_parts(q, lambda part: run(q[:, part], keys, values, scale, index <= spots.place[:, part, None]))


def _of_sequences(run, q, k, v, cache: KeyValueCache, spots: Spots, scale, fresh: bool):
    """Of sequences that stand in one row. The first may go on from the cache."""
    length, earlier = q.shape[1], None
    index = torch.arange(length, device=q.device)
    if not fresh:
        k, v = torch.cat((cache.keys.to(k.dtype), k), 1), torch.cat((cache.values.to(v.dtype), v), 1)
        earlier = torch.arange(cache.keys.shape[1], device=q.device) < spots.filled_before[:, None]
    begun = k.shape[1] - length

    def computed(part: slice):
        sequence = spots.sequence[:, part, None]
        allowed = (sequence == spots.sequence[:, None, : part.stop]) & (index[: part.stop] <= index[part, None])
        if earlier is not None:
            allowed = torch.cat(((sequence == 0) & earlier[:, None], allowed), -1)
        return run(q[:, part], k[:, : begun + part.stop], v[:, : begun + part.stop], scale, allowed)

    return _in_parts(q, computed)


def _in_parts(q, compute):
    """compute(part) of some queries at a time, so that no mask is as large as queries times keys."""
    length = q.shape[1]
    if length <= QUERIES:
        return compute(slice(0, length))
    parts = (slice(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES))
    return torch.cat([compute(part) for part in parts], 1)


def _where_room(y, room: int, spots: Spots):
    """NaN at positions of the last sequence that the cache has no room for."""
    if spots.most is not None and spots.most <= room:
        return y
    outside = spots.place >= room
    if spots.sequence is not None:
        outside = outside & (spots.sequence == spots.sequence[:, -1:])
    return torch.where(outside[..., None, None], torch.nan, y)


def _taken(value, order):
    return value.gather(1, order[..., None, None].expand(-1, -1, *value.shape[2:]))


def _host_reads(value: Tensor) -> bool:
    """Whether the host may look at a tensor's numbers without waiting, and nothing is traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not value.is_cpu:
        return False
    return not (private.transformed() or private.intercepted())


def trials(device: str):
    for dtype, length, groups, rotary in (("float32", 37, 2, 0), ("bfloat16", 64, 1, 8), ("float32", 1, 4, 0)):
        rng, (batch, heads, size) = np.random.default_rng(0), (2, 4, 16)
        shapes = {"q": (batch, length, heads, size)} | dict.fromkeys("kv", (batch, length, groups, size))
        arrays = {name: (rng.normal(size=shape), dtype) for name, shape in shapes.items()}

        def call(kernel, q, k, v, rotary=rotary):
            return (attention(q, k, v, rotary=Rotary(rotary), kernel=kernel),)

        yield Trial(f"{dtype}, {length} positions", dtype, arrays, {"y": (shapes["q"], dtype)}, call)
