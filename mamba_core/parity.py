"""Do implementations agree? Runs a checkpoint on backends and on the float64 reference and compares every node."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mamba_core import factory, registry
from mamba_core.spec.init import random_stream
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.layouts import open_model


@dataclass(frozen=True)
class BackendParity:
    """One backend against the reference.

    errors: relative L2 error of every node of the block graph, in order.
    limits: what the tolerance table allows each.
    """

    backend: str
    device: str
    kernels: str
    errors: dict[str, float]
    limits: dict[str, float]
    seconds: float

    @property
    def worst(self) -> tuple[str, float]:
        """The node with the largest error, and the error."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def first_divergent(self) -> str | None:
        """The first node, in the order of computation, whose error exceeds the limit."""
        return next((node for node, error in self.errors.items() if not error <= self.limits[node]), None)

    @property
    def passed(self) -> bool:
        return self.first_divergent is None


@dataclass(frozen=True)
class Parity:
    """What `parity` found; `tokens` is what was run, (1, l)."""

    dtype: str
    tokens: list[int]
    backends: tuple[BackendParity, ...]

    @property
    def passed(self) -> bool:
        return all(entry.passed for entry in self.backends)

    def to_dict(self) -> dict:
        return asdict(self) | {"passed": self.passed}


def parity(
    source: str | Path,
    *,
    backends: Sequence[str] | None = None,
    dtype: str = "float32",
    length: int = 128,
    tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> Parity:
    """Compare backends with the float64 reference, node by node, on a checkpoint.

    Args:
        source: a checkpoint in any readable layout.
        backends: names; by default every one whose framework is installed.
        dtype: the compute dtype of the backends, which chooses the tolerance.
        length: how many random tokens to run. tokens: what to run instead.
        seed: of the random tokens.
    """
    opened = open_model(source)
    if tokens is None:
        tokens = random_stream(seed, "parity").integers(0, opened.config.vocab_size, length).tolist()
    ids = np.array([tokens], np.int32)
    reference = {}
    ReferenceModel(opened.config, dict(opened.tensors()))(ids, observe=reference.__setitem__)
    chosen = installed() if backends is None else backends
    return Parity(dtype, list(tokens), tuple(_compare(source, name, dtype, ids, reference) for name in chosen))


def installed() -> list[str]:
    """The backends whose framework is installed."""
    return [name for name in registry.names() if not registry.missing_packages(name)]


def _compare(source, name: str, dtype: str, ids: np.ndarray, reference: dict) -> BackendParity:
    backend = registry.get(name)
    model = factory.load(source, backend=name, dtype=dtype)
    errors = {}

    def observe(node, value):
        errors[node] = relative_l2(backend.to_numpy(value), reference[node])

    started = time.perf_counter()
    model(backend.from_numpy(ids, device=model.device), observe=observe)
    seconds = time.perf_counter() - started
    if list(errors) != list(reference):
        raise AssertionError(f"backend {name} reports other nodes: {sorted(set(errors) ^ set(reference))}")
    limits = {node: tolerance(dtype, "value" if node == "logits" else "node") for node in errors}
    return BackendParity(name, model.device, model.kernels, errors, limits, seconds)
