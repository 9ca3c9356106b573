"""mamba-core convert: write a checkpoint in another layout."""

import argparse

from mamba_core.cli.output import add_json, console
from mamba_core.weights.convert import convert
from mamba_core.weights.layouts import LAYOUTS, WRITERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder, a file or a hub id")
    parser.add_argument("target", metavar="DST", help="a folder, which appears only when complete")
    parser.add_argument("--to", required=True, choices=sorted(LAYOUTS), help="the layout to write")
    parser.add_argument("--from", dest="layout", choices=sorted(LAYOUTS), help="the source's layout; detected")
    parser.add_argument("--format", choices=sorted(WRITERS), help="the kind of file; what the layout's library reads")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.add_argument("--revision", help="of a hub repository")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    done = convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        layout=arguments.layout,
        file_format=arguments.format,
        overwrite=arguments.overwrite,
        revision=arguments.revision,
    )
    if arguments.json:
        print(done.to_json())
    else:
        console.print(
            f"{len(done.tensors)} tensors from {done.source_layout} to {done.target_layout}: {arguments.target}"
        )
    return 0
