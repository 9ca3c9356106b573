"""The one test that decides whether a module's weights may be read without calling the module."""

import torch
from torch import nn

from mamba_core.backends.torch import private

# (class, method) -> the method as the class's author wrote it. A class that somebody patched has another.
_written: dict[tuple[type, str], object] = {}


def untouched(kind: type, *modules: nn.Module, method: str = "forward") -> bool:
    """Whether nobody has replaced, subclassed, patched or hooked these modules, which were built as this class."""
    if getattr(kind, method) is not _written.get((kind, method)) and not _as_written(kind, method):
        return False
    if kind.__call__ is not private.MODULE_CALL:
        return False
    # A loop, because a generator costs a fourth of what a block's native step does in Python.
    for module in modules:
        if type(module) is not kind or method in module.__dict__:
            return False
    return not private.hooked(*modules)


def _as_written(kind: type, method: str) -> bool:
    """Whether the method is the function that the class's own body, or that of a base, defines; or nn.Module's."""
    # A compiler finds the classes of a model that was built here; a class that it does not know is called.
    if torch.compiler.is_compiling():
        return False
    owner = next(base for base in kind.__mro__ if method in vars(base))
    function = vars(owner)[method]
    if owner is not nn.Module:
        code = getattr(function, "__code__", None)
        if code is None or code.co_qualname != f"{owner.__qualname__}.{method}":
            return False
        if function.__globals__.get("__name__") != owner.__module__:
            return False
    _written[kind, method] = function
    return True
