"""The one test that decides whether a module's weights may be read without calling the module."""

from typing import Any

# (class, method) -> the method as the class's author wrote it.
_WRITTEN: dict[tuple[type, str], Any] = {}


def untouched(kind: type, *modules: Any) -> bool:
    """Whether nobody has replaced, subclassed, wrapped or patched these modules, which were built as this class.

    MLX's modules have no hooks, and Python looks up `__call__` on the class: there is nothing else to look at.
    """
    # A loop, because a generator costs more than the comparison.
    for module in modules:
        if type(module) is not kind:
            return False
    return not patched(kind)


def patched(kind: type, name: str = "__call__") -> bool:
    """Whether somebody has put another function in the place of a class's method."""
    function = getattr(kind, name)
    if _WRITTEN.get((kind, name)) is function:
        return False
    owner = next((base for base in kind.__mro__ if name in vars(base)), None)
    code = getattr(function, "__code__", None)
    if owner is None or code is None:
        return True
    # Of the code, because functools.wraps copies the names of a function.
    written = code.co_qualname == f"{owner.__qualname__}.{name}"
    if written and function.__globals__.get("__name__") == owner.__module__:
        _WRITTEN[kind, name] = function
        return False
    return True
