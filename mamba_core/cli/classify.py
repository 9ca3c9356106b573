"""mamba-core classify: the likeliest classes of image files."""

import argparse

from mamba_core.cli.output import add_backend, add_json, add_layout, print_json, print_table
from mamba_core.vision import classify_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files that Pillow reads")
    parser.add_argument("--checkpoint", required=True, metavar="CHECKPOINT", help="a folder, a file or a hub id")
    add_layout(parser, "--from", dest="layout", help="its layout; detected")
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many classes; 5")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    names = ("backend", "device", "dtype", "kernels", "layout", "revision")
    options = {name: getattr(arguments, name) for name in names}
    found = classify_images(arguments.images, arguments.checkpoint, top=arguments.top, **options)
    rows = list(zip(arguments.images, found, strict=True))
    if arguments.json:
        print_json([{"image": path, "classes": [guess._asdict() for guess in row]} for path, row in rows])
        return 0
    for path, row in rows:
        print_table(path, ["class", "probability"], [[guess.label, f"{guess.probability:.1%}"] for guess in row])
    return 0
