"""Seeded initial values: a stream per parameter name, so that a seed gives the same bits on every backend.

A parameter's value depends on the seed, its name and its shape, and on nothing else: not on the order of drawing,
the backend, the device or the other parameters.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mamba_core.spec.params import parameter_table

# (fan-in, whether the result is added to the residual stream) -> what draws the initial weights of a projection.
Init = Callable[[int, bool], Callable[[Any, tuple[int, ...]], np.ndarray]]


def initial_values(config, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """(canonical name, float32 array) for every parameter, drawn one at a time."""
    for name, parameter in parameter_table(config).items():
        yield name, np.ascontiguousarray(parameter.init(random_stream(seed, name), parameter.shape), dtype=np.float32)


def random_stream(seed: int, name: str) -> np.random.Generator:
    """The generator of a name: Philox, keyed by a hash of the seed and the name."""
    digest = hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def ones(_, shape):
    return np.ones(shape, np.float32)


def zeros(_, shape):
    return np.zeros(shape, np.float32)


def log_arange(_, shape):
    """log 1, log 2 ... log n in every row: A = -1, -2 ... -n (S4D-real; Gu et al. 2022, arXiv:2206.11893)."""
    return np.broadcast_to(np.log(np.arange(1, shape[1] + 1)), shape)


def normal(std: float):
    return lambda generator, shape: generator.standard_normal(shape, dtype=np.float32) * np.float32(std)


def uniform(bound: float):
    return lambda generator, shape: (generator.random(shape, dtype=np.float32) * 2 - 1) * np.float32(bound)


def constant(value: float):
    """The constant initial value of dt_proj.weight."""
    return lambda _, shape: np.full(shape, value, np.float32)


def step_bias(dt_min: float, dt_max: float, floor: float):
    """The inverse softplus of step sizes log-uniform in [dt_min, dt_max], at least the floor."""

    def init(generator, shape):
        fraction = generator.random(shape)
        step = np.exp(np.log(dt_min) + fraction * (np.log(dt_max) - np.log(dt_min)))
        step = np.maximum(step, floor)
        return step + np.log(-np.expm1(-step))

    return init
