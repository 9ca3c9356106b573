"""The parameter table of a config: everything that is known of a parameter before it has a value.

Names are canonical (those of Hugging Face's MambaForCausalLM). The table's order is the order of the file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: canonical name.
        axes: the letter of each axis (`spec.dims`), for sharding rules and reports.
        shape: the size of each axis.
        init: draws the initial value from a generator, float32.
        float32: stored in float32 whatever the compute dtype.
        decay: weight decay applies.
        mup_role: "input", "hidden", "output" or "vector", what muP scales by.
        parts: the named parts that the first axis is joined of, with their sizes; () for one that is whole.
    """

    name: str
    axes: str
    shape: tuple[int, ...]
    init: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    float32: bool = False
    decay: bool = True
    mup_role: str = "vector"
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def dtype(self, compute: str) -> str:
        """The dtype it is stored in for a compute dtype."""
        return "float32" if self.float32 else compute


def parameter_table(config: Any) -> dict[str, Parameter]:
    """Every parameter of a model by canonical name, in order."""
    from mamba_core import architectures, tasks

    task = tasks.of(config)
    blocks = architectures.of(config).parameters(config)
    return {parameter.name: parameter for parameter in (*task.before(config), *blocks, *task.after(config))}


def parameter_count(config: Any) -> int:
    return sum(parameter.size for parameter in parameter_table(config).values())


class Values(Mapping[str, np.ndarray]):
    """The parameters of a model by canonical name, in the table's order, each made NumPy when it is asked for."""

    def __init__(self, config, read: Callable[[str], np.ndarray]):
        self._table = parameter_table(config)
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._table:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def checked(config, parameters: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[Parameter, np.ndarray]]:
    """The same values with their table entries.

    Raises:
        ValueError: when one is unknown, repeated or mis-shaped, and at the end when some are missing.
    """
    table = parameter_table(config)
    waiting = dict(table)
    for name, value in parameters:
        if name not in waiting:
            raise ValueError(f"parameter {name!r} is {'repeated' if name in table else 'not one of this config'}")
        parameter = waiting.pop(name)
        if tuple(value.shape) != parameter.shape:
            raise ValueError(f"parameter {name!r} has shape {tuple(value.shape)}; expected {parameter.shape}")
        yield parameter, value
    if waiting:
        raise ValueError(f"parameters missing: {', '.join(waiting)}")
