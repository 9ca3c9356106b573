"""The command lines of the campaign."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign import runner, standin
from tests.campaign.cases import make


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fuzz = commands.add_parser("fuzz", help="mutated inputs for every reader")
    fuzz.add_argument("--cases", type=int, default=1_000_000)
    fuzz.add_argument("--first", type=int, default=0, help="the number of the first case")
    fuzz.add_argument("--case", type=int, help="run this one alone, and show what comes of it")
    fuzz.add_argument("--jobs", type=int, default=2)
    fuzz.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), "campaign-failures"))
    fuzz.set_defaults(run=_fuzz)
    kills = commands.add_parser("kills", help="kills of convert and train")
    kills.add_argument("--random", type=int, default=200, help="kills at random times")
    kills.add_argument("--injected", type=int, default=60, help="kills at system calls, by strace")
    kills.add_argument("--full", type=int, default=20, help="disks that are full from a system call on")
    kills.set_defaults(run=_kills)
    for command in (fuzz, kills):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--out", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args()
    return arguments.run(arguments)


def _fuzz(arguments: argparse.Namespace) -> int:
    if arguments.case is not None:
        return _one(arguments)
    began = time.perf_counter()
    tally = runner.campaign(arguments.cases, arguments.seed, arguments.jobs, arguments.keep, arguments.first)
    seconds = time.perf_counter() - began
    numbers = tally.to_json() | {"seed": arguments.seed, "seconds": round(seconds), "jobs": arguments.jobs}
    _show(numbers, arguments.out)
    if tally.failed:
        print(f"inputs of failures: {arguments.keep}", file=sys.stderr)
    return bool(tally.failed)


def _kills(arguments: argparse.Namespace) -> int:
    from tests.campaign.kills.runner import campaign

    report, numbers = campaign(arguments.random, arguments.injected, arguments.full, arguments.seed)
    _show(numbers, arguments.out)
    return bool(report.failures)


def _one(arguments: argparse.Namespace) -> int:
    case = make(arguments.seed, arguments.case)
    with standin.installed(), tempfile.TemporaryDirectory() as folder:
        verdict = runner.learned(Path(folder, "bench")).run(case)
    told = f"{verdict.outcome}\n{verdict.told}"
    print(told, f"{verdict.seconds:.3f} s, {verdict.memory} bytes", sep="\n")
    print(runner.keep_input(arguments.keep, case, arguments.seed, told))
    return verdict.failed


def _show(numbers: dict, out: Path | None) -> None:
    print(json.dumps(numbers, indent=1))
    if out is not None:
        out.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
