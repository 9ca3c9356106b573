"""Where a packed or padded sequence restarts, and the order that brings its counting positions together."""

import torch
from torch import Tensor


def restarts(mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """(b, l) bool: this position counts and its segment is not that of the last position that counted."""
    if segment_ids is None:
        return None
    if mask is None:
        return _differs_from_previous(segment_ids)
    # Among the counting positions alone, brought together, the last that counted is the neighbour.
    order, inverse = compaction(mask)
    return _differs_from_previous(segment_ids.gather(1, order)).gather(1, inverse) & mask


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(order, inverse), (b, l) each: values.gather(1, order) has the counting positions first, in their order."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def where_counting(mask: Tensor | None, value: Tensor | None) -> Tensor | None:
    """(b, l, channels), zero where masked: what stands there may be NaN, and 0 * NaN is not 0."""
    return value if mask is None or value is None else torch.where(mask[..., None], value, 0.0)


def _differs_from_previous(segment_ids: Tensor) -> Tensor:
    differs = torch.zeros_like(segment_ids, dtype=torch.bool)
    differs[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return differs
