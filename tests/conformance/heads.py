"""The labelled tasks and those with one output a row, on every architecture: small models and batches of theirs."""

import dataclasses
import functools

import numpy as np

from mamba_core import tasks

from .cases import bases

BATCH, LENGTH = 4, 9
# All of it, padded on both sides, with holes, and nothing.
MASK = np.array([[1] * 9, [0, 0, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0, 1, 0, 0], [0] * 9], bool)
# Name -> task and options.
KINDS = {
    "the last hidden state": ("features", {"pooling": "last"}),
    "the first hidden state": ("features", {"pooling": "first"}),
    "classes": ("sequence_classification", {"labels": ["a", "b", "c"], "class_weights": [1.0, 2.0, 0.5]}),
    "several labels": (
        "sequence_classification",
        {"num_labels": 3, "problem_type": "multi_label", "pooling": "mean", "bias": True, "class_weights": [2, 1, 0.5]},
    ),
    "a number": ("sequence_classification", {"num_labels": 1, "pooling": "max"}),
    "a forecast": ("forecasting", {"channels": 2, "horizon": 3, "covariates": 1}),
    "quantiles": (
        "forecasting",
        {"channels": 2, "horizon": 2, "quantiles": [0.1, 0.5, 0.8], "instance_norm": True, "indicator": True},
    ),
    "tokens": ("token_classification", {"num_labels": 4, "class_weights": [1.0, 0.5, 2.0, 1.0]}),
}
# On every architecture: those that between them reach every part around the blocks. A head does not know the blocks.
OF_ALL = ("several labels", "quantiles", "tokens")
FIRST = "mamba"
PAIRS = [(name, kind) for name in bases() for kind in KINDS if name == FIRST or kind in OF_ALL]
LABELLED = [name for name, (task, _) in KINDS.items() if tasks.find(task).Task.labelled]


def config_of(architecture: str, kind: str):
    task, options = KINDS[kind]
    return dataclasses.replace(bases()[architecture], n_layer=1, task=task, task_options=options)


@functools.lru_cache(maxsize=64)
def batch_of(architecture: str, kind: str) -> dict[str, np.ndarray]:
    """inputs, mask, and where the task has them targets and extras."""
    config = config_of(architecture, kind)
    task, rng = tasks.of(config), np.random.default_rng(0)
    batch = {"inputs": task.draw(config, rng, BATCH, LENGTH), "mask": MASK}
    batch |= task.draw_extras(config, rng, BATCH, LENGTH)
    return batch | ({"targets": task.draw_targets(config, rng, BATCH, LENGTH)} if task.labelled else {})


def arguments(batch) -> dict[str, np.ndarray]:
    """What a model is called with beside its inputs."""
    return {name: value for name, value in batch.items() if name not in ("inputs", "targets")}
