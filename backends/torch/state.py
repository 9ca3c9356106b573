"""The decode state: `mamba_core.backend.State` of torch tensors. Pickles, and moves with `torch.utils._pytree`."""

import torch
from torch import Tensor

from mamba_core.backend import Hidden, LayerState, Output, State
from mamba_core.backends.torch import private
from mamba_core.backends.torch.arrays import dtype_of, to_numpy
from mamba_core.call import Call
from mamba_core.spec import state as states

# torch.export.save writes only the NamedTuples that are registered by name; torch.load reads only the safe ones.
for kind in (State, Output, Hidden):
    private.register_namedtuple(kind, f"mamba_core.{kind.__name__}")
torch.serialization.add_safe_globals([State])


def register(kinds: tuple[type, ...]) -> None:
    """Makes the layers' NamedTuples known to torch: for trees, exported programs and pickles."""
    for kind in set(kinds) - _registered:
        private.register_namedtuple(kind, f"mamba_core.{kind.__name__}")
        torch.serialization.add_safe_globals([kind])
        _registered.add(kind)


_registered: set[type] = set()
register((LayerState,))


def init_state(config, batch: int, dtype: torch.dtype, device: torch.device, room: int = 0) -> State:
    """Before the first position: zeros; all floats in float64 where that is the compute dtype.

    room: how many positions a growing state has memory for.
    """

    def zeros(shape, kind):
        own = dtype if kind == "compute" or (kind == "float32" and dtype == torch.float64) else dtype_of(kind)
        return torch.zeros(shape, dtype=own, device=device)

    return states.initial(config, batch, zeros, room)


def room(config, state: State) -> int | None:
    """How many positions can be added before the state must grow; None where nothing grows."""
    return states.room(config, state, to_numpy)


def with_room(config, state: State, positions: int) -> State:
    """The state with room for so many more positions.

    A compiler does not know how many are filled: for it the state is left as it is.
    """
    if not states.grows(config) or torch.compiler.is_compiling():
        return state
    return states.with_room(config, state, positions, to_numpy, _padded)


def cut(config, state: State, kept: dict) -> State:
    """The state with so many positions of each row alone; kept: layer -> (b,) NumPy."""
    return states.cut(config, state, kept, lambda rows, like: torch.from_numpy(rows).to(like.device), _zero_behind)


def entering(state: State, call: Call) -> tuple:
    """The layers' states that the first position sees: zero in the rows that begin another segment."""
    mask, segment_ids = call.mask, call.segment_ids
    if segment_ids is None or segment_ids.shape[1] == 0:
        return state.layers
    first, counts = _first_counting(mask, segment_ids)
    keep = ~counts | (first == state.segment)
    return tuple(type(layer)(*(_rows(keep, value) for value in layer)) for layer in state.layers)


def leaving(layers: tuple, state: State, call: Call) -> State:
    """The state after the last position, with that position's segment."""
    mask, segment_ids = call.mask, call.segment_ids
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
    return torch.where(keep.view(-1, *(1,) * (value.ndim - 1)), value, value.new_zeros(()))


def _padded(value: Tensor, axis: int, count: int) -> Tensor:
    zeros = value.new_zeros(*value.shape[:axis], count, *value.shape[axis + 1 :])
    return torch.cat([value, zeros], dim=axis)


def _zero_behind(value: Tensor, axis: int, counts: Tensor) -> Tensor:
    stays = torch.arange(value.shape[axis], device=value.device) < counts[:, None]
    shape = [size if index in (0, axis) else 1 for index, size in enumerate(value.shape)]
    return torch.where(stays.view(shape), value, value.new_zeros(()))
