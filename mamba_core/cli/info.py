"""mamba-core info: which backends, devices and kernels there are here, and why not the others."""

import argparse

from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.cli.output import add_json, console, print_json, print_table
from mamba_core.version import VERSION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    found = registry.backends()
    if arguments.json:
        print_json({"version": VERSION, "backends": {name: info._asdict() for name, info in found.items()}})
        return 0
    rows, left_out = [], library.missing()
    for name, info in found.items():
        if info.missing:
            rows.append([name, "-", "-", info.missing])
            continue
        kernels = [_named(kernel, reason, left_out) for kernel, reason in info.kernels.items()]
        rows.append([name, info.version or "-", ", ".join(info.devices), ", ".join(kernels)])
    print_table(f"mamba_core {VERSION}", ["backend", "version", "devices", "kernels, fastest first"], rows)
    if left_out:
        console.print(f"The CPU kernels in C++, native, are left out: {left_out}.", markup=False)
    return 0


def _named(kernel: str, reason: str | None, left_out: str | None) -> str:
    """A kernel, in parentheses with the reason if it cannot run. Why the native ones are left out is not said here."""
    if reason is None:
        return kernel
    return f"({kernel})" if reason == left_out else f"({kernel}: {reason})"
