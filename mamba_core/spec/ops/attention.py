"""Causal attention of grouped heads, with a cache of the keys and values that were (Vaswani et al. 2017, section 3.2;
Ainslie et al. 2023, arXiv:2305.13245)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mamba_core.spec.ops.base import (
    Array,
    NodeOp,
    check_positions,
    counting,
    expect_floats,
    expect_rows,
    expect_shape,
    float64,
    restarts,
    shape_of,
)


class KeyValueCache(NamedTuple):
    """Keys and values that were, in the order of their positions; those that did not count are not there.

    keys, values: (b, capacity, g, p). filled: (b,) int32, how many of each row are there; what follows is zero.
    """

    keys: Array
    values: Array
    filled: Array


class Rotary(NamedTuple):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864).

    size: how many of a head's first components turn, an even number; 0 for none. Component i turns with i + size / 2,
        by base ** (-2 i / size) a position, or with its neighbour if `interleaved`.
    """

    size: int = 0
    base: float = 10000.0
    interleaved: bool = False


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
):
    """y_t = sum_s softmax_s(scale * q_t k_s) v_s over the positions s <= t of the same sequence that count.

    The contract is `mamba_core.attention`; computed and returned in float64.
    """
    check_attention(q, k, v, scale, rotary, cache, mask, segment_ids)
    run = _Run(q, k, v, scale, rotary, cache, mask, segment_ids)
    y = np.zeros(np.shape(q))
    for part in run.parts():
        y[part.row, part.at] = np.einsum("hts,shp->thp", part.weights, part.values)
    return (y, run.cache_after()) if return_cache else y


def attention_vjp(
    dy,
    dcache,
    q,
    k,
    v,
    *,
    scale=None,
    rotary=Rotary(),  # noqa: B008 (a tuple)
    cache=None,
    mask=None,
    segment_ids=None,
) -> dict[str, np.ndarray]:
    """Gradients of q, k and v; with a cache also of its "keys" and "values".

    dcache: (gradient of the keys, of the values) of the final cache; each may be None for zero.
    """
    run = _Run(q, k, v, scale, rotary, cache, mask, segment_ids)
    dq, dk, dv = (np.zeros(np.shape(value)) for value in (run.q, run.k, run.v))
    dkeys, dvalues = (np.zeros(np.shape(value)) for value in (run.cache.keys, run.cache.values))
    for part in run.parts():
        dpart = float64(dy)[part.row, part.at]
        dweights = np.einsum("thp,shp->hts", dpart, part.values)
        dscores = part.weights * (dweights - (part.weights * dweights).sum(-1, keepdims=True)) * run.scale
        dq[part.row, part.at] = np.einsum("hts,shp->thp", dscores, part.keys)
        dpast = part.seen - len(part.at)  # what comes first is of the cache
        for gradient, old, new in (
            (np.einsum("hts,thp->shp", dscores, run.q[part.row, part.at]), dkeys, dk),
            (np.einsum("hts,thp->shp", part.weights, dpart), dvalues, dv),
        ):
            gradient = gradient.reshape(part.seen, -1, run.repeats, gradient.shape[-1]).sum(2)
            old[part.row, :dpast] += gradient[:dpast]
            new[part.row, part.at] += gradient[dpast:]
    for gradient, old, new in zip(dcache or (None, None), (dkeys, dvalues), (dk, dv), strict=True):
        if gradient is not None:
            run.take_cache_gradient(float64(gradient), old, new)
    found = {"q": turned(dq, run.places, rotary, -1), "k": turned(dk, run.places, rotary, -1), "v": dv}
    return found if cache is None else found | {"keys": dkeys, "values": dvalues}


