"""The backends, one package each, imported when asked for. The package can be called as `available_backends` is."""

import sys
from types import ModuleType

from mamba_core import registry


class _Backends(ModuleType):
    """A package that answers a call, because importing `mamba_core.backends.torch` binds this name to the package."""

    def __call__(self) -> dict[str, registry.BackendInfo]:
        """What is installed, on which devices, with which kernels, and why not; see `mamba_core.registry`."""
        return registry.backends()


sys.modules[__name__].__class__ = _Backends
