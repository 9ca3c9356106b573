"""mamba-core forecast: what follows the series of a file, as csv."""

import argparse
import csv
import io
import sys
from pathlib import Path

from mamba_core import factory
from mamba_core.cli.output import add_backend, add_json, add_layout, print_json
from mamba_core.datasets.forecasting import follow
from mamba_core.weights.formats import atomic_file, probe_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help="a run of `mamba-core train --task forecasting`"
    )
    add_layout(parser, "--from", dest="layout", help="its layout; detected")
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="the series, with the columns of the training's"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="positions to forecast; the model's horizon")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a csv to write; by default standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        probe_file(arguments.out, arguments.overwrite)
    names = ("backend", "device", "dtype", "kernels", "layout", "revision")
    model = factory.for_use(arguments.checkpoint, {name: getattr(arguments, name) for name in names})
    found = follow(model, arguments.data, arguments.steps)
    if arguments.json:
        rows = [dict(zip(found.columns, row, strict=True)) for row in found.values.tolist()]
        print_json([{found.time: time} | row for time, row in zip(found.times, rows, strict=True)])
    if arguments.out is None and arguments.json:
        return 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([found.time, *found.columns])
    writer.writerows([time, *row] for time, row in zip(found.times, found.values.tolist(), strict=True))
    if arguments.out is None:
        sys.stdout.write(text.getvalue())
        return 0
    with atomic_file(arguments.out, overwrite=arguments.overwrite) as partial:
        partial.write_text(text.getvalue())
    return 0
