"""The architectures under the laws, a file each, found by file name.

A file exports `CONFIGS`, small configs by name that together reach every switch, and `draw(choose, **fixed)`, a config
with every size and switch drawn but those that are fixed; choose(values) picks one.
"""

from types import ModuleType

from mamba_core import discovery

FOLDER = "conformance.cases"


def cases() -> dict[str, ModuleType]:
    """The case file of every architecture that has one, ours and those of extensions."""
    return discovery.modules(FOLDER)


def configs() -> dict[str, object]:
    """Every named config of every architecture."""
    return {f"{name} {key}": config for name, file in cases().items() for key, config in file.CONFIGS.items()}
