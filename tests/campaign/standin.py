"""A backend of NumPy arrays that computes nothing: what readers of states and of training ask a framework for."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from mamba_core import registry
from mamba_core.backend import Foreign
from mamba_core.spec import state as states
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table


class ResumedError(BaseException):
    """Training has been resumed, and would make its first step."""


class Model:
    """A model's parameters, with what `mamba_core` asks a model for."""

    backend, dtype, device, source = "standin", "float32", None, None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.values = dict(initial_values(config))

    def init_state(self, batch: int):
        return states.initial(self.config, batch, lambda shape, dtype: np.zeros(shape, _numpy(dtype)))


class Trainer:
    def __init__(self, model: Model, settings: Any, steps: bool = False) -> None:
        self._table = parameter_table(model.config)
        self.loaded: dict[str, np.ndarray] = {}
        self.steps = 0

    def step(self, tokens) -> tuple[float, float]:
        if not ALLOWED_STEPS[0]:
            raise ResumedError
        ALLOWED_STEPS[0] -= 1
        self.steps += 1
        return 1.0, 1.0

    def evaluate(self, tokens, counts) -> float:
        raise ResumedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: parameter.shape for name, parameter in self._table.items()}

    def state(self) -> dict[str, np.ndarray]:
        moments = {f"{moment}.{name}": np.full(shape, 0.5, np.float32)
                   for name, shape in self.shapes().items() for moment in "mv"}  # fmt: skip
        return moments | {"step": np.array(self.steps, np.int32)}

    def load_state(self, state) -> None:
        LOADED.clear()
        LOADED.update({name: np.array(state[name]) for name in state})


LOADED: dict[str, np.ndarray] = {}  # what was resumed last
ALLOWED_STEPS = [0]


def _numpy(dtype: str) -> str:
    return "float32" if dtype == "compute" else dtype


BACKEND = SimpleNamespace(
    name="standin",
    trainer=Trainer,
    parameters=lambda model, merge=False: model.values,
    foreign=lambda model: Foreign(),
    to_numpy=np.asarray,
    from_numpy=lambda array, dtype=None, device=None: np.array(array, dtype),
)


def _no_framework() -> str:
    raise ImportError("no framework in a campaign")


@contextmanager
def installed():
    """While it is entered, this is every backend, and `convert --verify` runs the reference."""
    before = registry.get, registry.default_name
    registry.get, registry.default_name = lambda name=None: BACKEND, _no_framework
    try:
        yield
    finally:
        registry.get, registry.default_name = before
