"""Causal attention with a cache in MLX: its plain form, the choice of a kernel, and what is kept of keys and values."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import numpy_attention
from mamba_core.backends.mlx.positions import call_of, where_counting
from mamba_core.call import Call
from mamba_core.kernels import choose
from mamba_core.selftest import Trial
from mamba_core.spec.ops.attention import KeyValueCache, Rotary, check_attention

# Sizes of a head for which MLX has fused kernels on every GPU. They compute scores in float32; for another size MLX
# would round the scores to the dtype of q.
FUSED_HEADS = (64, 128)


class Places(NamedTuple):
    """Where the positions of a call stand, (b, l) each; None for `sequence` where all are of the row's first.

    sequence: how many restarts there were up to each position. place: its index in its sequence, which may have begun
    in the cache. counts: (b,) int, how many positions count. kept: (b,) int, how many of them are of the last sequence.
    start: (b,) int, the place of the first that is kept.
    """

    sequence: mx.array | None
    place: mx.array
    counts: mx.array
    kept: mx.array
    start: mx.array


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
    """Computed in float32, a float64 q too: MLX has no float64 on a GPU."""
    check_attention(q, k, v, scale, rotary, cache, mask, segment_ids)
    call = call_of(mask, segment_ids, length=q.shape[1])
    if cache is None:
        cache = KeyValueCache(mx.zeros_like(k), mx.zeros_like(v), mx.zeros((len(q),), mx.int32))
        call = call._replace(fresh=True)
    y, cache = attend(call, q, k, v, cache, scale=scale, rotary=rotary, kernel=kernel)
    return (y, cache) if return_cache else y


def attend(call: Call, q, k, v, cache, *, scale=None, rotary=Rotary(), kernel="auto"):  # noqa: B008 (a tuple)
    """`attention` within a call whose positions are known; (y, cache after it). `call.fresh`: the cache is zeros."""
    keep_float32()
    dtype, scale = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] == 0:
        return mx.zeros((*q.shape[:3], v.shape[3]), dtype), cache
    # A value that does not count may be NaN, and 0 * NaN is not 0.
    q, k, v = (where_counting(call.mask, value) for value in (q, k, v))
    places = _places(call, cache.filled, q.shape[:2])
    q, k = turned(q, places.place, rotary), turned(k, places.place, rotary)
    run = KERNELS[chosen(kernel, (q, k, v, *cache, call.mask, call.restart))]
    after = _written(call, cache, k, v, places)
    y = run(call, q, k, v, cache, after, places, scale).astype(dtype)
    if not call.fresh:
        y = mx.where(_fits(places, cache)[..., None, None], y, mx.array(mx.nan, dtype))
    return where_counting(call.mask, y), after


def kernels(device: str | None = None, dtype: mx.Dtype | None = None) -> dict[str, str | None]:
    return dict.fromkeys(KERNELS) | {"numpy": numpy_attention.reason(device or default_device())}


def chosen(kernel: str, arrays) -> str:
    """The kernel of that name, or for "auto" the fastest, for these arrays on MLX's default device.

    Raises:
        ValueError: there is no such kernel, or not for them.
    """
    arrays = [value for value in arrays if value is not None] if kernel in ("auto", "numpy") else ()
    available = dict.fromkeys(KERNELS) | {"numpy": numpy_attention.reason(default_device(), arrays)}
    return choose(kernel, available, "attention", "mlx", default_device())


def numpy(call, q, k, v, cache, after, places, scale):
    """On a CPU, at once: no position that is not seen is computed."""
    return numpy_attention.attention(call, q, k, v, cache, after, places.sequence, scale)


def fused(call, q, k, v, cache, after, places, scale):
    """By MLX's own attention."""
    if not (q.dtype != mx.float32 and default_device() == "gpu" and q.shape[-1] == v.shape[-1] in FUSED_HEADS):
        q, k, v = (value.astype(mx.float32) for value in (q, k, v))
    keys, values, seen = _seen(call, k, v, cache, after, places)
    # Of a call without past, mask and segments the kernel needs no array to say what is seen.
    seen = "causal" if seen is None else seen[:, None]
    q, keys, values = (value.astype(q.dtype).swapaxes(1, 2) for value in (q, keys, values))
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=seen).swapaxes(1, 2)


