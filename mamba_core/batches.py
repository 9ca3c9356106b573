"""What is trained on, as a run sees it: tokens, of which windows are the batches, or examples with targets.

A batch depends on the seed and the number of the step alone.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mamba_core import runs, tasks
from mamba_core.evaluation import HeldOut, HeldOutExamples
from mamba_core.spec.init import random_stream


def batch(data: np.ndarray, settings: Any, step: int) -> np.ndarray:
    """(batch_size, length + 1) int32: windows of the data at places drawn for this step."""
    windows = len(data) - settings.length
    starts = random_stream(settings.seed, f"batch.{step}").integers(0, windows, settings.batch_size)
    return np.stack([data[start : start + settings.length + 1] for start in starts]).astype(np.int32)


def read(name: str, data: Any, config: Any) -> "Tokens | Examples":
    """The data of a model's task, checked.

    name: of the data, for errors.

    Raises:
        TypeError, ValueError: it does not fit the model.
    """
    return Examples.read(name, data, config) if tasks.of(config).labelled else Tokens.read(name, data, config)


@dataclass(frozen=True)
class Tokens:
    """array: (tokens,) ints."""

    unit: ClassVar[str] = "tokens"
    array: np.ndarray

    @classmethod
    def read(cls, name: str, data: Any, config: Any) -> "Tokens":
        data = np.asanyarray(data)
        if data.ndim != 1 or data.dtype.kind not in "iu":
            raise ValueError(f"{name} is {data.dtype} of shape {data.shape}; expected one axis of integers")
        if data.size and not (int(data.min()) >= 0 and int(data.max()) < config.vocab_size):
            raise ValueError(f"{name} holds tokens {data.min()} to {data.max()}; vocab_size is {config.vocab_size}")
        return cls(data)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.array[part])

    def check_size(self, name: str, settings: Any) -> None:
        """Raises ValueError where there are too few for a window."""
        if len(self) <= settings.length:
            raise ValueError(f"{name} has {len(self)} tokens; expected more than length={settings.length}")

    def batch(self, settings: Any, step: int) -> np.ndarray:
        return batch(self.array, settings, step)

    def held_out(self, settings: Any, every: int) -> HeldOut:
        return HeldOut(self.array, settings.length, settings.batch_size, settings.steps, every)

    def digest(self) -> str:
        return runs.digest(self.array)


@dataclass(frozen=True)
class Prepared:
    """An array of which a batch at a time is computed of a smaller one, where it is taken as an array of NumPy.

    Attributes:
        stored: the smaller one, with the examples on its first axis.
        prepare: of some of them.
    """

    stored: np.ndarray
    prepare: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, part: Any) -> "Prepared":
        return Prepared(self.stored[part], self.prepare)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.prepare(self.stored), dtype)


@dataclass(frozen=True)
class Examples:
    """arrays: those of a batch as `Task.checked_batch` gives it, of all examples. config: of the model.

    Where one is `Prepared`, the first example alone has been checked, and the others are with their batch.
    """

    unit: ClassVar[str] = "examples"
    arrays: Mapping[str, Any]
    config: Any

    @classmethod
    def read(cls, name: str, data: Any, config: Any) -> "Examples":
        prepared = isinstance(data, Mapping) and any(isinstance(value, Prepared) for value in data.values())
        try:
            if prepared:
                tasks.of(config).checked_batch(config, {name: value[:1] for name, value in data.items()})
                return cls(data, config)
            return cls(tasks.of(config).checked_batch(config, data), config)
        except (TypeError, ValueError) as fault:
            raise type(fault)(f"{name}, of which batches are made: {fault}") from None

    def __len__(self) -> int:
        return len(self.arrays["inputs"])

    def __getitem__(self, part: Any) -> "Examples":
        return Examples({name: array[part] for name, array in self.arrays.items()}, self.config)

    def check_size(self, name: str, settings: Any) -> None:
        """Raises ValueError where there is none."""
        if not len(self):
            raise ValueError(f"{name} has no examples; expected one at least")

    def batch(self, settings: Any, step: int) -> dict[str, np.ndarray]:
        """batch_size examples. Every example comes once before one comes again; each round has an order of its own."""
        at = step * settings.batch_size + np.arange(settings.batch_size)
        rounds, places = np.divmod(at, len(self))
        orders = (_order(settings.seed, int(number), len(self)) for number in rounds)
        rows = [order[place] for order, place in zip(orders, places, strict=True)]
        return {name: array[rows] for name, array in self.arrays.items()}

    def held_out(self, settings: Any, every: int) -> HeldOut:
        task = tasks.of(self.config)

        def weight(arrays: Mapping[str, np.ndarray]) -> float:
            return task.weight(self.config, arrays["targets"], arrays.get("mask"))

        return HeldOutExamples(self.arrays, 0, settings.batch_size, settings.steps, every, weight)

    def digest(self) -> str:
        return digest(self.arrays)


def digest(arrays: Mapping[str, Any]) -> str:
    """Of arrays by name."""
    found = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        array = value.stored if isinstance(value, Prepared) else value
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


@functools.lru_cache(maxsize=2)
def _order(seed: int, number: int, count: int) -> np.ndarray:
    return random_stream(seed, f"order.{number}").permutation(count)
