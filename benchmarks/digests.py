"""Do the results of this code have the same bits as those of another commit?

    python -m mamba_core.benchmarks.digests --base COMMIT                     about four minutes, most of them for JAX
    python -m mamba_core.benchmarks.digests --base COMMIT --backend torch     seconds
    python -m mamba_core.benchmarks.digests --out FILE                        keeps this code's digests
    python -m mamba_core.benchmarks.digests --against FILE                    compares this code with them

The exit status is 0 if all are equal, 1 if something differs, 2 for bad input. `digested` says what is compared.

JAX keeps what it has compiled in a temporary folder, so that a program that has not changed is compiled once.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from mamba_core import registry
from mamba_core.benchmarks import worktree
from mamba_core.benchmarks.machine import processor
from mamba_core.cli.output import print_table
from mamba_core.registry import installed

MODULE = "mamba_core.benchmarks.digested"
# The differences that are printed, the first ones in the order of computation.
SHOWN = 40


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the bits of all results with those of another commit.")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--base", metavar="COMMIT", help="the commit to compare with")
    other.add_argument("--against", type=Path, metavar="FILE", help="the digests to compare with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the digests of this code")
    parser.add_argument("--backend", action="append", help="repeatable; all that are installed")
    parser.add_argument("--only", default="", metavar="TEXT", help="the works whose names have this text in them")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each framework")
    arguments = parser.parse_args(argv)
    if not (arguments.base or arguments.against or arguments.out):
        parser.error("give --base, --against or --out")
    try:
        return _run(arguments)
    except ValueError as fault:
        print(f"digests: {fault}", file=sys.stderr)
        return 2


def _run(arguments) -> int:
    backends = arguments.backend or installed()
    options = {"backends": backends, "only": arguments.only, "threads": arguments.threads}
    theirs = None if arguments.against is None else _read(arguments.against, options)
    with contextlib.ExitStack() as stack:
        if arguments.base:  # first, because an unknown commit would be told of minutes later
            theirs = measure(stack.enter_context(worktree.worktree(arguments.base)), **options)
        ours = measure(worktree.ROOT, **options)
    if arguments.out is not None:
        kept = {"about": _about(options), "digests": ours}
        arguments.out.write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if theirs is None else report(theirs, ours)


def measure(root: Path, backends: list[str], only: str = "", threads: int = 1) -> dict[str, dict]:
    """The digests of the code of a checkout, by name.

    Raises:
        ValueError: it failed.
    """
    found = {}
    for name in backends:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "digests.json")
            line = worktree.command(root, MODULE, "--backend", name, "--out", str(out), "--only", only)
            done = subprocess.run(line, env=worktree.environment(threads), capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"the digests of {name} failed:\n{done.stderr.strip()}")
            found |= json.loads(out.read_text())
    return found


def distance(a: dict, b: dict) -> float:
    """The relative L2 distance of two arrays, estimated from their digests; inf where they are not comparable."""
    if a["kind"] != b["kind"]:
        return math.inf
    square = sum((x - y) ** 2 for x, y in zip(a["projections"], b["projections"], strict=True)) / len(a["projections"])
    if not math.isfinite(square):
        return math.inf
    return math.sqrt(square) / a["norm"] if a["norm"] else (math.inf if square else 0.0)


class Difference(NamedTuple):
    """name: of the result. distance: inf where one side has none, or one of another kind. detail: for a reader."""

    name: str
    distance: float
    detail: str


def compare(theirs: dict[str, dict], ours: dict[str, dict]) -> list[Difference]:
    """The results that differ, in the order of computation."""
    found = []
    for name in {**theirs, **ours}:
        if name not in ours or name not in theirs:
            found.append(Difference(name, math.inf, f"only {'there' if name in theirs else 'here'}"))
        elif theirs[name]["sha256"] != ours[name]["sha256"] or theirs[name]["kind"] != ours[name]["kind"]:
            away = distance(theirs[name], ours[name])
            kinds = f" ({theirs[name]['kind']} there, {ours[name]['kind']} here)"
            found.append(Difference(name, away, f"{away:.1e}{kinds * math.isinf(away)}"))
    return found


def report(theirs: dict[str, dict], ours: dict[str, dict]) -> int:
    """Prints the comparison; the exit status."""
    found = compare(theirs, ours)
    counts, differing = Counter(map(_row, {**theirs, **ours})), defaultdict(list)
    for difference in found:
        differing[_row(difference.name)].append(difference)
    rows = []
    for row, count in counts.items():
        largest = max((difference.distance for difference in differing[row]), default=0.0)
        rows.append([*row, f"{count - len(differing[row])} of {count}", f"{largest:.1e}" if differing[row] else "-"])
    print_table("results with the same bits", ["backend", "what", "equal", "largest distance"], rows)
    for difference in found[:SHOWN]:
        print(f"{difference.name}: {difference.detail}")
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more")
    count = sum(counts.values())
    print(f"{count - len(found)} of {count} results have the same bits")
    return 0 if count and not found else 1


def _row(name: str) -> tuple[str, str]:
    """The backend and the work of a result, whatever its dtype, kernel and config."""
    backend, _, _, what, *_ = name.partition(" | ")[0].split(", ")
    return backend, what


def _about(options: dict) -> dict:
    """What the bits depend on beside the code."""
    packages = [package for name in options["backends"] for package in registry.PACKAGES.get(name, ())]
    return {"processor": processor(), "versions": {name: version(name) for name in packages}, **options}


def _read(path: Path, options: dict) -> dict[str, dict]:
    """The digests of a file, of the backends and works that are asked for.

    Raises:
        ValueError: the file is none of ours, or its digests were made under other conditions.
    """
    kept, about = json.loads(path.read_text()), _about(options)
    if not isinstance(kept, dict) or set(kept) != {"about", "digests"}:
        raise ValueError(f"{path} holds no digests")
    known = kept["about"]
    for name in ("processor", "threads"):
        if known[name] != about[name]:
            raise ValueError(f"{path} was made with {name} {known[name]!r}, not {about[name]!r}")
    for name, its in about["versions"].items():
        if known["versions"].get(name) != its:
            raise ValueError(f"{path} was made with {name} {known['versions'].get(name)}, not {its}")
    wanted = tuple(f"{name}," for name in options["backends"])
    digests = kept["digests"].items()
    return {
        name: its for name, its in digests if name.startswith(wanted) and options["only"] in name.partition(" | ")[0]
    }


if __name__ == "__main__":
    sys.exit(main())
