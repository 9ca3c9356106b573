"""The command `mamba-core`: one module a subcommand, imported when used.

A subcommand's module has `add_arguments(parser)` and `run(arguments) -> exit status`. Bad input ends with one line and
status 2; any other failure is shown as it is, with status 1. Where the reader of standard output leaves, as head does,
the command ends in silence.
"""

import argparse
import os
import sys
import warnings
from importlib import import_module
from typing import NoReturn

from mamba_core.version import VERSION

COMMANDS = {
    "demo": "train a small model on Python's own source and compare every backend on it",
    "info": "which backends, devices and kernels there are here",
    "doctor": "try every kernel that runs here, and write a report for an issue",
    "generate": "continue a prompt",
    "classify": "tell what images show, or of which class texts are",
    "forecast": "tell what follows a series, as csv",
    "train": "train a model on text, tables, series or images",
    "convert": "write a checkpoint in another layout",
    "inspect": "what a checkpoint holds",
    "parity": "compare backends with the float64 reference on a checkpoint, node by node",
    "bench": "time and memory, beside other packages and the machine's limits",
}

BROKEN_PIPE = 141  # as shells have it for a program that SIGPIPE ends


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Without the usage, which has more lines than the fault."""
        self.exit(2, f"mamba-core: error: {_one_line(message)}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    before, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        try:
            arguments = _parser(argv).parse_args(argv)
            return arguments.run(arguments)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # Python writes what is left in the buffer when it exits, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, ImportError, OSError) as fault:
        print(f"mamba-core: {_one_line(fault)}", file=sys.stderr)
        return 2
    except FloatingPointError as fault:
        print(f"mamba-core: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        warnings.formatwarning = before


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="mamba-core", description="One Mamba for PyTorch, MLX and JAX.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"mamba-core {name}: {summary}.")
        if name in argv[:1]:
            module = import_module(f"mamba_core.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _format_warning(message, category, filename: str, lineno: int, line: str | None = None) -> str:
    """Ours in one line, as a fault is; those of other packages with their place, as Python has them."""
    if category is UserWarning:
        return f"mamba-core: warning: {_one_line(message)}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _one_line(fault) -> str:
    return " ".join(str(fault).split())
