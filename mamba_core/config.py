"""Configs by name and from JSON."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from mamba_core import architectures
from mamba_core.architectures.base import COMPUTE_DTYPES, BaseConfig
from mamba_core.architectures.mamba import MambaConfig

__all__ = ["COMPUTE_DTYPES", "BaseConfig", "MambaConfig", "from_dict", "from_object", "preset"]

_MOST_SHOWN, _LONGEST_SHOWN = 8, 60  # names in a message, and letters of each
_LONGEST = 500  # letters of a message


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
        try:
            return tables.read_config(layout, fields)
        except ValueError as fault:  # which may show a value of any length
            message = str(fault)
            raise ValueError(message[:_LONGEST] + "..." if len(message) > _LONGEST else message) from None
    fields = dict(fields)
    name = fields.pop("architecture", MambaConfig.architecture)
    if not isinstance(name, str) or name not in architectures.names():
        raise ValueError(f"config has architecture {reprlib.repr(name)}; known: {', '.join(architectures.names())}")
    config = architectures.find(name).Config
    known = {item.name for item in dataclasses.fields(config)}
    if unknown := sorted(set(fields) - known):
        more = f" and {len(unknown) - _MOST_SHOWN} more" if len(unknown) > _MOST_SHOWN else ""
        shown = ", ".join(str(name)[:_LONGEST_SHOWN] for name in unknown[:_MOST_SHOWN]) + more
        raise ValueError(f"config has unknown fields: {shown}; known: {', '.join(sorted(known))}")
    return config(**fields)


def from_object(config: Any) -> BaseConfig:
    """A config from a preset's name, or from the config object of a library whose layout we read.

    Raises:
        TypeError: it is none of these, and the message says what it is.
        ValueError: an unknown preset, or the library would compute another function.
    """
    from mamba_core.weights import tables

    if isinstance(config, str):
        return preset(config)
    if type(config) in architectures.configs():
        return config
    kind, expected = f"{type(config).__module__}.{type(config).__qualname__}", "expected a preset's name or a config"
    if isinstance(config, Mapping):
        raise TypeError(f"config is {kind}; {expected}; mamba_core.config.from_dict makes one of it")
    layout, fields = tables.layout_of_object(config), _fields_of(config)
    if layout is None or fields is None:
        others = ", ".join(module.partition(".")[0] for module in tables.modules())
        raise TypeError(f"config is {kind}; {expected} such as mamba_core.MambaConfig, or one of {others}")
    try:
        return tables.read_object(layout, fields)
    except ValueError as fault:
        raise ValueError(f"config is {kind}: {fault}") from None


def _fields_of(config: Any) -> dict[str, Any] | None:
    """What a config object would save; None where it does not say."""
    if isinstance(config, type):
        return None
    if callable(to_dict := getattr(config, "to_dict", None)):
        fields = to_dict()
        return dict(fields) if isinstance(fields, Mapping) else None
    return dict(vars(config)) if dataclasses.is_dataclass(config) else None


def preset(name: str) -> BaseConfig:
    """The config of a published model, such as "mamba-130m"."""
    if name not in (found := architectures.presets()):
        raise ValueError(f"no preset {name!r}; expected one of {', '.join(found)}")
    return found[name]
