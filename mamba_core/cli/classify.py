"""mamba-core classify: the likeliest classes of image files or texts."""

import argparse

from mamba_core import datasets, factory
from mamba_core.cli.output import add_backend, add_json, add_layout, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="*", help="images that Pillow reads, or texts in UTF-8")
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a text; may be given several times"
    )
    parser.add_argument("--checkpoint", required=True, metavar="CHECKPOINT", help="a folder, a file or a hub id")
    add_layout(parser, "--from", dest="layout", help="its layout; detected")
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument("--top", type=int, metavar="K", help="how many classes; 5 at most")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.files and not arguments.text:
        raise ValueError("nothing to classify; give files, or --text")
    names = ("backend", "device", "dtype", "kernels", "layout", "revision")
    model = factory.for_use(arguments.checkpoint, {name: getattr(arguments, name) for name in names})
    task = model.config.task
    files = {name: found for name in datasets.names() if hasattr(found := datasets.find(name), "classify")}
    if (file := files.get(task)) is None:
        those = " or ".join(map(repr, files))
        raise ValueError(
            f"{arguments.checkpoint}: the model is of task {task!r}; classifying needs one of task {those}"
        )
    rows = file.classify(model, arguments.files, arguments.text, arguments.top)
    if arguments.json:
        print_json([{file.CLASSIFIED: shown, "classes": [guess._asdict() for guess in row]} for shown, row in rows])
        return 0
    for shown, row in rows:
        print_table(shown, ["class", "probability"], [[guess.label, f"{guess.probability:.1%}"] for guess in row])
    return 0
