"""Finding parts by file name: in this package, and in packages laid out like it that other people register.

A part is a module: the architecture "mamba" is `mamba_core.architectures.mamba`, its mixer on PyTorch
`mamba_core.backends.torch.mixers.mamba`. No list names them. An extension is a package with the same folders. It
registers by an entry point whose value is the package:

    [project.entry-points."mamba_core.extensions"]
    toy = "my_package"            # my_package/architectures/toy.py, my_package/backends/torch/mixers/toy.py, ...
"""

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType

GROUP = "mamba_core.extensions"
# Modules of a folder that are no parts.
NO_PARTS = ("base",)


@functools.cache
def roots() -> tuple[str, ...]:
    """The packages that are searched: ours, then the extensions by name."""
    return ("mamba_core", *dict.fromkeys(point.value for point in sorted(entry_points(group=GROUP))))


@functools.cache
def names(folder: str) -> tuple[str, ...]:
    """The parts in a folder, such as "architectures" or "backends.torch.mixers", in alphabetical order."""
    return tuple(sorted(_places(folder)))


@functools.cache
def find(folder: str, name: str) -> ModuleType:
    """The part of that name.

    Raises:
        ValueError: there is none, or several packages have one.
    """
    places = _places(folder)
    if name not in places:
        known = ", ".join(sorted(places)) or "nothing"
        raise ValueError(f"no {name!r} in {folder.replace('.', '/')}; expected one of: {known}")
    if len(places[name]) > 1:
        raise ValueError(f"{folder.replace('.', '/')}/{name} is in several packages: {', '.join(places[name])}")
    return importlib.import_module(f"{places[name][0]}.{folder}.{name}")


def modules(folder: str) -> dict[str, ModuleType]:
    """Every part in a folder by name."""
    return {name: find(folder, name) for name in names(folder)}


@functools.cache
def _places(folder: str) -> dict[str, list[str]]:
    """Name -> the packages that have a part of it."""
    found: dict[str, list[str]] = {}
    for root in roots():
        package = _package(root, folder)
        for module in pkgutil.iter_modules([] if package is None else package.__path__):
            if not module.name.startswith("_") and module.name not in NO_PARTS:
                found.setdefault(module.name, []).append(root)
    return found


def _package(root: str, folder: str) -> ModuleType | None:
    """The folder of a package; None where it has no such folder."""
    name = f"{root}.{folder}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as fault:
        # Not a module that the folder itself wants to import.
        if fault.name is not None and f"{name}.".startswith(f"{fault.name}."):
            return None
        raise
