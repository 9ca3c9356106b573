"""mamba-core demo: the whole library on one small job.

Trains a byte-level Mamba on real text, saves it, loads it on every backend, compares every node of its graph with the
float64 reference, converts it to another layout and back, and continues a prompt on every backend. Fails unless the
nodes agree to the tolerance table, the conversion is exact and the greedy texts are the same token for token.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mamba_core import factory, registry
from mamba_core.cli.output import Text, add_json, console, print_json, print_table, progress_bar
from mamba_core.comparison import Parity, parity
from mamba_core.config import MambaConfig
from mamba_core.data import read_tokens, standard_library
from mamba_core.generation import generate
from mamba_core.registry import installed
from mamba_core.spec.params import parameter_count
from mamba_core.training import TrainSettings, train
from mamba_core.version import VERSION
from mamba_core.weights.convert import convert
from mamba_core.weights.opening import open_model

CONFIG = MambaConfig(d_model=112, n_layer=3, vocab_size=256)
SETTINGS = TrainSettings(steps=320, batch_size=8, length=192, learning_rate=6e-3, warmup_steps=20)
REPORT = "report.json"
TASKS = "tasks"  # in the folder of results: those of `make demo-tasks`
PROMPT = "import os\n\ndef "
FIRST_LOSS, LAST_LOSS = 5.0, 2.2  # nats a byte: a model that has learnt nothing has log(256) = 5.55


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", type=Path, help="a text file or folder; Python's standard library")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="where the results go; demo-out"
    )
    parser.add_argument("--backends", metavar="NAMES", help="comma-separated; every one that is installed")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help=f"of training; {SETTINGS.steps}")
    parser.add_argument("--new-tokens", type=int, default=200, metavar="N", help="to generate; 200")
    parser.add_argument("--prompt", default=PROMPT, help="what is continued")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    # The demo's arrays are too small for a framework's threads to pay, and on a busy machine they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = arguments.backends.split(",") if arguments.backends else installed()
    for name in names:
        registry.get(name)
    if not arguments.prompt:
        raise ValueError("--prompt is empty; give at least one character")
    data = standard_library() if arguments.text is None else read_tokens(arguments.text)
    clear(arguments.out, ("model", "mamba_ssm", "hf"))
    checkpoint = arguments.out / "model"

    history = _train(names[0], data, dataclasses.replace(SETTINGS, steps=arguments.steps), checkpoint, arguments.json)
    _say(arguments, f"saved {checkpoint}; now every backend against the float64 reference")
    compared = parity(checkpoint, backends=names, tokens=data[: SETTINGS.length].tolist())
    exact = _converts_exactly(checkpoint, arguments.out)
    _say(arguments, "converted to the mamba_ssm layout and back; now the same prompt on every backend")
    texts = {name: _continue(name, checkpoint, arguments.prompt, arguments.new_tokens) for name in names}

    failures = _divergent(compared) + _different(texts)
    failures += [] if exact else ["the conversion to mamba_ssm and back changed bits"]
    failures += _untrained(history, full=arguments.text is None and arguments.steps >= SETTINGS.steps)
    report = _report(data, history, compared, exact, texts, failures, time.perf_counter() - started)
    (arguments.out / REPORT).write_text(json.dumps(report, indent=1))
    _plot(history, arguments.out / "loss.png")
    if arguments.json:
        print_json(report)
    else:
        _show(arguments, report, history, next(iter(texts.values())))
    return 1 if failures else 0


def clear(out: Path, folders: Iterable[str]) -> None:
    """Make the folder; these folders of an earlier demo in it go, anything else is refused."""
    others = out.exists() and any(entry.name != TASKS for entry in out.iterdir())
    if others and not (out / REPORT).is_file():
        raise ValueError(f"{out}: holds something else than a demo's results; choose another --out")
    for name in folders:
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text("{}\n")  # so that after an interrupt the folder is known for a demo's


def _train(backend: str, data, settings: TrainSettings, checkpoint: Path, quiet: bool) -> list[dict]:
    model = factory.build(CONFIG, backend=backend)
    with progress_bar(quiet) as progress:
        task = progress.add_task(f"train on {backend}", total=settings.steps, status="")

        def log(entry):
            progress.update(task, completed=entry["step"] + 1, status=f"loss {entry['loss']:.3f} nats a byte")

        return train(model, data, settings, log=log, checkpoint=checkpoint)


def _converts_exactly(checkpoint: Path, out: Path) -> bool:
    """To the mamba_ssm layout and back: the same tensors bit for bit, and the same config."""
    convert(checkpoint, out / "mamba_ssm", to="mamba_ssm", overwrite=True)
    convert(out / "mamba_ssm", out / "hf", to="hf", overwrite=True)
    before, after = open_model(checkpoint), open_model(out / "hf")
    same = (
        name == other and value.dtype == array.dtype and value.tobytes() == array.tobytes()
        for (name, value), (other, array) in zip(before.tensors(), after.tensors(), strict=True)
    )
    return before.config == after.config and all(same)


def _continue(name: str, checkpoint: Path, prompt: str, count: int) -> dict:
    """The greedy continuation on one backend, and its speed once compiled."""
    model = factory.load(checkpoint, backend=name)
    generate(model, prompt, max_new_tokens=min(count, 32))
    started = time.perf_counter()
    result = generate(model, prompt, max_new_tokens=count)
    seconds = time.perf_counter() - started
    sampled = generate(model, prompt, max_new_tokens=count, temperature=0.7, top_p=0.95)
    speed = count / seconds
    texts = {"text": (result.text or [""])[0], "sampled": (sampled.text or [""])[0]}
    return texts | {"tokens": result.tokens[0], "tokens_per_second": speed}


def _divergent(compared: Parity) -> list[str]:
    failed = [entry for entry in compared.backends if not entry.passed]
    return [f"{entry.backend} differs from the reference, first at {entry.first_divergent}" for entry in failed]


def _different(texts: dict[str, dict]) -> list[str]:
    first, *others = texts
    return [
        f"{other} continues with other tokens than {first}, from token {_first_difference(texts[first], texts[other])}"
        for other in others
        if texts[other]["tokens"] != texts[first]["tokens"]
    ]


def _first_difference(one: dict, other: dict) -> int:
    pairs = zip(one["tokens"], other["tokens"], strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one["tokens"]), len(other["tokens"])))


def _untrained(history: list[dict], full: bool) -> list[str]:
    first, last = history[0]["loss"], _final_loss(history)
    if full and not (first > FIRST_LOSS and last < LAST_LOSS):
        return [f"the loss went from {first:.2f} to {last:.2f}; expected from above {FIRST_LOSS} to below {LAST_LOSS}"]
    return []


def _final_loss(history: list[dict]) -> float:
    return float(np.mean([entry["loss"] for entry in history[-10:]]))


def _report(data, history, compared, exact, texts, failures, seconds) -> dict:
    rows = {}
    for entry in compared.backends:
        forward = entry.modes["forward"]
        node = max(forward.errors, key=forward.errors.get)
        speed = texts[entry.backend]["tokens_per_second"]
        rows[entry.backend] = {"device": entry.device, "kernels": entry.kernels, "tokens_per_second": speed}
        rows[entry.backend] |= {
            "largest_error": forward.errors[node],
            "where": node,
            "limit": forward.limits[node],
            "passed": entry.passed,
        }
        rows[entry.backend] |= {"errors": forward.errors, "text": texts[entry.backend]["text"]}
        rows[entry.backend] |= {"sampled": texts[entry.backend]["sampled"]}
    return {
        "version": VERSION,
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "parameters": parameter_count(CONFIG),
        "bytes_of_text": len(data),
        "loss": [entry["loss"] for entry in history],
        "conversion_exact": exact,
        "backends": rows,
        "failures": failures,
        "seconds": seconds,
    }


def _plot(history: list[dict], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history])
    axes.set(xlabel="step", ylabel="loss, nats a byte", title="mamba-core demo: byte-level Mamba on Python source")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _show(arguments, report: dict, history: list[dict], texts: dict) -> None:
    for title, text in (("greedy", texts["text"]), ("temperature 0.7, top_p 0.95", texts["sampled"])):
        console.rule(title, align="left")
        console.print(Text.assemble((arguments.prompt, "bold"), text), soft_wrap=True)
    console.rule()
    rows = [
        [
            name,
            row["device"],
            "\n".join(f"{op}: {kernel}" for op, kernel in row["kernels"].items()),
            f"{row['tokens_per_second']:.0f}",
            f"{row['largest_error']:.1e}",
            row["where"],
        ]
        for name, row in report["backends"].items()
    ]
    columns = ["backend", "device", "kernels", "tokens/s", "largest error", "where"]
    print_table("the same checkpoint on every backend, against the float64 reference", columns, rows)
    console.print(
        f"loss {history[0]['loss']:.2f} -> {_final_loss(history):.2f} nats a byte on {report['bytes_of_text']:,} bytes"
    )
    same = len({row["text"] for row in report["backends"].values()}) == 1
    console.print(f"greedy text the same on every backend: {'yes' if same else 'NO'}")
    console.print(f"to mamba_ssm and back, bit for bit: {'yes' if report['conversion_exact'] else 'NO'}")
    files = f"{arguments.out}/loss.png, {arguments.out}/report.json"
    console.print(f"{files}; {report['seconds']:.0f} s in all", soft_wrap=True)
    for failure in report["failures"]:
        console.print(Text.assemble(("FAILED", "red"), f" {failure}"))


def _say(arguments, message: str) -> None:
    if not arguments.json:
        console.print(message)
