"""What a file of this folder is made of: how the data of a task is read, measured and drawn.

A file has the name of its task, is found by it, and exports

    DATA: str                              what its files are, for people
    OPTIONS: tuple[Option, ...]            its own settings
    HELD_OUT: float | None                 the fraction that is held out where nobody says
    TEXTS: bool                            whether a tokenizer has a part in it
    read(source: Source) -> Data

and where a checkpoint's data has a use beyond training

    CLASSIFIED: str                        what is classified, in one word
    classify(model, paths, texts, top) -> list[tuple[str, list[Guess]]]     see `mamba_core.cli.classify`
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core import registry
from mamba_core.batches import digest
from mamba_core.wrappers import unwrap

# Of a config's `extra`: how the data was read with which a model was trained.
RECORD = "mamba_core_data"
# Of the data where nothing else is said.
FRACTION = 0.2


class Option(NamedTuple):
    """A setting of how data is read: the keyword `name` of `mamba_core.datasets.read`, `--name` of the command line.

    type: of one value. several: whether there may be more than one.
    """

    name: str
    help: str
    type: Callable[[str], Any] = str
    several: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Source:
    """What is to be read.

    Attributes:
        path: of the data.
        config: of the model, whose task is the file's.
        held_out: data that is never trained on: its path, the fraction of the data that is kept apart, or None.
        length: positions of an example.
        seed: of the division of the data.
        tokenizer: an object with `encode`, or None for bytes.
        options: those of the file, where they are given.
    """

    path: Path
    config: Any
    held_out: Path | float | None
    length: int
    seed: int
    tokenizer: Any
    options: Mapping[str, Any]

    def option(self, name: str) -> Any:
        """Its value, None where it is not given."""
        return self.options.get(name)


@dataclass
class Data:
    """What was read.

    Attributes:
        config: of the model that fits the data; its `extra` records how the data was read.
        examples: what `mamba_core.train` takes as data.
        held_out: what it takes as held_out.
        facts: what there is to say of the data, by name: numbers, texts and lists.
        baseline: the metrics of a forecaster that looks at nothing, by name; {} where there is none.
    """

    config: Any
    examples: Any
    held_out: Any
    facts: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)

    def metrics(self, outputs: np.ndarray) -> dict[str, float]:
        """Of a model's outputs for the held-out examples, in their order."""
        return {}

    @property
    def measures(self) -> bool:
        """Whether there are metrics."""
        return self.held_out is not None and type(self).metrics is not Data.metrics

    def draw(self, model: Any, folder: Path) -> list[Path]:
        """Draw what a trained model gives for the held-out data, into files that are named."""
        return []


def recorded(source: Source, config: Any, held_out: Any, record: Mapping[str, Any]) -> Any:
    """The config with a record of how the data was read.

    held_out: the examples, or None. record: what else there is to say; in JSON's types.
    """
    fraction = source.held_out if isinstance(source.held_out, float) else None
    kept: dict[str, Any] = {"length": source.length, "seed": source.seed, "held_out_fraction": fraction}
    kept["held_out_digest"] = None if held_out is None else digest(held_out)
    return with_extra(config, {RECORD: json.loads(json.dumps(kept | dict(record)))})


def with_extra(config: Any, extra: Mapping[str, Any]) -> Any:
    """The config with these fields of a checkpoint's config beside its own."""
    return dataclasses.replace(config, extra={**config.extra, **extra})


def record_of(config: Any) -> dict[str, Any] | None:
    """How the data of a config's model was read; None where nothing is said."""
    found = config.extra.get(RECORD)
    return dict(found) if isinstance(found, Mapping) else None


def taken(arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the examples."""
    return {name: array[rows] for name, array in arrays.items()}


def predicted(model: Any, arrays: Mapping[str, np.ndarray], batch_size: int = 32) -> np.ndarray:
    """What a model gives for examples, in their order, as NumPy: the first field of its output."""
    model = unwrap(model, "its outputs")
    backend, parts = registry.get(model.backend), []
    for first in range(0, len(arrays["inputs"]), batch_size):
        rows = {name: array[first : first + batch_size] for name, array in arrays.items() if name != "targets"}
        parts.append(backend.to_numpy(backend.infer(model, np.asarray(rows.pop("inputs")), **rows)[0]))
    return np.concatenate(parts)
