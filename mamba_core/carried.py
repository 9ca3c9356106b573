"""The decode state from outside: what it holds, how much room it has, and going back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np

from mamba_core import registry
from mamba_core.backend import State
from mamba_core.spec import state as states
from mamba_core.spec.checks import check_state
from mamba_core.wrappers import unwrap


class LayerInfo(NamedTuple):
    """What a layer carries.

    layer: its number. bytes: of each array, by name; "filled" is one of them where something grows.
    capacity: positions of each row that there is memory for; None where nothing grows.
    filled: positions of each row that are there; None where nothing grows.
    """

    layer: int
    bytes: dict[str, int]
    capacity: int | None
    filled: tuple[int, ...] | None

    @property
    def total(self) -> int:
        """Bytes of the layer."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class StateInfo:
    """What `state_info` found; as text it is a short table.

    Attributes:
        rows: of the batch.
        layers: one entry a layer.
        bytes: of all layers and of the segments.
    """

    rows: int
    layers: tuple[LayerInfo, ...]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "layers": [layer._asdict() for layer in self.layers]}

    def __str__(self) -> str:
        lines = [f"{self.rows} rows, {self.bytes:,} bytes"]
        for _, alike in groupby(self.layers, lambda layer: layer[1:]):
            first, *rest = alike
            where = f"layers {first.layer} to {rest[-1].layer}, each" if rest else f"layer {first.layer}"
            names = ", ".join(f"{name} {size:,}" for name, size in first.bytes.items()) or "nothing"
            lines.append(f"{where}: {first.total:,} bytes ({names})")
            if first.filled is not None:
                lines[-1] += f"; filled {', '.join(map(str, first.filled))} of {first.capacity:,}"
        return "\n".join(lines)


def state_info(model: Any, state: State) -> StateInfo:
    """Say how much memory a decode state takes, and how far what grows in it is filled.

    Args:
        model: whose state it is; may be wrapped by torch.compile, DistributedDataParallel, AveragedModel or PEFT.

    Raises:
        TypeError: the model is not of this library, or the state is no State of its backend.
        ValueError: it is the state of another config.
    """
    config, backend, _ = _checked(model, state, "describing its state")
    filled, capacities = states.filled(config, state, backend.to_numpy), states.capacities(config, state)
    layers = []
    for index, layer in enumerate(state.layers):
        bytes_ = {name: int(value.nbytes) for name, value in layer._asdict().items()}
        rows = tuple(filled[index].tolist()) if index in filled else None
        layers.append(LayerInfo(index, bytes_, capacities.get(index), rows))
    total = sum(layer.total for layer in layers) + int(state.segment.nbytes)
    return StateInfo(state.segment.shape[0], tuple(layers), total)


def room(model: Any, state: State) -> int | None:
    """How many positions can be added to every row of a decode state before its arrays must grow.

    None where nothing grows. `model.init_state(batch, room)` makes a state with room, and `grown` gives one more.

    Raises:
        TypeError, ValueError: as `state_info`; ValueError also for a state of a compiled program that dropped positions
            because it found no room.
    """
    config, backend, _ = _checked(model, state, "finding the room of its state")
    return states.room(config, state, backend.to_numpy)


def grown(model: Any, state: State, positions: int) -> State:
    """The same decode state with room for at least so many more positions in every row.

    A call outside of a compiled program makes room by itself. One inside cannot: where it finds none, its outputs are
    NaN. Shapes depend on the room, so that a program is compiled once for each.

    Raises:
        TypeError, ValueError: as `room`; also for a number of positions that is no integer from 0.
    """
    config, backend, device = _checked(model, state, "making room in its state")
    if type(positions) is not int or positions < 0:
        raise ValueError(f"positions is {positions!r}; expected an integer from 0")
    with backend.on_device(device):
        return backend.with_room(config, state, positions)


def rewind(model: Any, state: State, n: int | Sequence[int]) -> State:
    """The decode state that there was n positions ago.

    It equals that state, but for a capacity that may be larger. Only layers that keep what they have seen can go back:
    attention does; a recurrence and a convolution have forgotten, and a model with one is refused.

    Args:
        n: how many of the last positions that counted to take back, in all rows, or a number for each. They must be of
            the row's last sequence.

    Raises:
        TypeError, ValueError: as `state_info`; ValueError also for a model with a layer that forgets, and for an n that
            is no integer from 0, or more than a row has positions.
    """
    config, backend, device = _checked(model, state, "rewinding its state")
    for layer, field in states.table(config):
        if field.grows is None and field.name != states.FILLED:
            raise ValueError(
                f"layer {layer} carries {field.name}, which does not keep the positions that were and cannot go back; "
                "a state is a value: keep the one from before, and go on from that"
            )
    rows = state.segment.shape[0]
    given = n.tolist() if hasattr(n, "tolist") else n
    counts = [given] * rows if type(given) is int else given
    numbers = list(counts) if isinstance(counts, Sequence) else []
    if len(numbers) != rows or not all(type(count) is int and count >= 0 for count in numbers):
        raise ValueError(f"n is {n!r}; expected an integer from 0, or one for each of {rows} rows")
    kept = states.kept(config, state, np.array(numbers, np.int64), backend.to_numpy)
    with backend.on_device(device):
        return backend.cut(config, state, kept)


def _checked(model: Any, state: State, use: str) -> tuple[Any, Any, str]:
    """The config, the backend and the device of a model, whose state this is."""
    model = unwrap(model, use)
    check_kind(state, model)
    check_state(model.config, state.segment.shape[0], state)
    shapes = {name: tuple(value.shape) for name, value in states.named(state).items()}
    if faults := list(islice(states.faults(model.config, shapes), 8)):
        raise ValueError(f"state is not one of a model with this config: {'; '.join(faults)}")
    return model.config, registry.get(model.backend), model.device


def check_kind(state: Any, model: Any) -> None:
    """Check that a state is of arrays of the model's backend.

    Raises:
        TypeError: it is no State, or of other arrays.
    """
    if not isinstance(state, State):
        raise TypeError(f"state is {type(state).__name__}; expected a State, such as that of model(input_ids)")
    own = type(model.init_state(1).segment)
    for name, value in states.named(state).items():
        if not isinstance(value, own):
            given = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"state has {given} for {name}; expected arrays of the model's backend, {model.backend!r}")
