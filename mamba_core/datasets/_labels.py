"""Labels of examples: their names, the division that keeps their shares, and how well they are found."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mamba_core import tasks
from mamba_core.datasets._tables import Table
from mamba_core.datasets.base import Data, Option, Source, recorded, taken
from mamba_core.spec.init import random_stream
from mamba_core.spec.losses import IGNORED
from mamba_core.weights.formats import list_names

LABEL = Option("label_column", "the column of labels; by default label, labels, class, category or target")
USUAL = ("label", "labels", "class", "category", "target")
MAJORITY = "majority_"  # before the name of a metric: of the commonest label for everything


class Labelled(Data):
    """Its outputs are logits of labels, on the last axis."""

    def metrics(self, outputs: np.ndarray) -> dict[str, float]:
        targets = self.held_out["targets"]
        counts = targets != IGNORED
        return scores(targets[counts], outputs.argmax(-1)[counts])


def scores(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """accuracy, and macro_f1: the mean of the F1 of each label that is a target or is predicted. Both are (n,) ints."""
    labels = np.union1d(targets, predicted)
    right = [int(((targets == label) & (predicted == label)).sum()) for label in labels]
    counted = [int((targets == label).sum() + (predicted == label).sum()) for label in labels]
    f1 = [2 * hits / total for hits, total in zip(right, counted, strict=True)]
    return {"accuracy": float((targets == predicted).mean()), "macro_f1": float(np.mean(f1))}


def majority(trained: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """The scores on held-out targets of the label that is commonest in training."""
    commonest = np.bincount(trained).argmax()
    return {MAJORITY + name: value for name, value in scores(held_out, np.full_like(held_out, commonest)).items()}


def text_of(table: Table, index: int, column: str, value: Any) -> str:
    """A label as its name.

    Raises:
        ValueError: it is missing, or no text and no number.
    """
    if isinstance(value, (dict, list)) or value is None or str(value).strip() == "":
        shown = "missing" if value is None or value == "" else f"{value!r:.80}"
        raise ValueError(f"{table.at(index)}: {column} is {shown}; expected a label, a text or a number")
    return str(value).strip()


def ordered(found: set[str]) -> tuple[str, ...]:
    """Names of labels in their order: numbers by their value, others by the alphabet."""
    try:
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(found))


def names_of(source: Source, found: set[str], known: Sequence[str] | None, count: int | None) -> tuple[str, ...]:
    """The names of the labels in the order of the logits.

    known: those that the config has. count: how many it says that there are.

    Raises:
        ValueError: there is one label only, or the config has others.
    """
    if known is not None:
        if unknown := ordered(found - set(known)):
            raise ValueError(
                f"{source.path} has labels that the model has not: {list_names(unknown)}; it has {list_names(known)}. "
                "Leave those rows out, or begin with a config without labels (--new-head)"
            )
        return tuple(known)
    names = ordered(found)
    if len(names) < 2:
        raise ValueError(f"{source.path}: all rows have the label {names[0]!r}; expected two labels at least")
    if count is not None and count != len(names):
        raise ValueError(f"{source.path} has {len(names)} labels, {list_names(names)}; the config has {count}")
    return names


def numbers_of(source: Any, labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """(n,) int32. source: whose labels they are, for errors.

    Raises:
        ValueError: a label has no number, because training has none of it.
    """
    at = {name: number for number, name in enumerate(names)}
    if unseen := ordered(set(labels) - set(names)):
        raise ValueError(
            f"{source} has labels that are not in the data of training: {list_names(unseen)}; that has "
            f"{list_names(names)}. Leave those rows out, or add such rows to the data of training"
        )
    return np.array([at[label] for label in labels], np.int32)


def stratified(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(n,) bool: which examples are held out, of each label that fraction and never all of it.

    Raises:
        ValueError: these are none.
    """
    held = np.zeros(len(targets), bool)
    for label in np.unique(targets):
        rows = np.flatnonzero(targets == label)
        count = min(round(fraction * len(rows)), len(rows) - 1)
        held[random_stream(seed, f"held_out.{label}").permutation(rows)[:count]] = True
    if not held.any():
        raise ValueError(
            f"held_out is {fraction} of {len(targets)} examples, of no label one; give a larger fraction, more "
            "examples or a file of their own"
        )
    return held


def divided(
    source: Source,
    config: Any,
    examples: Mapping[str, np.ndarray],
    apart: Mapping[str, np.ndarray] | None,
    record: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Labelled:
    """Examples of one label each with what is held out of them, or the examples `apart`, and the record of both."""
    trained: Mapping[str, np.ndarray] = examples
    if apart is None and source.held_out:
        held = stratified(examples["targets"], float(source.held_out), source.seed)  # type: ignore[arg-type]
        trained, apart = taken(examples, ~held), taken(examples, held)
    return finished(source, config, trained, apart, record, facts)


def finished(
    source: Source,
    config: Any,
    trained: Mapping[str, np.ndarray],
    apart: Mapping[str, np.ndarray] | None,
    record: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> Labelled:
    held = None if apart is None else dict(apart)
    counted = {"examples": len(trained["targets"]), "held_out_examples": 0 if held is None else len(held["targets"])}
    baseline = {} if held is None else majority(*(counting(arrays) for arrays in (trained, held)))
    config = recorded(source, config, held, record)
    return Labelled(config, dict(trained), held, {**counted, **facts}, baseline)


def counting(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n,) the targets that count."""
    targets = arrays["targets"]
    return targets[targets != IGNORED]


def with_options(config: Any, **options: Any) -> Any:
    """The config with these task options beside its own."""
    return dataclasses.replace(config, task_options={**config.task_options, **options})


def with_labels(config: Any, names: tuple[str, ...]) -> Any:
    """The config with these names, which say how many there are."""
    options = {name: value for name, value in config.task_options.items() if name != "num_labels"}
    return dataclasses.replace(config, task_options={**options, "labels": names})


def labels_known(config: Any) -> tuple[tuple[str, ...] | None, int | None]:
    """The labels that a config names, and how many it says there are; None where it says nothing."""
    options = config.task_options
    return tasks.of(config).labels, options.get("num_labels")  # type: ignore[attr-defined]
