"""Configs by name and from JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mamba_core import architectures
from mamba_core.architectures.base import COMPUTE_DTYPES, BaseConfig
from mamba_core.architectures.mamba import MambaConfig

__all__ = ["COMPUTE_DTYPES", "BaseConfig", "MambaConfig", "from_dict", "preset"]


def from_dict(fields: Mapping[str, Any]) -> BaseConfig:
    """A config from a parsed JSON object in our own fields, those of transformers or those of mamba_ssm.

    Raises:
        TypeError: it is not an object.
        ValueError: the fields are of none of the three, or a value is out of range.
    """
    from mamba_core.weights import tables

    if not isinstance(fields, Mapping):
        raise TypeError(f"config is {type(fields).__name__}; expected a JSON object")
    if "architecture" not in fields and (layout := tables.dialect(fields)) is not None:
        return tables.read_config(layout, fields)
    fields = dict(fields)
    name = fields.pop("architecture", MambaConfig.architecture)
    if not isinstance(name, str) or name not in architectures.names():
        raise ValueError(f"config has architecture {name!r}; known: {', '.join(architectures.names())}")
    config = architectures.find(name).Config
    known = {item.name for item in dataclasses.fields(config)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"config has unknown fields: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return config(**fields)


def preset(name: str) -> BaseConfig:
    """The config of a published model, such as "mamba-130m"."""
    if name not in (found := architectures.presets()):
        raise ValueError(f"no preset {name!r}; expected one of {', '.join(found)}")
    return found[name]
