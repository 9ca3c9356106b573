"""mamba-core inspect: what a checkpoint holds, from its headers alone."""

import argparse

from mamba_core.cli.output import add_json, add_source, console, print_nonfinite, print_table
from mamba_core.weights.convert import inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--values", action="store_true", help="read every value and report NaN and infinite ones")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    found = inspect(
        arguments.source,
        layout=arguments.layout,
        revision=arguments.revision,
        compat=arguments.compat,
        values=arguments.values,
    )
    if arguments.json:
        print(found.to_json())
        return 0
    console.print(f"layout      {found.layout}: {found.evidence}", soft_wrap=True)
    console.print(f"files       {', '.join(found.files)} ({found.nbytes / 1e6:,.1f} MB of tensors)", soft_wrap=True)
    console.print(f"parameters  {found.parameters:,}")
    console.print(f"dtypes      {', '.join(f'{count} {dtype}' for dtype, count in found.dtypes.items())}")
    shown = {key: value for key, value in found.config.items() if key != "extra"}
    print_table("config", ["field", "value"], [[key, value] for key, value in shown.items()])
    if arguments.tensors:
        rows = [[name, "x".join(map(str, shape)), dtype] for name, (shape, dtype) in found.tensors.items()]
        print_table("tensors", ["name", "shape", "dtype"], rows)
    if found.nonfinite is not None:
        print_nonfinite(found.nonfinite)
        console.print(f"values      {'all finite' if not found.nonfinite else 'see the warnings'}")
    return 0