def places(valid: np.ndarray, restart: np.ndarray, filled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sequence, place, filled after), (b, l), (b, l) and (b,) int.

    sequence: how many restarts there were in the row. place: the position's index in its sequence, which may have begun
    in the cache. Where a position does not count they mean nothing.
    """
    sequence = np.cumsum(restart, axis=1)
    count = np.cumsum(valid, axis=1)
    begun = np.maximum.accumulate(np.where(restart, count - 1, 0), axis=1)
    place = np.where(sequence == 0, np.asarray(filled)[:, None], 0) + count - 1 - begun
    after = np.array(filled, np.int32)
    for row in range(len(valid)):
        if valid[row].any():
            after[row] = place[row, np.flatnonzero(valid[row])[-1]] + 1
    return sequence, place, after


def turned(value: np.ndarray, place: np.ndarray, rotary: Rotary, sign: int = 1) -> np.ndarray:
    """(b, l, h, p) turned by its place; with sign -1 turned back, which is the gradient too."""
    size, base, interleaved = rotary
    if size == 0:
        return value
    angle = sign * place[..., None, None] * base ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = _pairs(size, interleaved)
    found = np.array(value)
    found[..., first] = value[..., first] * cos - value[..., second] * sin
    found[..., second] = value[..., first] * sin + value[..., second] * cos
    return found


def _pairs(size: int, interleaved: bool) -> tuple[slice, slice]:
    """The components that turn together."""
    half = size // 2
    return (slice(0, size, 2), slice(1, size, 2)) if interleaved else (slice(0, half), slice(half, size))


class _Part(NamedTuple):
    """A sequence of a row: its positions in this call, and the keys and values that they may see.

    at: (t,) the positions. weights: (h, t, s). keys, values: (s, h, p), those of the cache first. seen: s.
    """

    row: int
    at: np.ndarray
    weights: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    seen: int


class _Run:
    """What forward and gradient share: the places of positions, and q and k turned."""

    def __init__(self, q, k, v, scale, rotary, cache, mask, segment_ids):
        batch, length, heads, size = np.shape(q)
        groups = np.shape(k)[2]
        self.repeats, self.scale = heads // groups, size**-0.5 if scale is None else scale
        self.valid = counting(np.shape(q), mask)
        self.restart = restarts(self.valid, segment_ids)
        if cache is None:
            room = np.zeros((batch, length, groups, size))
            cache = KeyValueCache(room, room[..., : np.shape(v)[-1]], np.zeros(batch, np.int32))
        self.cache = KeyValueCache(float64(cache.keys), float64(cache.values), np.asarray(cache.filled))
        self.sequence, self.places, self.filled = places(self.valid, self.restart, self.cache.filled)
        if (most := self.filled.max(initial=0)) > (room := self.cache.keys.shape[1]):
            raise ValueError(f"cache has room for {room} positions; expected room for {most}")
        # A value that does not count may be NaN, and 0 * NaN is not 0.
        q, k, v = (np.where(self.valid[..., None, None], float64(value), 0.0) for value in (q, k, v))
        self.q, self.k, self.v = turned(q, self.places, rotary), turned(k, self.places, rotary), v

    def parts(self) -> Iterator[_Part]:
        for row, (counts, sequence) in enumerate(zip(self.valid, self.sequence, strict=True)):
            for number in np.unique(sequence[counts]):
                at = np.flatnonzero(counts & (sequence == number))
                past = self.cache.filled[row] if number == 0 else 0
                keys, values = (
                    np.repeat(np.concatenate([old[row, :past], new[row, at]]), self.repeats, axis=1)
                    for old, new in ((self.cache.keys, self.k), (self.cache.values, self.v))
                )
                scores = self.scale * np.einsum("thp,shp->hts", self.q[row, at], keys)
                later = np.arange(len(keys)) > past + np.arange(len(at))[:, None]
                scores = np.where(later, -np.inf, scores)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                yield _Part(row, at, weights / weights.sum(-1, keepdims=True), keys, values, len(keys))

    def _kept(self, row: int) -> tuple[bool, np.ndarray]:
        """Whether the row's last sequence began before this call, and that sequence's positions."""
        last = self.sequence[row].max(initial=0)
        return last == 0, np.flatnonzero(self.valid[row] & (self.sequence[row] == last))

    def cache_after(self) -> KeyValueCache:
        found = []
        for old, new in ((self.cache.keys, self.k), (self.cache.values, self.v)):
            after = np.array(old)
            for row in range(len(after)):
                begun, at = self._kept(row)
                if not begun:
                    after[row] = 0.0
                after[row, self.places[row, at]] = new[row, at]
            found.append(after)
        keys, values = found
        return KeyValueCache(keys, values, self.filled)

    def take_cache_gradient(self, gradient: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
        """Adds the gradient of the final cache to those of the first cache and of what was written."""
        for row in range(len(gradient)):
            begun, at = self._kept(row)
            new[row, at] += gradient[row, self.places[row, at]]
            if begun:
                kept = np.array(gradient[row])
                kept[self.places[row, at]] = 0.0
                old[row] += kept


def check_attention(q, k, v, scale, rotary, cache, mask, segment_ids) -> None:
    """Check the arguments of `attention`.

    Raises:
        TypeError: an argument is not an array, or of another kind of dtype.
        ValueError: a shape does not fit, the batch is empty, or the groups do not divide the heads.
    """
    batch, length, heads, size = shape_of("q", q, ("b", "l", "h", "p"))
    expect_rows("q", batch)
    groups = shape_of("k", k, ("b", "l", "g", "p"))[2]
    if groups < 1 or heads % groups:
        raise ValueError(f"q has {heads} heads and k {groups}; expected a number of heads that k's divide")
    wide = shape_of("v", v, ("b", "l", "g", "p"))[3]
    expect_shape("k", k, (batch, length, groups, size), "(b, l, g, p)")
    expect_shape("v", v, (batch, length, groups, wide), "(b, l, g, p)")
    if scale is not None and not (isinstance(scale, int | float) and np.isfinite(scale)):
        raise ValueError(f"scale is {scale!r}; expected a finite number, or None for 1 / sqrt(p)")
    if rotary.size % 2 or not 0 <= rotary.size <= size:
        raise ValueError(f"rotary.size is {rotary.size}; expected an even number from 0 to {size}, the size of a head")
    expect_floats({"q": q, "k": k, "v": v})
    check_positions(batch, length, mask, segment_ids)
    if cache is None:
        return
    capacity = shape_of("cache.keys", cache.keys, ("b", "capacity", "g", "p"))[1]
    expect_shape("cache.keys", cache.keys, (batch, capacity, groups, size), "(b, capacity, g, p)")
    expect_shape("cache.values", cache.values, (batch, capacity, groups, wide), "(b, capacity, g, p)")
    expect_shape("cache.filled", cache.filled, (batch,), "(b,)")
    if "int" not in str(cache.filled.dtype):
        raise TypeError(f"cache.filled is {cache.filled.dtype}; expected integers")


# --- in the block graph ------------------------------------------------------------------------------------


def _arguments(inputs, settings, carried, positions):
    """The node's inputs with their heads apart, and the other arguments."""
    heads, groups = settings["heads"], settings["kv_heads"]
    counts = (heads, groups, groups)
    apart = [_apart(value, count) for value, count in zip(inputs, counts, strict=True)]
    how = {"scale": settings["scale"], "rotary": settings["rotary"], "cache": KeyValueCache(*carried)}
    return apart, how | positions._asdict()


def _apart(value: np.ndarray, heads: int) -> np.ndarray:
    """(b, l, h p) as (b, l, h, p); l may be 0."""
    return value.reshape(*value.shape[:2], heads, value.shape[2] // heads)


def _forward(inputs, parameters, settings, carried, positions):
    apart, how = _arguments(inputs, settings, carried, positions)
    y, cache = attention(*apart, return_cache=True, **how)
    return y.reshape(*y.shape[:2], y.shape[2] * y.shape[3]), tuple(cache)


def _vjp(dy, dcarried, inputs, parameters, settings, carried, positions):
    apart, how = _arguments(inputs, settings, carried, positions)
    found = attention_vjp(_apart(dy, settings["heads"]), dcarried[:2], *apart, **how)
    together = [found[name].reshape(value.shape) for name, value in zip("qkv", inputs, strict=True)]
    return together, {}, (found["keys"], found["values"], None)


NODES = {"attention": NodeOp(_forward, _vjp)}
