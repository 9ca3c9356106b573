"""Which positions count and where a segment begins: `Call`, from `mask` and `segment_ids`."""

import mlx.core as mx

from mamba_core.call import Call
from mamba_core.observe import Report, unobserved


def call_of(
    mask: mx.array | None,
    segment_ids: mx.array | None,
    *,
    length: int,
    observe: Report = unobserved,
    last: bool = False,
    in_place: bool = False,
    fresh: bool = False,
    routers: list[mx.array] | None = None,
    both: bool = False,
) -> Call:
    """The facts of a call of `length` positions, computed once for all layers. both: of the reverse direction too."""
    restart = _restarts(mask, segment_ids)
    order, inverse = (None, None) if mask is None else compaction(mask)
    one = length == 1 and mask is None
    reverse = _reverse(mask, segment_ids, length) if both else None
    return Call(mask, segment_ids, restart, order, inverse, one, last, observe, in_place, fresh, routers, reverse)


def compaction(mask: mx.array) -> tuple[mx.array, mx.array]:
    """(order, inverse), both (b, l): row[order] has the counting positions first, row[order][inverse] is row."""
    counting = mask.astype(mx.int32)
    rank = mx.cumsum(counting, axis=1) - 1
    rank_of_others = counting.sum(axis=1, keepdims=True) + mx.cumsum(1 - counting, axis=1) - 1
    inverse = mx.where(mask, rank, rank_of_others)
    return mx.argsort(inverse, axis=1), inverse


def where_counting(mask: mx.array | None, value: mx.array | None) -> mx.array | None:
    """(b, l, ...), zero where masked: a masked value may be NaN, and 0 * NaN is not 0."""
    if mask is None or value is None:
        return value
    return mx.where(mask.reshape(*mask.shape, *(1,) * (value.ndim - 2)), value, mx.array(0, value.dtype))


def _restarts(mask: mx.array | None, segment_ids: mx.array | None) -> mx.array | None:
    """(b, l) bool: the position counts, and its segment is another than that of the counting position before it."""
    if segment_ids is None:
        return None
    batch, length = segment_ids.shape
    position = mx.arange(length)
    last = mx.broadcast_to(position if mask is None else mx.where(mask, position, -1), (batch, length))
    last = mx.cummax(last, axis=1)
    before = mx.concatenate([mx.full((batch, 1), -1, dtype=last.dtype), last[:, :-1]], axis=1)
    previous = mx.take_along_axis(segment_ids, mx.maximum(before, 0), axis=1)
    restart = (before >= 0) & (segment_ids != previous)
    return restart if mask is None else restart & mask


def _reverse(mask, segment_ids, length) -> Call | None:
    """The facts of the positions in reverse order; None where all count and are of one sequence."""
    if mask is None and segment_ids is None:
        return None
    mask, segment_ids = (None if value is None else value[:, ::-1] for value in (mask, segment_ids))
    return call_of(mask, segment_ids, length=length)
