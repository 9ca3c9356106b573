"""What the subcommands share: arguments, tables, progress and JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from mamba_core import registry
from mamba_core.config import COMPUTE_DTYPES
from mamba_core.weights import layouts, tables

try:
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError:
    raise ImportError("the command line needs rich; pip install 'mamba_core[cli]'") from None


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """As any writer does, for `main` to handle; rich would exit with a status of its own."""
        raise BrokenPipeError


class _Progress(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        """The `status` of each task has a line of its own, so that it is shown whole where the line is short."""
        yield from super().get_renderables()
        yield from (Text(task.fields["status"]) for task in self.tasks if task.fields["status"])


# Square brackets and words between colons are text: in paths, in prompts, in the names of extras.
console = _Console(highlight=False, markup=False, emoji=False)


def add_source(parser: argparse.ArgumentParser, metavar: str = "CHECKPOINT") -> None:
    """The checkpoint to read, with --from, --revision and --compat: what it is where that cannot be told."""
    parser.add_argument("source", metavar=metavar, help="a folder, a file or a hub id")
    add_layout(parser, "--from", dest="layout", help="its layout; detected")
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument("--compat", choices=tables.consents(), help="read it as this architecture, arithmetic and all")


def add_layout(parser: argparse.ArgumentParser, option: str, **settings) -> None:
    parser.add_argument(option, type=layouts.normalize, choices=layouts.names(), **settings)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """--backend, --device, --dtype and --kernels, for commands that run a model."""
    parser.add_argument("--backend", metavar="NAME", help=f"{', '.join(registry.names())}; the first installed")
    parser.add_argument("--device", metavar="NAME", help="one of the backend's devices; its first")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, help="the compute dtype")
    parser.add_argument(
        "--kernels", type=_kernels, default="auto", metavar="POLICY", help='"auto", "plain", or OP=KERNEL,OP=KERNEL'
    )


def _kernels(text: str) -> str | dict[str, str]:
    """A policy as `build` takes it."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    return {op.strip(): kernel.strip() for op, _, kernel in pairs}


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def print_json(value) -> None:
    json.dump(value, sys.stdout, indent=1)
    print()


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    table = Table(*columns, title=Text(title), title_justify="left")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    console.print(table)


def progress_bar(quiet: bool = False) -> Progress:
    """A progress display on standard error, with a `status` field for each task."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return _Progress(*columns, console=_Console(stderr=True, markup=False, emoji=False), disable=quiet)


def byte_progress(shown: ExitStack, description: str) -> Callable[[int, int], None]:
    """A callback of bytes done and bytes in all, whose display on standard error begins at the first call.

    Not before: bad input is answered by one line alone. It ends with `shown`.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, TimeElapsedColumn(), console=_Console(stderr=True, markup=False, emoji=False))
    task = progress.add_task(description, total=None)

    def advance(done: int, total: int) -> None:
        if not progress.live.is_started:
            shown.enter_context(progress)
        progress.update(task, completed=done, total=total)

    return advance


def print_nonfinite(counts: dict[str, int], limit: int = 8) -> None:
    """A line on standard error for each of the first tensors that hold NaN or infinite values."""
    for name in list(counts)[:limit]:
        print(f"mamba-core: warning: {name!r} holds {counts[name]:,} NaN or infinite values", file=sys.stderr)
    if len(counts) > limit:
        print(f"mamba-core: warning: so do {len(counts) - limit} more tensors", file=sys.stderr)