def plain(call, q, k, v, cache, after, places, scale):
    """Scores, softmax and sum as three operations, in float32."""
    batch, length, heads, _ = q.shape
    keys, values, seen = _seen(call, k, v, cache, after, places)
    if seen is None:
        seen = (mx.arange(length)[:, None] >= mx.arange(length))[None]
    groups = keys.shape[2]
    q = q.astype(mx.float32).reshape(batch, length, groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)
    keys, values = (value.astype(mx.float32).swapaxes(1, 2)[:, :, None] for value in (keys, values))
    scores = mx.where(seen[:, None, None], scale * (q @ keys.swapaxes(-1, -2)), -mx.inf)
    y = mx.softmax(scores, axis=-1) @ values
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


# Fastest first, the plain one last.
KERNELS = {"numpy": numpy, "fused": fused, "plain": plain}


def trials(device: str):
    for dtype, size in (("float32", 12), ("bfloat16", 64), ("float16", 128)):
        yield Trial(f"{dtype}, heads of {size}", dtype, *_trial(dtype, size))


def _trial(dtype, size):
    """Arrays, outputs and the call of a trial: with a cache, a mask and segments."""
    rng, shapes = np.random.default_rng(0), {"q": (2, 37, 4, size)} | dict.fromkeys(("k", "v"), (2, 37, 2, size))
    shapes |= dict.fromkeys(("keys", "values"), (2, 64, 2, size))
    arrays = {name: (rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    filled, mask = np.array([5, 0], np.int32), rng.random((2, 37)) < 0.7
    segments = np.cumsum(rng.random((2, 37)) < 0.15, axis=1).astype(np.int32)
    for name in ("keys", "values"):
        arrays[name][0][...] *= (np.arange(64) < filled[:, None])[..., None, None]

    def call(kernel, q, k, v, keys, values):
        cache = KeyValueCache(keys, values, mx.array(filled))
        told = {"cache": cache, "mask": mx.array(mask), "segment_ids": mx.array(segments), "return_cache": True}
        y, after = attention(q, k, v, rotary=Rotary(size // 2), **told, kernel=kernel)
        return y, after.keys, after.values

    outputs = {"y": (shapes["q"], dtype), "keys": (shapes["keys"], dtype), "values": (shapes["values"], dtype)}
    return arrays, outputs, call


def turned(value: mx.array, place: mx.array, rotary: Rotary) -> mx.array:
    """(b, l, h, p), each position turned by its place."""
    size, base, interleaved = rotary
    if size == 0:
        return value
    rates = mx.array((base ** (-np.arange(0, size, 2) / size)).astype(np.float32))
    angle = place.astype(mx.float32)[..., None, None] * rates
    cos, sin, half = mx.cos(angle), mx.sin(angle), size // 2
    whole = value[..., :size].astype(mx.float32)
    pairs = whole.reshape(*whole.shape[:-1], half, 2) if interleaved else None
    first, second = (whole[..., :half], whole[..., half:]) if pairs is None else (pairs[..., 0], pairs[..., 1])
    found = first * cos - second * sin, first * sin + second * cos
    found = mx.concatenate(found, axis=-1) if pairs is None else mx.stack(found, axis=-1).reshape(whole.shape)
    return mx.concatenate([found.astype(value.dtype), value[..., size:]], axis=-1)


def _places(call: Call, filled, shape) -> Places:
    """Of a call whose first position stands in its row behind so many others."""
    if call.mask is None:
        count = mx.broadcast_to(mx.arange(1, shape[1] + 1), shape)
    else:
        count = mx.cumsum(call.mask.astype(mx.int32), axis=1)
    counts = count[:, -1]
    if call.restart is None:
        return Places(None, filled[:, None] + count - 1, counts, counts, filled)
    sequence = mx.cumsum(call.restart.astype(mx.int32), axis=1)
    begun = mx.cummax(mx.where(call.restart, count - 1, 0), axis=1)
    place = mx.where(sequence == 0, filled[:, None], 0) + count - 1 - begun
    start = mx.where(sequence[:, -1] == 0, filled, 0)
    return Places(sequence, place, counts, counts - begun[:, -1], start)


def _fits(places: Places, cache) -> mx.array:
    """(b, l) bool: the cache has room for the position, or its sequence ends in this call and has lost nothing."""
    capacity = cache.keys.shape[1]
    fits = places.place < capacity
    if places.sequence is None:
        return fits
    whole = (places.sequence > 0) | (cache.filled <= capacity)[:, None]
    return fits | ((places.sequence < places.sequence[:, -1:]) & whole)


def _seen(call, k, v, cache, after, places):
    """Keys and values (b, s, g, p), and which of them each position sees, (b or 1, l, s); None for those up to it.

    A position that does not count sees itself, so that no softmax is over nothing.
    """
    length, capacity = k.shape[1], cache.keys.shape[1]
    if call.fresh and call.plain:
        return k, v, None
    if call.one:
        return after.keys, after.values, mx.arange(capacity) <= places.place[..., None]
    at = mx.arange(length)
    seen = at[:, None] >= at
    if call.mask is not None:
        seen = seen & call.mask[:, None]
    if places.sequence is not None:
        seen = seen & (places.sequence[:, None] == places.sequence[..., None])
    seen = mx.broadcast_to(seen | (at[:, None] == at), (len(k), length, length))
    if call.fresh:
        return k, v, seen
    past = mx.broadcast_to((mx.arange(capacity) < cache.filled[:, None])[:, None], (len(k), length, capacity))
    if places.sequence is not None:
        past = past & (places.sequence == 0)[..., None]
    keys, values = (mx.concatenate([old.astype(new.dtype), new], axis=1) for old, new in zip(cache, (k, v)))  # noqa: B905
    return keys, values, mx.concatenate([past, seen], axis=-1)


def _written(call, cache, k, v, places) -> KeyValueCache:
    """The cache with the positions that count and find room; only the last sequence is kept."""
    capacity, length = cache.keys.shape[1], k.shape[1]
    filled = (places.start + places.kept).astype(mx.int32)
    if call.fresh and call.plain:
        keys, values = (_fitted(new.astype(old.dtype), capacity) for old, new in zip(cache, (k, v)))  # noqa: B905
        return KeyValueCache(keys, values, filled)
    if capacity == 0:
        return cache._replace(filled=filled)
    if call.one:
        place = mx.minimum(places.place, capacity - 1)[..., None, None]
        fits = _fits(places, cache)[..., None, None]
        found = []
        for old, new in zip(cache, (k, v)):  # noqa: B905
            at = mx.broadcast_to(place, new.shape)
            new = mx.where(fits, new.astype(old.dtype), mx.take_along_axis(old, at, axis=1))
            found.append(mx.put_along_axis(old, at, new, axis=1))
        return KeyValueCache(*found, filled)
    slot = mx.arange(capacity) - places.start[:, None]
    new_here = ((slot >= 0) & (slot < places.kept[:, None]))[..., None, None]
    source = mx.clip((places.counts - places.kept)[:, None] + slot, 0, length - 1)
    if call.order is not None:
        source = mx.take_along_axis(call.order, source, axis=1)
    found = []
    for old, new in zip(cache, (k, v)):  # noqa: B905
        at = mx.broadcast_to(source[..., None, None], (len(source), capacity, 1, 1))
        moved = mx.take_along_axis(new.astype(old.dtype), at, axis=1)
        if places.sequence is not None:
            begun = (places.sequence[:, -1] > 0)[:, None, None, None]
            old = mx.where(begun, mx.array(0, old.dtype), old)
        found.append(mx.where(new_here, moved, old))
    return KeyValueCache(*found, filled)


def _fitted(value: mx.array, capacity: int) -> mx.array:
    """The first positions that there is room for, and zeros behind them."""
    missing = capacity - value.shape[1]
    return mx.pad(value, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing > 0 else value[:, :capacity]
