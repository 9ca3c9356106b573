"""mamba-core info: which backends, devices and kernels there are here, and why not the others."""

import argparse

from mamba_core import registry
from mamba_core.cli.output import add_json, print_json, print_table
from mamba_core.version import VERSION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    found = registry.backends()
    if arguments.json:
        print_json({"version": VERSION, "backends": {name: info._asdict() for name, info in found.items()}})
        return 0
    rows = []
    for name, info in found.items():
        if info.missing:
            rows.append([name, "-", "-", info.missing])
            continue
        kernels = [kernel if reason is None else f"({kernel}: {reason})" for kernel, reason in info.kernels.items()]
        rows.append([name, info.version or "-", ", ".join(info.devices), ", ".join(kernels)])
    print_table(f"mamba_core {VERSION}", ["backend", "version", "devices", "kernels, fastest first"], rows)
    return 0
