"""What `positions` times, in a process that answers on standard output.

    python -m mamba_core.benchmarks.positioned BACKEND SIZES

SIZES is JSON, the fields of `Sizes`. For each line "WORK KIND" of standard input it makes two calls and answers with
the seconds that the second took. Runs on other commits too, so it keeps to what a user may call.
"""

import json
import os
import sys
import time
from dataclasses import dataclass

import numpy as np

import mamba_core as mc
from mamba_core import registry
from mamba_core.benchmarks import calls

WORKS = ("forward", "training")
KINDS = ("plain", "masked", "packed")


@dataclass(frozen=True)
class Sizes:
    """Of the model and of its input. Defaults: as many layers as mamba-130m, a sixth as wide."""

    layers: int = 24
    width: int = 128
    batch: int = 4
    length: int = 128


def main() -> None:
    # Frameworks may print: what they do goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    timed = Timed(sys.argv[1], Sizes(**json.loads(sys.argv[2])))
    for line in sys.stdin:
        print(timed.seconds(*line.split()), file=answers, flush=True)


class Timed:
    """A model without a head, and its inputs."""

    def __init__(self, name: str, sizes: Sizes):
        config = mc.MambaConfig(d_model=sizes.width, n_layer=sizes.layers, vocab_size=1000, task="features")
        model, backend = mc.build(config, backend=name, device="cpu"), registry.get(name)
        self.forward, self.gradients = calls.forward(model), calls.gradients(model)
        rng, shape = np.random.default_rng(0), (sizes.batch, sizes.length)
        self.ids = backend.from_numpy(rng.integers(0, 1000, shape).astype(np.int32), device="cpu")
        self.dy = backend.from_numpy(rng.normal(size=(*shape, sizes.width)).astype(np.float32), device="cpu")
        where = {"plain": (None, None), "masked": (padded(*shape), None), "packed": (None, packed(*shape))}
        self.where = {
            kind: [None if value is None else backend.from_numpy(value, device="cpu") for value in values]
            for kind, values in where.items()
        }

    def call(self, work: str, kind: str) -> None:
        if work == "forward":
            self.forward(self.ids, None, *self.where[kind])
        else:
            self.gradients(self.ids, self.dy, *self.where[kind])

    def seconds(self, work: str, kind: str) -> float:
        self.call(work, kind)
        began = time.perf_counter()
        self.call(work, kind)
        return time.perf_counter() - began


def padded(batch: int, length: int) -> np.ndarray:
    """A mask of rows from half the length to all of it, padded on the right."""
    return np.arange(length) < np.linspace(length // 2, length, batch).astype(int)[:, None]


def packed(batch: int, length: int) -> np.ndarray:
    """Segments of an eighth of the length, which begin elsewhere in each row."""
    at = np.arange(length) + np.arange(batch)[:, None]
    return (at // max(1, length // 8)).astype(np.int32)


if __name__ == "__main__":
    main()
