"""Attention on a CPU by NumPy, at once: MLX's own products are slow there, and it computes what no position sees.

Positions are computed some at a time, so that no array is as large as the square of the length. The gradient computes
the weights again. The plain twin is `ops.attention.plain`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mamba_core.backends.mlx.kernels.native_tensors import are_traced, view, zeros
from mamba_core.backends.mlx.kernels.numpy_linear import NUMPY_IS_FASTER
from mamba_core.backends.mlx.kernels.reverse_only import first_derivative_only, reverse_only

# Scores that are computed at once, so that they stay in the cache of the processor.
SCORES = 2**19


def reason(device: str, arrays=()) -> str | None:
    """Why NumPy cannot compute attention on that device; None if it can.

    arrays: those that are given, which are computed to see whether they can be.
    """
    if not NUMPY_IS_FASTER:
        return "MLX's own products are as fast on this system"
    if device != "cpu":
        return "it runs on a CPU only"
    if are_traced(arrays):
        return "it computes at once, and inside mx.compile and mx.vmap there is nothing to compute with"
    return None


def attention(call, q, k, v, cache, after, sequence: mx.array | None, scale: float) -> mx.array:
    """y (b, l, h, p) float32, with one derivative.

    cache, after: before and after the call. sequence: (b, l), how many restarts there were; None for none.
    """
    filled = np.minimum(np.array(cache.filled), cache.keys.shape[1])
    if call.one and not call.fresh:
        # The new position stands in its place already, unless it found none.
        counts = np.minimum(filled + 1, cache.keys.shape[1])
        parts = [_Part(row, np.arange(1), 0, slice(count)) for row, count in enumerate(counts)]
        given = [q, *(value[:, : counts.max()] for value in after[:2])]
    else:
        parts = list(_parts(call, filled, sequence, q.shape[:2]))
        # Of the cache what is filled, and of a new one nothing.
        most = max((part.past for part in parts), default=0)
        given = [q, k, v, *(value[:, :most] for value in cache[:2] if most)]
    return _computed(parts, [value.astype(mx.float32) for value in given], scale)


def _computed(parts, arrays, scale):
    """arrays: q, keys and values of the parts, and those of the cache that parts go on from."""

    @mx.custom_function
    def run(*arrays):
        y = zeros((*arrays[0].shape[:3], arrays[2].shape[3]))
        mx.eval(y, arrays)
        given, out = [view(value) for value in arrays], view(y)
        for part in parts:
            for block in _blocks(part, given, scale):
                out[part.row, block.at] = _ungrouped(block.weights @ block.values, len(block.at))
        return y

    @run.vjp
    def backward(arrays, dy, y):
        arrays = list(arrays)
        gradients = [zeros(value.shape) for value in arrays]
        mx.eval(gradients, arrays, dy)
        given, found = [view(value) for value in arrays], [view(value) for value in gradients]
        for part in parts:
            _add_gradients(part, given, found, view(dy), scale)
        return tuple(first_derivative_only(gradients, arrays, dy))

    reverse_only(run)
    return run(*arrays)


class _Part(NamedTuple):
    """A sequence of a row. at: the positions that see. past: how many of the cache's they see, before their own keys
    and values, which stand at `own`."""

    row: int
    at: np.ndarray
    past: int
    own: np.ndarray | slice


class _Block(NamedTuple):
    """Some positions of a part. Heads that share keys and values are rows of one matrix.

    at: (t,) positions. q: (g, r t, p). weights: (g, r t, s). keys, values: (g, s, p), those up to the last position.
    """

    at: np.ndarray
    q: np.ndarray
    weights: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def _parts(call, filled, sequence, shape) -> Iterator[_Part]:
    rows, length = shape
    past = np.zeros_like(filled) if call.fresh else filled
    mask = None if call.mask is None else np.array(call.mask)
    numbers = None if sequence is None else np.array(sequence)
    for row in range(rows):
        counting = np.arange(length) if mask is None else np.flatnonzero(mask[row])
        if numbers is None:
            yield _Part(row, counting, int(past[row]), slice(length) if mask is None else counting)
            continue
        sequences = numbers[row, counting]
        for number in np.unique(sequences):
            at = counting[sequences == number]
            yield _Part(row, at, int(past[row]) if number == 0 else 0, at)


def _blocks(part: _Part, arrays, scale: float) -> Iterator[_Block]:
    q, *new = arrays[0][part.row, part.at], *(value[part.row, part.own] for value in arrays[1:3])
    old = [value[part.row, : part.past] for value in arrays[3:]]
    keys, values = (np.concatenate(pair) for pair in zip(old, new, strict=True)) if part.past else new
    keys, values = keys.swapaxes(0, 1), values.swapaxes(0, 1)
    past = keys.shape[1] - len(q)
    size = max(16, SCORES // max(1, q.shape[1] * keys.shape[1]))
    for first in range(0, len(q), size):
        last = min(first + size, len(q))
        seen, rows = past + last, _grouped(q[first:last], len(keys))
        weights = _softmax(rows @ keys[:, :seen].swapaxes(1, 2), scale, last - first)
        yield _Block(part.at[first:last], rows, weights, keys[:, :seen], values[:, :seen])


def _softmax(scores: np.ndarray, scale: float, count: int) -> np.ndarray:
    """Of the scaled scores (g, r t, s), in place; the last position sees all."""
    scores *= scale
    square = scores.reshape(len(scores), -1, count, scores.shape[-1])[..., scores.shape[-1] - count :]
    square[..., np.triu(np.ones((count, count), bool), 1)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _add_gradients(part: _Part, arrays, gradients, dy, scale: float) -> None:
    """Adds those of a part to the gradients of q, k, v and of the cache's keys and values."""
    dq, *new = gradients[:3]
    for block in _blocks(part, arrays, scale):
        dout = _grouped(dy[part.row, block.at], len(block.keys))
        dscores = dout @ block.values.swapaxes(1, 2)
        dscores -= (block.weights * dscores).sum(axis=-1, keepdims=True)
        dscores *= block.weights
        dscores *= scale
        dq[part.row, block.at] = _ungrouped(dscores @ block.keys, len(block.at))
        summed = dscores.swapaxes(1, 2) @ block.q, block.weights.swapaxes(1, 2) @ dout
        past = part.past
        for index, found in enumerate(summed):
            found = found.swapaxes(0, 1)
            at = np.arange(new[index].shape[1])[part.own][: len(found) - past]
            new[index][part.row, at] += found[past:]
            if past:
                gradients[3 + index][part.row, :past] += found[:past]


def _grouped(value: np.ndarray, groups: int) -> np.ndarray:
    """(t, h, p) as (g, r t, p)."""
    count, heads, size = value.shape
    apart = value.reshape(count, groups, heads // groups, size)
    return apart.transpose(1, 2, 0, 3).reshape(groups, -1, size)


def _ungrouped(value: np.ndarray, count: int) -> np.ndarray:
    """(g, r t, p) as (t, h, p)."""
    groups, _, size = value.shape
    return value.reshape(groups, -1, count, size).transpose(2, 0, 1, 3).reshape(count, -1, size)
