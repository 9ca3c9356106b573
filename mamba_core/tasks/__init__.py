"""The tasks, a file each, found by file name: what stands around the blocks, and what a model is trained for."""

import functools
import reprlib
from types import ModuleType
from typing import Any

from mamba_core import architectures, discovery
from mamba_core.tasks.base import Task

FOLDER = "tasks"
_MOST_SHOWN = 200  # letters of a fault


def names() -> tuple[str, ...]:
    return discovery.names(FOLDER)


def find(name: str) -> ModuleType:
    """The file of that name.

    Raises:
        ValueError: there is none.
    """
    return discovery.find(FOLDER, name)


def of(config: Any) -> Task:
    """The task of a config, with the options that the config has for it.

    Raises:
        ValueError: the options are not the task's.
    """
    try:
        options = sorted(config.task_options.items())
        # With their types, because True is equal to 1.
        return _made(config.task, tuple(options), tuple(type(value) for _, value in options))
    except TypeError:  # of keys that are not compared, and of values that are not hashed
        shown = reprlib.repr(config.task_options)
        raise ValueError(f"task_options {shown} do not fit task {config.task!r}; expected names and numbers") from None


def check_generates(config: Any, use: str) -> None:
    """Check that a model gives logits of the next token, for a use that needs them.

    Raises:
        ValueError: it does not.
    """
    if not of(config).generates:
        raise ValueError(f"the model is of task {config.task!r}, without a head; {use} needs {_those('generates')}")


def check_trains(config: Any, use: str) -> None:
    """Check that a model has a loss, for a use that needs it.

    Raises:
        ValueError: it has none, or that of the next token, which each position sees.
    """
    task = of(config)
    if not task.trains:
        raise ValueError(f"the model is of task {config.task!r}, without a loss; {use} needs {_those('trains')}")
    if task.generates and not architectures.traits(config).causal:
        raise ValueError(
            f"the loss that {use} needs is of the next token, and each position of {config.architecture} sees those "
            "after it; give its logits a loss of your own, such as that of masked tokens"
        )


def check_forecasts(config: Any, use: str) -> None:
    """Check that a model forecasts a series, for a use that needs it.

    Raises:
        ValueError: it does not.
    """
    if not of(config).forecasts:
        raise ValueError(f"the model is of task {config.task!r}, without a forecast; {use} needs {_those('forecasts')}")


def _those(trait: str) -> str:
    return "one of task " + " or ".join(repr(name) for name in names() if getattr(find(name).Task, trait))


@functools.lru_cache(maxsize=64)
def _made(name: str, options: tuple[tuple[str, Any], ...], types: tuple[type, ...]) -> Task:
    try:
        return find(name).Task(**dict(options))
    except TypeError as fault:
        raise ValueError(f"task_options do not fit task {name!r}: {str(fault)[:_MOST_SHOWN]}") from None
