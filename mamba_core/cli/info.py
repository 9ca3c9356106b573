"""mamba-core info: which backends, devices and kernels there are here, why not the others, and what is set."""

import argparse
import sys
from collections.abc import Mapping

from mamba_core import environment, registry
from mamba_core.cli.output import add_json, print_json, print_table
from mamba_core.version import VERSION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    # Before any backend is imported: MLX's sets a variable.
    variables = environment.values_set()
    found = registry.backends()
    in_force = {name: _in_force(name) for name in found}
    if arguments.json:
        backends = {name: info._asdict() | {"in_force": in_force[name]} for name, info in found.items()}
        print_json({"version": VERSION, "environment": variables, "backends": backends})
        return 0
    rows = [_row(name, info) for name, info in found.items()]
    print_table(f"mamba_core {VERSION}", ["backend", "version", "devices", "kernels, fastest first"], rows)
    if variables:
        meanings = {variable.name: variable.meaning for variable in environment.VARIABLES}
        rows = [[name, value, meanings[name]] for name, value in variables.items()]
        print_table("environment variables that are set", ["name", "value", "what it decides"], rows)
    if rows := [[name, *entry] for name, settings in in_force.items() for entry in settings.items()]:
        print_table("settings in force", ["backend", "what", "value"], rows)
    return 0


def _row(name: str, info: registry.BackendInfo) -> list[str]:
    if info.missing:
        return [name, "-", "-", info.missing]
    return [name, info.version or "-", ", ".join(info.devices), _kernels(info.kernels)]


def _kernels(reasons: Mapping) -> str:
    """The kernels by name, or a line for each op where they are given by op."""
    if any(isinstance(its, Mapping) for its in reasons.values()):
        return "\n".join(f"{op}: {_kernels(its)}" for op, its in reasons.items())
    return ", ".join(name if reason is None else f"({name}: {reason})" for name, reason in reasons.items())


def _in_force(name: str) -> dict[str, str]:
    """What `arrays.in_force` of the backend says; nothing where it is not installed or has no such function."""
    arrays = sys.modules.get(f"mamba_core.backends.{name}.arrays")
    return getattr(arrays, "in_force", dict)()
