"""The command `mamba-core`: one module a subcommand, imported when used.

A subcommand's module has `add_arguments(parser)` and `run(arguments) -> exit status`. Bad input ends with one line and
status 2; any other failure is shown as it is, with status 1.
"""

import argparse
import sys
from importlib import import_module

from mamba_core.version import VERSION

COMMANDS = {
    "demo": "train a small model on Python's own source and compare every backend on it",
    "info": "which backends, devices and kernels there are here",
    "generate": "continue a prompt",
    "train": "train a model on text",
    "convert": "write a checkpoint in another layout",
    "inspect": "what a checkpoint holds",
    "parity": "compare backends with the float64 reference on a checkpoint, node by node",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser(argv).parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, ImportError, OSError) as fault:
        print(f"mamba-core: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    except FloatingPointError as fault:
        print(f"mamba-core: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mamba-core", description="One Mamba for PyTorch, MLX and JAX.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"mamba-core {name}: {summary}.")
        if name in argv[:1]:
            module = import_module(f"mamba_core.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
