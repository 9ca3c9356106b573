"""The one test that decides whether a module's weights may be read without calling the module."""

from typing import Any

# (class, method) -> the method as the class's author wrote it.
_WRITTEN: dict[tuple[type, str], Any] = {}


def untouched(kind: type, *modules: Any, method: str = "__call__") -> bool:
    """Whether nobody has replaced, subclassed, wrapped or patched these modules, which were built as this class.

    MLX's modules have no hooks, and Python looks up `__call__` on the class: there is nothing else to look at.
    """
    # A loop, because a generator costs more than the comparison.
    for module in modules:
        if type(module) is not kind:
            return False
    return _WRITTEN.get((kind, method), _WRITTEN) is getattr(kind, method) or _is_as_written(kind, method)


def _is_as_written(kind: type, method: str) -> bool:
    """Whether the method is the function that the class's own body, or that of a base, defines."""
    function = getattr(kind, method)
    owner = next((base for base in kind.__mro__ if method in vars(base)), None)
    code = getattr(function, "__code__", None)
    # The names of the code, because functools.wraps copies those of a function.
    if owner is None or code is None or code.co_qualname != f"{owner.__qualname__}.{method}":
        return False
    if function.__globals__.get("__name__") != owner.__module__:
        return False
    _WRITTEN[kind, method] = function
    return True
