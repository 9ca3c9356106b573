"""The decode state: `mamba_core.backend.State` of torch tensors. Pickles, and moves with `torch.utils._pytree`."""

import torch
from torch import Tensor

from mamba_core.backend import Hidden, LayerState, Output, State
from mamba_core.backends.torch import private

# torch.export.save writes only the NamedTuples that are registered by name; torch.load reads only the safe ones.
for kind in (LayerState, State, Output, Hidden):
    private.register_namedtuple(kind, f"mamba_core.{kind.__name__}")
torch.serialization.add_safe_globals([LayerState, State])


def init_state(config, batch: int, dtype: torch.dtype, device: torch.device) -> State:
    """Before the first position: zeros."""
    conv = torch.zeros(batch, config.d_conv - 1, config.d_inner, dtype=dtype, device=device)
    ssm = torch.zeros(batch, config.d_inner, config.d_state, dtype=torch.float32, device=device)
    segment = torch.zeros(batch, dtype=torch.int32, device=device)
    return State((LayerState(conv, ssm),) * config.n_layer, segment)


def entering(state: State, mask: Tensor | None, segment_ids: Tensor | None) -> tuple:
    """The layers' states that the first position sees: zero in the rows that begin another segment."""
    if segment_ids is None or segment_ids.shape[1] == 0:
        return state.layers
    first, counts = _first_counting(mask, segment_ids)
    keep = ~counts | (first == state.segment)
    return tuple(type(layer)(*(_rows(keep, value) for value in layer)) for layer in state.layers)


def leaving(layers: tuple, state: State, mask: Tensor | None, segment_ids: Tensor | None) -> State:
    """The state after the last position, with the segment that it is in."""
    if segment_ids is None or segment_ids.shape[1] == 0:
        return State(layers, state.segment)
    flipped = None if mask is None else mask.flip(1)
    last, counts = _first_counting(flipped, segment_ids.flip(1))
    return State(layers, torch.where(counts, last, state.segment).to(torch.int32))


def _first_counting(mask, segment_ids) -> tuple[Tensor, Tensor]:
    """The segment of each row's first position that counts, and whether there is one."""
    if mask is None:
        return segment_ids[:, 0], torch.ones_like(segment_ids[:, 0], dtype=torch.bool)
    first = mask.to(torch.int32).argmax(1, keepdim=True)
    return segment_ids.gather(1, first)[:, 0], mask.any(1)


def _rows(keep, value):
    return torch.where(keep.view(-1, *(1,) * (value.ndim - 1)), value, 0.0)
