"""The README's tables of speed and exactness and the plot of the scaling, from what was measured.

    python -m mamba_core.benchmarks.report                    # benchmarks/results/*.json, README.md, where they stand
    python -m mamba_core.benchmarks.report RESULTS README

A table replaces what stands between `<!-- bench:NAME -->` and `<!-- end -->`; one that nothing was measured for stays.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from mamba_core.benchmarks import accuracy, store
from mamba_core.benchmarks.store import milliseconds
from mamba_core.weights.formats import atomic_file

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"

# Table -> its cases, a column each beside the ratio to the baseline: case, heading, whether memory matters.
TABLES = {
    name: ((f"{name}-forward", "forward", True), (f"{name}-gradient", "forward + backward", True))
    for name in ("scan", "scan-short")
}
TABLES["model"] = tuple(
    (f"{work}-{dtype}", heading, False)
    for dtype in ("float32", "bfloat16")
    for work, heading in (("prefill", f"512 tokens, {dtype}"), ("decode", f"a token more, {dtype}"))
)
TABLES["training"] = (("block", "forward + backward", True),)

SCALING = re.compile(r"scaling-(?P<work>forward|training)-(?P<length>\d+)")
# The training memory that the README names.
NAMED_LENGTH = 65536


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the README's tables and plot from results/*.json.")
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="the folder of JSON files")
    parser.add_argument("readme", nargs="?", type=Path, default=README)
    arguments = parser.parse_args(argv)
    tables = {}
    if (path := arguments.results / "accuracy.json").is_file():
        tables["accuracy"] = accuracy.table(json.loads(path.read_text())["errors"])
    if (path := arguments.results / "bench.json").is_file():
        found = store.read(path)
        if found["quick"]:
            raise ValueError(f"{path} was made with --quick, which measures nothing that a README should say")
        tables |= speed_tables(found)
        if lines := scaling(found["cases"]):
            plot(lines, arguments.results / "scaling.png")
    with atomic_file(arguments.readme, overwrite=True) as partial:
        partial.write_text(replace(arguments.readme.read_text(), tables))
    print(f"{arguments.readme}: {', '.join(tables) or 'nothing was measured'}")


def replace(text: str, tables: dict[str, str]) -> str:
    """The text with each table between its markers.

    Raises:
        ValueError: a table has no markers, or they are not closed.
    """
    for name, table in tables.items():
        opening, closing = f"<!-- bench:{name} -->", "<!-- end -->"
        before, opened, rest = text.partition(opening)
        _, closed, after = rest.partition(closing)
        if not opened or not closed:
            raise ValueError(f"the README has no {opening} ... {closing}; expected one for the table {name!r}")
        text = f"{before}{opening}\n\n{table}\n\n{closing}{after}"
    return text


def speed_tables(found: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown, of the tables of which every case was measured."""
    cases = found["cases"]
    tables = {
        name: _where(found) + "\n\n" + table([(cases[case], heading, memory) for case, heading, memory in columns])
        for name, columns in TABLES.items()
        if all(case in cases for case, _, _ in columns)
    }
    if lines := scaling(cases):
        tables["scaling"] = _where(found) + "\n\n" + scaling_table(lines)
    return tables


def table(columns: list[tuple[dict, str, bool]]) -> str:
    """A row a candidate; a case has its median time, that as a multiple of the baseline's speed, and its memory."""
    header = [""]
    for record, heading, memory in columns:
        header += [heading, f"x {record['baseline']}"] + ["memory"] * memory
    names = dict.fromkeys(name for record, _, _ in columns for name in record["candidates"])
    rows = []
    for name in names:
        cells = [cell for record, _, memory in columns for cell in _cells(record["candidates"].get(name, {}), memory)]
        if any(cells):
            rows.append([name, *(cell or "-" for cell in cells)])
    return _markdown(header, rows)


def _cells(entry: dict, memory: bool) -> list[str]:
    if "median" not in entry:
        return [""] * (2 + memory)
    floor = f" ({entry['over_floor']:.1f} floors)" if "over_floor" in entry else ""
    speedup = f"{entry['speedup']:.2f}" if "speedup" in entry else ""
    extra = [f"{entry['extra_bytes'] / 2**20:,.0f} MiB"] if memory else []
    return [milliseconds(entry["median"]) + floor, speedup, *extra]


def scaling(cases: dict[str, dict]) -> dict[tuple[str, str], list[tuple[int, float, int, int]]]:
    """(work, candidate) -> (length, median seconds, extra bytes, peak bytes) by length."""
    lines = {}
    for name, record in cases.items():
        if not (found := SCALING.fullmatch(name)):
            continue
        for candidate, entry in record["candidates"].items():
            if "median" in entry:
                point = (record["length"], entry["median"], entry["extra_bytes"], entry["peak_bytes"])
                lines.setdefault((found["work"], candidate), []).append(point)
    return {key: sorted(points) for key, points in lines.items()}


def bend(lengths, values) -> float:
    """The largest relative distance of the values from a straight line, the one that makes the distances least."""
    lengths, values = np.asarray(lengths, float), np.asarray(values, float)
    scaled = np.stack([1 / values, lengths / values], axis=1)
    coefficients, *_ = np.linalg.lstsq(scaled, np.ones(len(values)), rcond=None)
    return float(np.abs(scaled @ coefficients - 1).max())


def scaling_table(lines: dict[tuple[str, str], list]) -> str:
    header = ["", "", "lengths", "time of the longest", "time off a line", "memory off a line"]
    header.append(f"memory at {NAMED_LENGTH:,}")
    rows = []
    for (work, candidate), points in lines.items():
        lengths, seconds, extra, _ = zip(*points, strict=True)
        named = dict(zip(lengths, extra, strict=True)).get(NAMED_LENGTH)
        row = [work, candidate, f"{lengths[0]:,} to {lengths[-1]:,}", milliseconds(seconds[-1])]
        row += [f"{bend(lengths, values):.0%}" for values in (seconds, np.maximum(extra, 1))]
        rows.append([*row, "-" if named is None else f"{named / 2**30:.2f} GiB"])
    return _markdown(header, rows)


def plot(lines: dict[tuple[str, str], list], path: Path) -> None:
    """Time and memory over the length, a panel each for the forward and for training, a line a backend."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    works = list(dict.fromkeys(work for work, _ in lines))
    figure, panels = pyplot.subplots(2, len(works), figsize=(5 * len(works), 7), squeeze=False, layout="constrained")
    for (work, candidate), points in lines.items():
        lengths, seconds, extra, _ = zip(*points, strict=True)
        for axes, values in zip(panels[:, works.index(work)], (seconds, np.array(extra) / 2**20), strict=True):
            axes.plot(lengths, values, marker=".", label=candidate)
    for row, unit in zip(panels, ("seconds", "MiB above what was held"), strict=True):
        for axes, work in zip(row, works, strict=True):
            axes.set(xscale="log", yscale="log", xlabel="length", ylabel=unit, title=work)
            axes.grid(alpha=0.3)
            axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {found['threads']} threads; {versions}."


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
