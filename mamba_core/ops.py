"""The recurrence as a function of any framework's arrays: the arrays choose the backend, NumPy's the reference."""

import functools

import numpy as np

from mamba_core import registry
from mamba_core.spec import recurrence


def selective_scan(x, *args, **kwargs):
    """The S6 recurrence over a sequence; see `mamba_core.backend.Backend.selective_scan` for the arguments.

    x (b, l, e) may be a torch, MLX or JAX array, and is computed by that backend, or a NumPy array, and is computed in
    float64 by the sequential reference.
    """
    owner = _owner(x)
    if owner is recurrence and (kernel := kwargs.pop("kernel", "auto")) not in ("auto", "sequential"):
        raise ValueError(f"no kernel {kernel!r} for NumPy arrays; expected 'auto' or 'sequential'")
    return owner.selective_scan(x, *args, **kwargs)


def selective_step(x, *args, **kwargs):
    """One position of `selective_scan`: x (b, e) and state (b, e, n) -> y (b, e) and the new state."""
    return _owner(x).selective_step(x, *args, **kwargs)


def _owner(x):
    return recurrence if isinstance(x, np.ndarray) else _backend_of(type(x))


@functools.cache  # to look for what is installed takes longer than a small scan
def _backend_of(kind: type):
    package = kind.__module__.partition(".")[0]
    name = {"jaxlib": "jax"}.get(package, package)
    if name not in registry.names():
        expected = ", ".join(["numpy", *registry.names()])
        raise TypeError(f"x is {kind.__module__}.{kind.__qualname__}; expected an array of {expected}")
    return registry.get(name)
