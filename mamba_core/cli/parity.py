"""mamba-core parity: compare backends with the float64 reference on a checkpoint, node by node.

The exit status is 0 if every error is within the tolerance table, 1 if one is not, 2 for bad input.
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

from mamba_core.cli.output import Text, add_json, add_source, console, print_json, print_table, progress_bar
from mamba_core.comparison import STEPS, Comparison, Parity, depth, parity
from mamba_core.config import COMPUTE_DTYPES
from mamba_core.weights.formats import atomic_file, probe_file

# An error of 1 has nothing in common with the reference, and the picture cannot show infinity.
HIGHEST = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--backends", metavar="NAMES", help="comma-separated; every one that is installed")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="float32", help="the compute dtype; float32")
    parser.add_argument("--grad", action="store_true", help="compare the gradient of every parameter too")
    parser.add_argument("--length", type=int, metavar="N", help="tokens to run; 16 to 128 by the model's size")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"to run one token at a time; {STEPS}")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--text", metavar="PROMPT", help="run this instead of random tokens")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.json and errors.png there")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        probe_file(arguments.out / "report.json", overwrite=True)
    progress = progress_bar(arguments.json)
    task = progress.add_task("parity", total=None, status="")
    with ExitStack() as shown:

        def log(line):
            # Not before: bad input is answered by one line alone.
            if not progress.live.is_started:
                shown.enter_context(progress)
            progress.update(task, advance=1, status=line)

        found = parity(
            arguments.source,
            backends=arguments.backends.split(",") if arguments.backends else None,
            dtype=arguments.dtype,
            grad=arguments.grad,
            length=arguments.length,
            steps=arguments.steps,
            text=arguments.text,
            seed=arguments.seed,
            layout=arguments.layout,
            revision=arguments.revision,
            compat=arguments.compat,
            log=log,
        )
    report = {"checkpoint": arguments.source} | found.to_dict()
    if arguments.out is not None:
        with atomic_file(arguments.out / "report.json", overwrite=True) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
        _plot(found, arguments.out / "errors.png")
    if arguments.json:
        print_json(report)
    else:
        _show(arguments, found)
    return 0 if found.passed else 1


def _show(arguments, found: Parity) -> None:
    rows = []
    for entry in found.backends:
        for mode, compared in entry.modes.items():
            verdict = Text("agrees")
            if not compared.passed:
                verdict = Text.assemble(("DIVERGES", "red"), f" at {compared.first_divergent}")
            rows.append([f"{entry.backend} {entry.device}", mode, _worst(compared), verdict])
    title = f"{found.dtype} against float64: relative L2 errors, {found.layers} layers"
    print_table(title, ["backend", "mode", "nearest to the limit, or beyond", "verdict"], rows)
    chunks = " + ".join(map(str, found.chunks))
    console.print(f"forward {found.length} positions, chunked {chunks}, stepped {found.steps}")
    if arguments.out is not None:
        console.print(f"{arguments.out}/report.json, {arguments.out}/errors.png", soft_wrap=True)


def _worst(compared: Comparison) -> str:
    names = compared.worst(3)
    return "\n".join(f"{compared.errors[name]:.1e} of {compared.limits[name]:.1e} {name}" for name in names)


def _plot(found: Parity, path: Path) -> None:
    """A panel a mode: the largest error of each layer, a line a backend, and the largest limit there."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    modes = list(found.backends[0].modes)
    figure, panels = pyplot.subplots(
        1, len(modes), figsize=(4.5 * len(modes), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for mode, axes in zip(modes, panels[0], strict=True):
        for entry in found.backends:
            axes.plot(*_by_depth(entry.modes[mode].errors, found.layers), marker=".", label=entry.backend)
        axes.plot(*_by_depth(found.backends[0].modes[mode].limits, found.layers), "k--", lw=1, label="limit")
        axes.set(yscale="log", xlabel="layer; 0 embedding, after the last norm and head", title=mode)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"relative L2 error, {found.dtype}")
    panels[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _by_depth(values: dict[str, float], layers: int) -> tuple[list[int], list[float]]:
    """Depths, and the largest of the values at each; without zeros, which a logarithmic axis cannot show."""
    largest: dict[int, float] = {}
    for name, value in values.items():
        at = depth(name, layers)
        largest[at] = max(largest.get(at, 0.0), min(value, HIGHEST))
    places = sorted(place for place, value in largest.items() if value > 0)
    return places, [largest[place] for place in places]
