"""Where something was measured, and with what."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.registry import installed

PEERS = ("transformers", "mambapy", "mamba_ssm", "minimamba")


def machine() -> dict[str, Any]:
    """The processor, its cores, the backends' devices, and the versions of all that is compared."""
    devices = {name: registry.get(name).devices()[0] for name in installed()}
    packages = {name: registry.PACKAGES[name][0] for name in devices if name in registry.PACKAGES}
    return {
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "devices": devices,
        "versions": _versions(packages | {name: name for name in PEERS}),
        "native": library.missing() or "built",
    }


def processor() -> str:
    """The CPU's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions(packages: dict[str, str]) -> dict[str, str]:
    found = {}
    for name, package in packages.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found
