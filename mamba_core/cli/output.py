"""What the subcommands share: arguments, tables, progress and JSON."""

import argparse
import json
import sys

from mamba_core import registry

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError:
    raise ImportError("the command line needs rich; pip install 'mamba_core[cli]'") from None

console = Console(highlight=False)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """--backend, --device, --dtype and --kernels, for commands that run a model."""
    parser.add_argument("--backend", metavar="NAME", help=f"{', '.join(registry.names())}; the first installed")
    parser.add_argument("--device", metavar="NAME", help="one of the backend's devices; its first")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="the compute dtype")
    parser.add_argument("--kernels", default="auto", metavar="NAME", help="a scan kernel by name; the fastest")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def print_json(value) -> None:
    json.dump(value, sys.stdout, indent=1)
    print()


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def progress_bar(quiet: bool = False) -> Progress:
    """A progress display on standard error, with a `status` field for each task."""
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    shown = (*columns, TimeElapsedColumn(), TextColumn("{task.fields[status]}"))
    return Progress(*shown, console=Console(stderr=True), disable=quiet)
