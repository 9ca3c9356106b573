"""The architectures under the laws, a file each, found by file name.

A file exports `CONFIGS`, small configs by name that together reach every switch, and `draw(choose, **fixed)`, a config
with every size and switch drawn but those that are fixed; choose(values) picks one. With `MODEL = False` a block alone
is under the laws: where nothing is carried, what stands around the blocks is held by the other architectures.
"""

import importlib
import pkgutil
from types import ModuleType

from mamba_core import discovery

FOLDER = "conformance.cases"


def cases() -> dict[str, ModuleType]:
    """The case file of every architecture that has one, ours and those of extensions."""
    ours = (module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in ours} | discovery.modules(FOLDER)


def configs() -> dict[str, object]:
    """Every named config of every architecture."""
    return {f"{name} {key}": config for name, file in cases().items() for key, config in file.CONFIGS.items()}


def bases() -> dict[str, object]:
    """Of every architecture the first of its named configs."""
    return {name: next(iter(file.CONFIGS.values())) for name, file in cases().items()}
