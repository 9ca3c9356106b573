"""The architectures, a file each, found by file name: see `base` for what a file exports, and `mamba` for an example.

Another package's architectures are found too where it registers as `mamba_core.discovery` says.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from mamba_core import discovery
from mamba_core.architectures.base import BaseConfig, Traits

FOLDER = "architectures"


def names() -> tuple[str, ...]:
    return discovery.names(FOLDER)


def find(name: str) -> ModuleType:
    """The file of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in names():
        raise ValueError(f"no architecture {name!r}; expected one of {', '.join(names())}")
    return discovery.find(FOLDER, name)


def of(config: BaseConfig) -> Any:
    """The file of a config's architecture."""
    return find(config.architecture)


def traits(config: BaseConfig) -> Traits:
    return config.facts.traits


def configs() -> Iterator[type[BaseConfig]]:
    """The config class of every architecture."""
    return (find(name).Config for name in names())


def presets() -> dict[str, BaseConfig]:
    """The configs of published models by name."""
    return {name: config for architecture in names() for name, config in find(architecture).PRESETS.items()}
