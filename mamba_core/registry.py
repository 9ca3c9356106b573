"""Finding backends: the entry-point group "mamba_core.backends", imported only when asked for by name."""

import os
import platform
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from typing import NamedTuple

GROUP = "mamba_core.backends"
# Our own backends -> the packages that their extra installs.
PACKAGES = {"torch": ("torch",), "mlx": ("mlx",), "jax": ("jax", "flax", "optax")}


class BackendInfo(NamedTuple):
    """What `backends` says of one backend.

    devices: the default first. kernels: of the default device, None for one that runs, else why it does not.
    missing: why the backend cannot be used at all, None if it can.
    """

    name: str
    version: str | None
    devices: tuple[str, ...]
    kernels: dict[str, str | None]
    missing: str | None


def names() -> list[str]:
    """Every known backend: ours in their order, then those that other packages register."""
    return [*PACKAGES, *sorted({point.name for point in entry_points(group=GROUP)} - set(PACKAGES))]


def get(name: str | None = None):
    """The backend of that name, or the default one.

    Raises:
        ValueError: no such backend.
        ImportError: its framework is not installed; the message says how to install it.
    """
    name = default_name() if name is None else name
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise ValueError(f"no backend {name!r}; expected one of {', '.join(names())}")
    if missing := missing_packages(name):
        raise ImportError(
            f"backend {name!r} needs {', '.join(missing)}, which is not installed; pip install 'mamba_core[{name}]'"
        )
    return points[name].load()


def default_name() -> str:
    """$MAMBA_CORE_BACKEND if set, else the first one installed: MLX on a Mac with Apple silicon, torch, JAX, MLX."""
    if chosen := os.environ.get("MAMBA_CORE_BACKEND"):
        return chosen
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    order = ("mlx", "torch", "jax") if apple else ("torch", "jax", "mlx")
    for name in order:
        if not missing_packages(name):
            return name
    raise ImportError("no framework is installed; pip install 'mamba_core[torch]', or [mlx], or [jax]")


def missing_packages(name: str) -> list[str]:
    """The packages that our backend of this name needs and cannot be found."""
    return [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]


def backends() -> dict[str, BackendInfo]:
    """What is installed, on which devices, with which kernels, and why not. Imports every framework it finds."""
    return {name: _info(name) for name in names()}


def _info(name: str) -> BackendInfo:
    try:
        backend = get(name)
        package = PACKAGES.get(name, (None,))[0]
        found = version(package) if package else None
        return BackendInfo(name, found, tuple(backend.devices()), _scan_kernels(backend), None)
    except ImportError as error:
        return BackendInfo(name, None, (), {}, str(error))


def _scan_kernels(backend) -> dict[str, str | None]:
    """TODO(core): every backend gives its kernels by op."""
    kernels = backend.kernels()
    return kernels.get("selective_scan", kernels)
