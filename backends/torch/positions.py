"""The facts of a call: where a packed sequence restarts, and the order that brings counting positions together."""

import torch
from torch import Tensor

from mamba_core.call import Call
from mamba_core.observe import Report, unobserved


def call_of(
    mask: Tensor | None,
    segment_ids: Tensor | None,
    *,
    length: int,
    observe: Report = unobserved,
    last: bool = False,
    in_place: bool = False,
    fresh: bool = False,
    routers: list[Tensor] | None = None,
    both: bool = False,
) -> Call:
    """The facts that all layers of a call share, computed once.

    length: of the call's inputs. both: of the reverse direction too.
    """
    order, inverse = (None, None) if mask is None else compaction(mask)
    restart = _restarts(mask, segment_ids, order, inverse)
    one = length == 1 and mask is None
    reverse = _reverse(mask, segment_ids, length) if both else None
    return Call(mask, segment_ids, restart, order, inverse, one, last, observe, in_place, fresh, routers, reverse)


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(order, inverse), (b, l) each: values.gather(1, order) has the counting positions first, in their order."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def where_counting(mask: Tensor | None, value: Tensor | None) -> Tensor | None:
    """(b, l, ...), zero where masked: a masked value may be NaN, and 0 * NaN is not 0."""
    if mask is None or value is None:
        return value
    return torch.where(mask.reshape(*mask.shape, *(1,) * (value.ndim - 2)), value, 0.0)


def _restarts(mask, segment_ids, order, inverse) -> Tensor | None:
    """(b, l) bool: this position counts, and its segment is not that of the last position that counted."""
    if segment_ids is None:
        return None
    if mask is None:
        return _differs_from_previous(segment_ids)
    # Once the counting positions stand together, the neighbour is the last position that counted.
    return _differs_from_previous(segment_ids.gather(1, order)).gather(1, inverse) & mask


def _differs_from_previous(segment_ids: Tensor) -> Tensor:
    differs = torch.zeros_like(segment_ids, dtype=torch.bool)
    differs[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return differs


def _reverse(mask, segment_ids, length) -> Call | None:
    """The facts of the positions in reverse order; None where all count and are of one sequence."""
    if mask is None and segment_ids is None:
        return None
    mask, segment_ids = (None if value is None else value.flip(1) for value in (mask, segment_ids))
    return call_of(mask, segment_ids, length=length)
