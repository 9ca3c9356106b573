"""mamba-core info: which backends, devices and kernels there are here, why not the others, and what is set."""

import argparse
import sys
from collections.abc import Mapping

from mamba_core import environment, factory, registry
from mamba_core.backends.native import library
from mamba_core.cli.output import add_backend, add_json, console, print_json, print_table
from mamba_core.explanation import explain
from mamba_core.version import VERSION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--explain",
        metavar="CHECKPOINT",
        help="say which way computes which layers of a model, and why not a faster",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of the call that is explained; 1")
    parser.add_argument("--length", type=int, default=1, metavar="N", help="its positions; 1, a step of decoding")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.explain is not None:
        return _explain(arguments)
    # Before any backend is imported: MLX's sets a variable.
    variables = environment.values_set()
    found = registry.backends()
    in_force = {name: _in_force(name) for name in found}
    if arguments.json:
        backends = {name: info._asdict() | {"in_force": in_force[name]} for name, info in found.items()}
        print_json({"version": VERSION, "environment": variables, "backends": backends})
        return 0
    left_out = library.missing()
    rows = [_row(name, info, left_out) for name, info in found.items()]
    print_table(f"mamba_core {VERSION}", ["backend", "version", "devices", "kernels, fastest first"], rows)
    if left_out:
        console.print(f"The CPU kernels in C++, native, are left out: {left_out}.")
    if variables:
        meanings = {variable.name: variable.meaning for variable in environment.VARIABLES}
        rows = [[name, value, meanings[name]] for name, value in variables.items()]
        print_table("environment variables that are set", ["name", "value", "what it decides"], rows)
    if rows := [[name, *entry] for name, settings in in_force.items() for entry in settings.items()]:
        print_table("settings in force", ["backend", "what", "value"], rows)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    where = {name: getattr(arguments, name) for name in ("backend", "device", "dtype", "kernels")}
    found = explain(factory.load(arguments.explain, **where), arguments.batch, arguments.length)
    if arguments.json:
        print_json(found.to_dict())
    else:
        console.print(str(found))
    return 0


def _row(name: str, info: registry.BackendInfo, left_out: str | None) -> list[str]:
    if info.missing:
        return [name, "-", "-", info.missing]
    lines = (f"{op}: {_kernels(kernels, left_out)}" for op, kernels in info.kernels.items())
    return [name, info.version or "-", ", ".join(info.devices), "\n".join(lines)]


def _kernels(reasons: Mapping[str, str | None], left_out: str | None) -> str:
    """The kernels of an op; one that cannot run in parentheses, with the reason unless that is said once for all."""
    named = {name: name if reason is None else f"({name}: {reason})" for name, reason in reasons.items()}
    return ", ".join(f"({name})" if left_out and reasons[name] == left_out else text for name, text in named.items())


def _in_force(name: str) -> dict[str, str]:
    """What `arrays.in_force` of the backend says; nothing where it is not installed or has no such function."""
    arrays = sys.modules.get(f"mamba_core.backends.{name}.arrays")
    return getattr(arrays, "in_force", dict)()
