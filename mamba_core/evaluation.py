"""The loss on held-out data: its batches, when it is computed, and its mean.

Of tokens the batches are of windows, as long as those of training: token k of it is predicted from the k tokens before
it. The windows stand side by side. The last one ends with the data and reaches back into the one before it, where it
counts nothing twice, so that every token but the first is predicted once, and all windows have the same shape.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ENTRY = "held_out_loss"


@dataclass(frozen=True)
class HeldOut:
    """Data that is never trained on.

    Attributes:
        data: (tokens,) ints, more than `length` of them.
        length, batch_size, steps: of the run.
        every: updates from one evaluation to the next; 0 for the end of the run only.
    """

    data: np.ndarray
    length: int
    batch_size: int
    steps: int
    every: int

    def due(self, done: int) -> bool:
        """Whether there is an evaluation after that many updates."""
        return done == self.steps or (self.every > 0 and done % self.every == 0)

    def loss(
        self, trainer: Any, stop: Callable[[], bool], progress: Callable[[int, int], None] | None = None
    ) -> float | None:
        """The mean loss over all that counts, summed in float64; None where `stop` says so.

        Of tokens it is the cross-entropy of all but the first.

        stop: asked before every batch. progress: called with the number of batches done and of all.
        """
        total, batches = 0.0, -(-self._windows // self.batch_size)
        for done, (batch, factor) in enumerate(self._parts()):
            if progress:
                progress(done, batches)
            if stop():
                return None
            total += factor * trainer.evaluate(*batch) if factor else 0.0
        if progress:
            progress(batches, batches)
        return total / self._whole

    def _parts(self) -> Iterator[tuple[tuple, float]]:
        """(what the trainer evaluates, what its result is multiplied by) of each batch."""
        return ((batch, 1.0) for batch in self.batches())

    @property
    def _whole(self) -> float:
        """What the sum is divided by."""
        return len(self.data) - 1

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(batch_size, length + 1) int32 tokens and (batch_size, length) bool: which of tokens[:, 1:] count.

        The last batch is filled up with windows that count nothing.
        """
        last = len(self.data) - 1 - self.length
        for first in range(0, self._windows, self.batch_size):
            rows = np.arange(first, first + self.batch_size)
            starts = np.minimum(rows * self.length, last)
            # Targets before rows * length were counted by the window before it; beyond the last row all were.
            counts = starts[:, None] + np.arange(self.length) >= (rows * self.length)[:, None]
            tokens = np.stack([self.data[start : start + self.length + 1] for start in starts])
            yield tokens.astype(np.int32), counts

    @property
    def _windows(self) -> int:
        return -(-(len(self.data) - 1) // self.length)


@dataclass(frozen=True)
class HeldOutExamples(HeldOut):
    """Examples of a labelled task; the last batch is smaller.

    Attributes:
        data: arrays by name, as `mamba_core.tasks.base.Task.checked_batch` gives them; length is not used.
        weight: arrays -> what their loss is a mean over.
    """

    data: Any
    weight: Callable[[Mapping[str, np.ndarray]], float]

    def _parts(self) -> Iterator[tuple[tuple, float]]:
        for first in range(0, self._windows, self.batch_size):
            rows = {name: array[first : first + self.batch_size] for name, array in self.data.items()}
            yield (rows,), self.weight(rows)

    @property
    def _whole(self) -> float:
        return self.weight(self.data)

    def outputs(
        self, trainer: Any, stop: Callable[[], bool], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray | None:
        """What the model gives for the examples, in their order; None where `stop` says so. Arguments as of `loss`."""
        parts, batches = [], -(-self._windows // self.batch_size)
        for done, ((rows,), _) in enumerate(self._parts()):
            if progress:
                progress(done, batches)
            if stop():
                return None
            parts.append(trainer.predict(rows))
        if progress:
            progress(batches, batches)
        return np.concatenate(parts)

    @property
    def _windows(self) -> int:
        return len(self.data["inputs"])


def tenth(steps: int) -> int:
    """Updates between evaluations where nobody says: ten in a run, or one after each update of a shorter one."""
    return math.ceil(steps / 10)


def tokens_apart(fraction: float, tokens: int) -> int:
    """How many tokens at the end of the data that fraction holds out.

    Raises:
        ValueError: the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"held_out is {fraction!r}; expected an array of tokens, or a fraction of the data, between 0 and 1"
        )
    return round(fraction * tokens)
