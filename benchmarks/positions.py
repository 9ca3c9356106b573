"""What padding and packing cost: a masked and a packed batch beside the same batch without, on the CPU.

    python -m mamba_core.benchmarks.positions                     a minute or so; JAX compiles some minutes more
    python -m mamba_core.benchmarks.positions --base COMMIT       beside the code of another commit

Times the forward pass of a model without a head, and its gradients. The other commit's model has a process of its own,
and both are timed in turns. The exit status is 0, or 2 for bad input.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from mamba_core.benchmarks import runner, store, worktree
from mamba_core.benchmarks.machine import machine
from mamba_core.benchmarks.positioned import KINDS, WORKS, Sizes
from mamba_core.cli.output import print_table
from mamba_core.registry import installed

MODULE = "mamba_core.benchmarks.positioned"
HERE, BASE = "here", "base"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time padded and packed batches beside plain ones.")
    parser.add_argument("--base", metavar="COMMIT", help="a commit to time beside this code")
    parser.add_argument("--backend", action="append", help="repeatable; all that are installed")
    parser.add_argument("--work", choices=WORKS, action="append", help="repeatable; both")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each framework")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N")
    arguments = parser.parse_args(argv)
    sizes = Sizes(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sizes)})
    settings = runner.Settings(rounds=arguments.rounds, budget=float("inf"), threads=arguments.threads)
    try:
        found = measure(
            arguments.base, arguments.backend or installed(), arguments.work or list(WORKS), sizes, settings
        )
    except ValueError as fault:
        print(f"positions: {fault}", file=sys.stderr)
        return 2
    print_table(title(sizes), ["backend", "work", "kind", *columns(found)], rows(found))
    if arguments.out is not None:
        store.write(arguments.out, found)
    return 0


def measure(base: str | None, backends: list[str], works: list[str], sizes: Sizes, settings: runner.Settings) -> dict:
    """The seconds of every turn: backend -> work -> side -> kind.

    Raises:
        ValueError: an unknown commit, or a side that failed.
    """
    with contextlib.ExitStack() as stack:
        roots = {BASE: stack.enter_context(worktree.worktree(base))} if base else {}
        roots[HERE] = worktree.ROOT
        commits = {side: worktree.commit_of(root) for side, root in roots.items()}
        seconds = {name: _backend(name, works, roots, sizes, settings) for name in backends}
    about = {"machine": machine(), "threads": settings.threads, "commits": commits}
    return about | {"sizes": dataclasses.asdict(sizes), "seconds": seconds}


def _backend(name, works, roots, sizes, settings) -> dict:
    found = {}
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(_Side(root, name, sizes, settings.threads)) for side, root in roots.items()}
        for work in works:
            turns = {
                (side, kind): lambda its=its, kind=kind: its.ask(work, kind)  # noqa: B023 (called in this round)
                for kind in KINDS
                for side, its in sides.items()
            }
            for turn in turns.values():  # compiles
                turn()
            taken = runner.alternate(turns, settings)
            found[work] = {side: {kind: taken[side, kind] for kind in KINDS} for side in sides}
    return found


class _Side:
    """The process that times one checkout's code."""

    def __init__(self, root: Path, backend: str, sizes: Sizes, threads: int):
        line = worktree.command(root, MODULE, backend, json.dumps(dataclasses.asdict(sizes)))
        self.root = root
        self.process = subprocess.Popen(
            line, env=worktree.environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *_) -> None:
        # It ends where its input does.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def ask(self, work: str, kind: str) -> float:
        with contextlib.suppress(BrokenPipeError):
            print(work, kind, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError(f"the process of {os.fspath(self.root)} ended with status {self.process.wait()}")
        return float(answer)


def title(sizes: Sizes) -> str:
    return f"{sizes.layers} layers of width {sizes.width}, {sizes.batch} rows of {sizes.length} positions, float32"


def columns(found: dict) -> list[str]:
    """A side has its median and that over the plain batch's; ratio is this code's median over the other's."""
    sides = [side for side in (BASE, HERE) if side in found["commits"]]
    columns = [column for side in sides for column in (side, "x plain")]
    return [*columns, "ratio"] if BASE in sides else columns


def rows(found: dict) -> list[list[str]]:
    made = []
    for name, works in found["seconds"].items():
        for work, sides in works.items():
            medians = {side: {kind: statistics.median(taken[kind]) for kind in KINDS} for side, taken in sides.items()}
            for kind in KINDS:
                row = [name, work, kind]
                for its in medians.values():
                    row += [store.milliseconds(its[kind]), f"{its[kind] / its['plain']:.2f}"]
                if BASE in medians:
                    row.append(f"{medians[HERE][kind] / medians[BASE][kind]:.2f}")
                made.append(row)
    return made


if __name__ == "__main__":
    sys.exit(main())
