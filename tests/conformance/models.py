"""Small models and their references, built once, and how the suite calls and compares them."""

import functools

import numpy as np

import mamba_core as mc
from mamba_core import registry, tasks
from mamba_core.spec import state as states
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel

from .assertions import assert_close


def by_backend(function):
    """Caches what was computed of a backend, which need not be hashable, and further arguments."""

    @functools.lru_cache(maxsize=64)
    def compute(name, *arguments):
        return function(registry.get(name), *arguments)

    return lambda backend, *arguments: compute(backend.name, *arguments)


@by_backend
def built(backend, config, dtype="float32", seed=1):
    return mc.build(config, backend=backend.name, dtype=dtype, seed=seed)


@by_backend
def reference_of(backend, config, dtype="float32"):
    """Of the values as that backend rounded them."""
    return ReferenceModel(config, dict(backend.parameters(built(backend, config, dtype))))


@functools.lru_cache(maxsize=64)
def reference(config, seed=1):
    return ReferenceModel(config, dict(initial_values(config, seed)))


def inputs(config, b: int, l: int, seed: int = 0) -> np.ndarray:
    """What the task's model is called with."""
    return tasks.of(config).draw(config, np.random.default_rng(seed), b, l)


def call(backend, model, given, state=None, observe=None, **positions):
    """(output, state): the first as NumPy, the second the backend's own, as the state that is given."""
    native = {name: backend.from_numpy(value, device=model.device) for name, value in positions.items()}
    told = {} if observe is None else {"observe": observe}
    out = model(backend.from_numpy(given, device=model.device), state, **told, **native)
    return backend.to_numpy(out[0]), out.state


def leaves(config, state, to_numpy=np.asarray, positions: int | None = None) -> dict[str, np.ndarray]:
    """The layers' arrays by name, as NumPy; of what grows so many positions, the filled ones by default."""
    found = {}
    for layer, field in states.table(config):
        own = state.layers[layer]
        value = to_numpy(getattr(own, field.name))
        if field.grows is not None:
            count = to_numpy(own.filled).max() if positions is None else positions
            value = np.moveaxis(np.moveaxis(value, field.grows, 0)[:count], 0, field.grows)
        found[f"layers.{layer}.{field.name}"] = value
    return found


def assert_states(backend, config, found, expected, what: str, dtype="float32") -> None:
    """The reference's state and the backend's hold the same."""
    given = leaves(config, found, backend.to_numpy)
    for name, value in leaves(config, expected).items():
        assert_close(given[name], value, dtype, "value", f"{what}: state {name}")
