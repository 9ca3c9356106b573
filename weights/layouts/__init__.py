"""The layouts, a file each, found by file name: see `base` for what a file exports."""

from collections.abc import Collection

from mamba_core import discovery
from mamba_core.weights.layouts.base import HIDDEN, Layout

__all__ = ["HIDDEN", "Layout", "config_files", "find", "key", "names", "normalize"]

FOLDER = "weights.layouts"


def names() -> tuple[str, ...]:
    return discovery.names(FOLDER)


def find(name: str) -> Layout:
    """The layout of that name, spelt as its file.

    Raises:
        ValueError: there is none.
    """
    return discovery.find(FOLDER, key(name)).LAYOUT


def config_files(weights: Collection[str] = ()) -> tuple[str, ...]:
    """The names that a config's file may have, in the order in which they are looked for.

    weights: the names of the files of weights beside it. Those that one layout alone has put its config first.
    """
    shapes = [find(name) for name in names()]
    own = [shape.config_file for shape in shapes if shape.weights_file in weights]
    return tuple(dict.fromkeys((*own, Layout.config_file, *(shape.config_file for shape in shapes))))


def normalize(name: str) -> str:
    """A layout's name as its file spells it: mlx-lm is mlx_lm."""
    return str(name).replace("-", "_")


def key(name: str) -> str:
    """The same for a layout that there is.

    Raises:
        ValueError: there is none of that name.
    """
    if (found := normalize(name)) not in names():
        raise ValueError(f"layout is {name!r}; expected one of {', '.join(names())}")
    return found
