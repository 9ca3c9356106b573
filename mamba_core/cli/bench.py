"""mamba-core bench: time and memory on the CPU, beside other packages and beside what the machine could do at best.

The exit status is 0 if all that is installed ran and agreed, 1 if a candidate failed or was wrong, 2 for bad input.
"""

import argparse
from pathlib import Path

from mamba_core.benchmarks import cases, ours, runner, store
from mamba_core.benchmarks.machine import cores, machine
from mamba_core.cli.output import add_json, print_json, print_table, progress_bar
from mamba_core.registry import installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases, or groups of them; all, which takes hours")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: whether all works, in minutes"
    )
    parser.add_argument("--backends", metavar="NAMES", help="comma-separated; every one that is installed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, or add to those there")
    parser.add_argument("--threads", type=int, default=cores(), metavar="N", help="of every candidate; one a core")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of each candidate's turns; 30, 2 if --quick")
    parser.add_argument("--list", action="store_true", help="list the cases")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    chosen = cases.choose(arguments.case, arguments.quick)
    if arguments.list:
        _list(chosen, arguments.json)
        return 0
    settings = _settings(arguments)
    backends = _backends(arguments.backends)
    found = {"machine": machine(), "threads": arguments.threads, "quick": arguments.quick, "cases": {}}
    if arguments.out is not None:
        found = store.begin(arguments.out, found)
    for case in chosen:
        found["cases"][case.name] = _measure(case, backends, settings, arguments.json)
        if arguments.out is not None:  # after every case, because there may be hours of them
            store.write(arguments.out, found)
    if arguments.json:
        print_json(found)
    measured = [found["cases"][case.name] for case in chosen]
    failed = [entry for record in measured for entry in record["candidates"].values() if entry.get("absent") is False]
    return 1 if failed else 0


def _settings(arguments: argparse.Namespace) -> runner.Settings:
    if not 1 <= arguments.threads <= cores():
        raise ValueError(f"--threads is {arguments.threads}; expected 1 to {cores()}, the cores there are")
    if arguments.budget is not None and not arguments.budget > 0:
        raise ValueError(f"--budget is {arguments.budget}; expected seconds, more than 0")
    sizes: dict = {"rounds": 3, "budget": 2.0, "limit": 60.0} if arguments.quick else {}
    sizes |= {} if arguments.budget is None else {"budget": arguments.budget}
    return runner.Settings(threads=arguments.threads, **sizes)


def _backends(names: str | None) -> list[str]:
    available = [name for name in installed() if name in ours.OPS]
    chosen = available if names is None else names.split(",")
    if unknown := [name for name in chosen if name not in available]:
        raise ValueError(f"no backend {unknown[0]!r} to time; expected some of {', '.join(available)}")
    return chosen


def _measure(case: cases.Case, backends: list[str], settings: runner.Settings, quiet: bool) -> dict:
    entrants = runner.candidates(case, backends)
    with progress_bar(quiet) as progress:
        task = progress.add_task(case.name, total=len(entrants) * (2 + settings.rounds), status="")
        record = runner.measure(
            case, entrants, settings, log=lambda line: progress.update(task, advance=1, status=line)
        )
    if not quiet:
        columns = ["", "median", "quartiles, ms", f"x {case.baseline or '-'}", "of floor", "extra MiB"]
        print_table(record["title"], columns, [_row(*entry) for entry in record["candidates"].items()])
    return record


def _row(name: str, entry: dict) -> list[str]:
    if "error" in entry:
        return [name, "-", f"{'absent' if entry['absent'] else 'FAILED'}: {entry['error']}", "-", "-", "-"]
    low, high = (f"{value * 1e3:.3g}" for value in entry["quartiles"])
    speedup, over_floor = (f"{entry[key]:.2f}" if key in entry else "-" for key in ("speedup", "over_floor"))
    memory = f"{entry['extra_bytes'] / 2**20:,.0f}"
    return [name, store.milliseconds(entry["median"]), f"{low}-{high}", speedup, over_floor, memory]


def _list(chosen: list[cases.Case], as_json: bool) -> None:
    if as_json:
        print_json({case.name: {"group": case.group, "title": case.title, "peers": case.peers} for case in chosen})
        return
    rows = [[case.name, case.group, case.title, ", ".join(case.peers) or "-"] for case in chosen]
    print_table("cases", ["case", "group", "what is timed", "beside our backends"], rows)
