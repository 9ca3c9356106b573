"""Causal attention of grouped heads with a cache, in JAX: a plain form in blocks of queries, and cuDNN's.

What counts is brought to the front of its row first, so that a padded row is no more than a shorter one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mamba_core.backends.jax.kernels import cudnn_attention
from mamba_core.backends.jax.ops.linear import precision
from mamba_core.backends.jax.positions import call_of, where_counting
from mamba_core.kernels import choose
from mamba_core.selftest import Trial
from mamba_core.spec.ops import attention as spec
from mamba_core.spec.ops.attention import KeyValueCache, Rotary, check_attention

# Bytes of the float32 scores that are there at once, and the fewest queries.
SCORE_BYTES, FEWEST = 2**26, 64
# Stretches of the queries that are computed with the keys up to their end, and no later ones.
STRETCHES = 4


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
    check_attention(q, k, v, scale, rotary, cache, mask, segment_ids)
    call = call_of(mask, segment_ids, length=q.shape[1], fresh=cache is None)
    if cache is None:
        zeros = (jnp.zeros(value.shape, value.dtype) for value in (k, v))
        cache = KeyValueCache(*zeros, jnp.zeros(q.shape[:1], jnp.int32))
    y, cache = attend(call, q, k, v, cache, scale=scale, rotary=rotary, kernel=kernel)
    return (y, cache) if return_cache else y


def attend(call, q, k, v, cache, *, scale=None, rotary=Rotary(), kernel="auto"):  # noqa: B008 (a tuple)
    """`attention` in a call whose positions are known: (y, the cache after it).

    Where the call is fresh, of the cache its capacity alone is read.
    """
    if kernel != "auto":
        kernel = choose(kernel, kernels(HOMES.get(kernel, "cpu"), q.dtype, q.shape[3]), "attention")
    scale, cache = q.shape[3] ** -0.5 if scale is None else scale, KeyValueCache(*cache)
    how = {"scale": float(scale), "rotary": rotary}
    if call.one and not call.fresh:
        return _step(q, k, v, cache, **how)
    if isinstance(q.shape[1], int) and q.shape[1] == 0:
        return q, cache
    positions = (call.mask, call.restart, call.order, call.inverse)
    return _attend(q, k, v, cache, *positions, fresh=call.fresh, kernel=kernel, **how)


def kernels(device: str, dtype=None, size: int | None = None) -> dict[str, str | None]:
    """Fastest first, for heads of so many components. The plain one runs on every device."""
    return {"cudnn": cudnn_attention.reason(device, dtype, size), "plain": None}


def trials(device: str):
    """Grouped heads and a padded row, in the dtypes that cuDNN takes."""
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 70, 4, 16), "k": (2, 70, 2, 16), "v": (2, 70, 2, 16)}
    mask = np.arange(70) >= np.array([[0], [9]])
    for dtype in ("bfloat16", "float16"):

        def call(kernel, *values):
            return (attention(*values, mask=jnp.asarray(mask), kernel=kernel),)

        def reference(values, cotangents):
            found = spec.attention_vjp(*cotangents, None, *values.values(), mask=mask)
            return (spec.attention(**values, mask=mask),), found

        arrays = {name: (rng.normal(size=shape), dtype) for name, shape in shapes.items()}
        yield Trial(f"{dtype}, padded", dtype, arrays, {"y": (shapes["q"], dtype)}, call, reference)


# --- one position ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("scale", "rotary"))
def _step(q, k, v, cache, *, scale, rotary):
    """One position that counts, after those of the cache."""
    filled, capacity, rows = cache.filled, cache.keys.shape[1], jnp.arange(q.shape[0])
    q, k = (_turned(value, filled[:, None], rotary) for value in (q, k))

    def written(old, new):
        return old.at[rows, filled].set(new[:, 0].astype(old.dtype), mode="drop")

    after = KeyValueCache(written(cache.keys, k), written(cache.values, v), filled + 1)
    seen = jnp.arange(capacity) <= filled[:, None]
    y = _weighted(q, after.keys.astype(k.dtype), after.values.astype(v.dtype), seen[:, None], scale)
    return _with_room(y, filled[:, None], capacity), after


# --- many positions --------------------------------------------------------------------------------


class _Sight(NamedTuple):
    """What a query sees: keys that are no later, and of its own sequence.

    past: how many keys are from before the first query. of_queries (b, t), of_keys (b, s): the sequences' numbers, -1
    for what nobody sees; None where all are of one.
    """

    past: int
    of_queries: jax.Array | None
    of_keys: jax.Array | None


@functools.partial(jax.jit, static_argnames=("fresh", "kernel", "scale", "rotary"))
def _attend(q, k, v, cache, mask, restart, order, inverse, *, fresh, kernel, scale, rotary):
    (batch, length), dtype = q.shape[:2], q.dtype
    count = jnp.full(batch, length) if mask is None else mask.sum(1)
    if mask is not None:
        q, k, v = (_taken(where_counting(mask, value), order) for value in (q, k, v))
        restart = None if restart is None else jnp.take_along_axis(restart, order, axis=1)
    filled = jnp.zeros_like(cache.filled) if fresh else cache.filled
    sequence, place = _places(length, restart, filled)
    q, k = (_turned(value, place, rotary) for value in (q, k))
    sight, keys, values = _sight(k, v, None if fresh else cache, sequence)
    y = _seen(q, keys, values, sight, kernel, scale).astype(dtype)
    if not fresh:
        # A sequence that ends in the call needs none.
        of_last = True if sequence is None else sequence == sequence[:, -1:]
        y = _with_room(y, jnp.where(of_last, place, 0), cache.keys.shape[1])
    if mask is not None:
        y = where_counting(mask, _taken(y, inverse))
    return y, _cache_after(cache, k, v, count, sequence, place, filled, fresh)


def _taken(value, order):
    return jnp.take_along_axis(value, order[..., None, None], axis=1)


def _places(length, restart, filled):
    """(how many restarts there were, or None where there are none; the place in the sequence), (b, l) each."""
    index = jnp.arange(length)
    if restart is None:
        return None, filled[:, None] + index
    sequence = jnp.cumsum(restart, axis=1)
    begun = lax.cummax(jnp.where(restart, index, 0), axis=1)
    return sequence, jnp.where(sequence == 0, filled[:, None], 0) + index - begun


def _sight(k, v, cache, sequence):
    """(what a query sees, keys, values), those of the cache first."""
    if cache is None:
        return _Sight(0, sequence, sequence), k, v
    keys, values = (
        jnp.concatenate([old.astype(new.dtype), new], axis=1)
        for old, new in zip((cache.keys, cache.values), (k, v), strict=True)
    )
    capacity = cache.keys.shape[1]
    sequence = jnp.zeros(k.shape[:2], int) if sequence is None else sequence
    of_cache = jnp.where(jnp.arange(capacity) < cache.filled[:, None], 0, -1)
    return _Sight(capacity, sequence, jnp.concatenate([of_cache, sequence], axis=1)), keys, values


def _cache_after(cache, k, v, count, sequence, place, filled, fresh):
    """The cache with the positions of each row's last sequence, which alone are in it."""
    length = k.shape[1]
    index = jnp.arange(length)
    counts = index < count[:, None]
    last = jnp.take_along_axis(place, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    after = jnp.where(count > 0, last + 1, filled).astype(cache.filled.dtype)
    if fresh and sequence is None:
        keys, values = (_padded(where_counting(counts, new), old) for old, new in ((cache.keys, k), (cache.values, v)))
        return KeyValueCache(keys, values, after)
    begun = None
    if sequence is not None:
        of_last = jnp.where(counts, sequence, 0).max(1)
        begun, counts = of_last == 0, counts & (sequence == of_last[:, None])
    rows, capacity = jnp.arange(len(count))[:, None], max(cache.keys.shape[1], length if fresh else 0)
    to = jnp.where(counts, place, capacity)  # what is not kept is written behind the end, and dropped

    def written(old, new):
        old = jnp.zeros((old.shape[0], capacity, *old.shape[2:]), old.dtype) if fresh else old
        old = old if begun is None or fresh else jnp.where(begun[:, None, None, None], old, 0)
        return old.at[rows, to].set(new.astype(old.dtype), mode="drop")

    return KeyValueCache(written(cache.keys, k), written(cache.values, v), after)


def _padded(new, old):
    """The positions as a cache of the old capacity, or if they are more, or of any number, as many as they are."""
    new, capacity = new.astype(old.dtype), old.shape[1]
    if not isinstance(new.shape[1], int) or new.shape[1] >= capacity:
        return new
    return jnp.pad(new, ((0, 0), (0, capacity - new.shape[1]), (0, 0), (0, 0)))


def _with_room(y, place, capacity):
    """y (b, t, h, p), NaN at places that the cache does not have: their keys and values are lost."""
    return jnp.where((place < capacity)[..., None, None], y, jnp.nan)


def _turned(value, place, rotary):
    """(b, l, h, p) turned by its place (b, l), in float32."""
    size, base, interleaved = rotary
    if size == 0:
        return value
    wide = jnp.promote_types(value.dtype, jnp.float32)
    angle = place[..., None, None].astype(wide) * base ** (-jnp.arange(0, size, 2, dtype=wide) / size)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turning, rest = value[..., :size].astype(wide), value[..., size:]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    parts = (first * cos - second * sin, first * sin + second * cos)
    joined = jnp.stack(parts, axis=-1).reshape(turning.shape) if interleaved else jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([joined.astype(value.dtype), rest], axis=-1)


# --- the products ----------------------------------------------------------------------------------


def _seen(q, k, v, sight, kernel, scale):
    """y (b, t, h, p) of all queries, by that kernel."""
    plain = functools.partial(_in_blocks, sight=sight, scale=scale)
    is_causal = sight.past == 0 and sight.of_keys is None
    if kernel == "auto":
        fastest = choose("auto", kernels("gpu", q.dtype, q.shape[3]), "attention", "jax", "gpu") if is_causal else None
        if fastest != "cudnn":
            return plain(q, k, v)
        return lax.platform_dependent(
            q, k, v, cuda=functools.partial(cudnn_attention.causal, scale=scale), default=plain
        )
    # The kernel computes causal attention of whole rows only.
    return cudnn_attention.causal(q, k, v, scale=scale) if kernel == "cudnn" and is_causal else plain(q, k, v)


def _in_blocks(q, k, v, *, sight, scale):
    """In blocks of the queries where the scores of all of them are many. A gradient computes those again."""
    batch, length, heads, _ = q.shape
    sizes = (batch, length, k.shape[1])
    # An exported program may be for any length.
    if (
        not all(isinstance(size, int) for size in sizes)
        or (rows := SCORE_BYTES // (4 * heads * batch * sizes[2])) >= length
    ):
        return _weighted(q, k, v, _allowed(jnp.arange(length), sight.of_queries, sight, k.shape[1]), scale)
    rows, stretch = max(FEWEST, rows), -(-length // STRETCHES)
    found = []
    for start in range(0, length, stretch):
        stop = min(start + stretch, length)
        upto = sight.past + stop
        of_keys = None if sight.of_keys is None else sight.of_keys[:, :upto]
        found.append(_mapped(q, k[:, :upto], v[:, :upto], sight._replace(of_keys=of_keys), scale, start, stop, rows))
    return jnp.concatenate(found, axis=1)


def _mapped(q, k, v, sight, scale, start, stop, rows):
    """The queries from start to stop, so many after the other."""
    count = -(-(stop - start) // rows)

    def blocks(value):
        """(count, b, rows, ...)."""
        part = value[:, start:stop]
        part = jnp.pad(part, [(0, count * rows - part.shape[1] if axis == 1 else 0) for axis in range(value.ndim)])
        return jnp.moveaxis(part.reshape(part.shape[0], count, rows, *part.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(parts):
        first, q, of_queries = parts
        return _weighted(q, k, v, _allowed(first + jnp.arange(rows), of_queries, sight, k.shape[1]), scale)

    of_queries = None if sight.of_queries is None else blocks(sight.of_queries)
    y = lax.map(block, (start + rows * jnp.arange(count), blocks(q), of_queries))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape[0], count * rows, *y.shape[3:])[:, : stop - start]


def _allowed(at, of_queries, sight, keys):
    """(1 or b, t, s) bool: which keys the queries at these positions see."""
    earlier = (jnp.arange(keys) - sight.past <= at[:, None])[None]
    return earlier if sight.of_keys is None else earlier & (sight.of_keys[:, None] == of_queries[..., None])


def _weighted(q, k, v, allowed, scale):
    """y (b, t, h, p) of all keys that are allowed, (1 or b, t, s); scores and softmax at least in float32."""
    batch, length, heads, size = q.shape
    groups, wide = k.shape[2], jnp.promote_types(q.dtype, jnp.float32)
    how = {"precision": precision(str(q.dtype)), "preferred_element_type": wide}
    q = q.reshape(batch, length, groups, heads // groups, size)
    scores = scale * jnp.einsum("btgrp,bsgp->bgrts", q, k, **how)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, -jnp.inf), axis=-1)
    y = jnp.einsum("bgrts,bsgp->btgrp", weights.astype(v.dtype), v, **how)
    return y.reshape(batch, length, heads, v.shape[3]).astype(v.dtype)


KERNELS = {"cudnn": cudnn_attention.causal, "plain": _in_blocks}
HOMES = {"cudnn": "gpu"}
