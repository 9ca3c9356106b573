"""mamba-core train: train a model on text, with checkpoints and exact resume."""

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mamba_core import architectures, factory
from mamba_core.cli.interrupts import Interrupts
from mamba_core.cli.output import add_backend, add_json, progress_bar
from mamba_core.cli.pace import Pace
from mamba_core.config import from_dict, preset
from mamba_core.data import read_tokens
from mamba_core.runs import PROGRESS_FILE, TOKENIZER_FILE, read_progress
from mamba_core.tokenizer import SubwordTokenizer, source_of
from mamba_core.training import TrainSettings, load_settings, train
from mamba_core.weights.formats import CheckpointError, read_json, restore_folder

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
# Of what resumes a run: what its checkpoint does not say.
_SAID_AGAIN = (
    "data", "out", "held_out", "evaluate_every", "checkpoint_every", "log_every", "device", "dtype", "kernels", "remat",
    "json",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, type=Path, metavar="PATH", help="a text file, a folder of them, or .npy ids"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the checkpoint; written as training goes"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=sorted(architectures.presets()), help="a published size")
    model.add_argument("--config", type=Path, metavar="FILE", help="a config as JSON, in any of the known forms")
    model.add_argument("--init", metavar="CHECKPOINT", help="go on training these weights")
    model.add_argument("--resume", action="store_true", help="go on with the run in --out exactly where it stopped")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json; that of --init or --resume, else bytes"
    )
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--held-out", type=Path, metavar="PATH", help="as --data, never trained on: its loss is shown too"
    )
    held_out.add_argument(
        "--held-out-fraction", type=float, metavar="X", help="instead, this part of --data, the end of it"
    )
    parser.add_argument(
        "--evaluate-every", type=int, metavar="N", help="steps between losses on held-out data; a tenth of the run"
    )
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="steps; 0 for the end only")
    parser.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between lines of --json; 10")
    parser.add_argument("--remat", action="store_true", help="keep less for the gradient, and compute it again")
    parser.add_argument("--init-seed", type=int, default=0, metavar="N", help="of the initial values")
    for name, default in _DEFAULTS.items():
        parser.add_argument(_option(name), type=type(default), metavar="X", help=f"{default}")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    model = _model(arguments)
    model.remat = arguments.remat
    before = len(read_progress(arguments.out)["history"]) if arguments.resume else 0
    tokenizer = arguments.tokenizer or _tokenizer_of(model)
    data, held_out = _data(arguments, tokenizer)
    with Interrupts("the run ends after this step, with a checkpoint") as interrupts:
        reported = _Report(arguments, model.backend, settings, interrupts, before)
        try:
            with reported.progress:
                history = train(
                    model,
                    data,
                    settings,
                    log=reported.log,
                    resume=arguments.out if arguments.resume else None,
                    checkpoint=arguments.out,
                    checkpoint_every=arguments.checkpoint_every,
                    tokenizer=tokenizer,
                    stop=reported.stops,
                    held_out=held_out,
                    evaluate_every=arguments.evaluate_every,
                    evaluating=reported.evaluating,
                )
        except KeyboardInterrupt:
            _say(f"ended at once: {_kept(arguments, model.backend, settings)}")
            return interrupts.status
        stopped = len(history) < settings.steps or reported.cut_short
        if stopped:
            where = " in the last evaluation" if len(history) == settings.steps else ""
            _say(f"stopped{where}: {_kept(arguments, model.backend, settings)}")
        elif before == settings.steps:
            _say(f"the run in {arguments.out} is finished: all its {before} steps were made before")
        reported.end(history)
        return interrupts.status if stopped else 0


class _Report:
    """What is shown of a run while it goes on and at its end, and whether it is to stop."""

    def __init__(self, arguments, backend: str, settings: TrainSettings, interrupts: Interrupts, before: int) -> None:
        """before: the steps that were made before."""
        self.progress = progress_bar(quiet=arguments.json)
        self._task = self.progress.add_task(f"train on {backend}", total=settings.steps, completed=before, status="")
        self._arguments, self._settings, self._interrupts = arguments, settings, interrupts
        self._pace, self._held_out = Pace(settings), ""
        self._fault: OSError | None = None
        self.cut_short = False  # whether the last evaluation was

    def log(self, entry: dict) -> None:
        shown = entry | self._pace.after(entry["step"] + 1)
        if "held_out_loss" in entry:
            self._held_out = f", held-out {entry['held_out_loss']:.4f}"
        self.progress.update(self._task, completed=entry["step"] + 1, status=_status(shown, self._held_out))
        if self._arguments.json and ((entry["step"] + 1) % self._arguments.log_every == 0 or "held_out_loss" in entry):
            self._print(shown)

    def evaluating(self, done: int, batches: int) -> None:
        self._pace.evaluating(done, batches)
        self.cut_short = done < batches
        self.progress.update(self._task, status=f"held-out data: batch {done} of {batches}")

    def stops(self) -> bool:
        return self._interrupts.received is not None or self._fault is not None

    def end(self, history: list[dict]) -> None:
        """Raises OSError where standard output has not taken a line."""
        if self._fault is not None:
            raise self._fault
        if self._arguments.json:
            kept = str(self._arguments.out) if history else None
            print(json.dumps({"checkpoint": kept, "history": history}))
        elif history:
            shown = f"loss {history[0]['loss']:.4f} -> {history[-1]['loss']:.4f}"
            evaluated = [entry["held_out_loss"] for entry in history if "held_out_loss" in entry]
            if evaluated:
                shown += f", held-out {evaluated[0]:.4f} -> {evaluated[-1]:.4f}"
            print(f"{shown}; checkpoint {self._arguments.out}")

    def _print(self, shown: dict) -> None:
        """Nobody may read any more, as when Ctrl-C ends a pipe: the run then ends well before that is told."""
        try:
            print(json.dumps(shown), flush=True)
        except OSError as fault:
            self._fault = self._fault or fault


def _status(shown: dict, held_out: str) -> str:
    status = f"loss {shown['loss']:.4f}{held_out}, rate {shown['learning_rate']:.2e}"
    if "seconds_left" in shown:
        left = datetime.timedelta(seconds=round(shown["seconds_left"]))
        status += f", {shown['tokens_per_second']:,.0f} tokens/s, {left} left"
    return status


def _kept(arguments, backend: str, settings: TrainSettings) -> str:
    """What of the run is in --out, and the command line that goes on with it."""
    if not (arguments.out / PROGRESS_FILE).is_file():
        return "no checkpoint was written"
    steps = len(read_progress(arguments.out)["history"])
    line = shlex.join(_resuming(arguments, backend))
    return f"{arguments.out} holds step {steps} of {settings.steps}; go on with: {line}"


def _resuming(arguments, backend: str) -> list[str]:
    """The words of a command line that goes on with the run. What a checkpoint says is not said again."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["mamba-core", "train", "--resume", "--backend", backend]
    for name in _SAID_AGAIN:
        value: Any = getattr(arguments, name)
        if value is True:
            words += [_option(name)]
        elif value != parser.get_default(name):
            text = ",".join(map("=".join, value.items())) if isinstance(value, dict) else str(value)
            words += [f"{_option(name)}={text}"] if text.startswith("-") else [_option(name), text]
    return words


def _settings(arguments) -> TrainSettings:
    """Those that are given, or of the run that is resumed."""
    if arguments.log_every < 1:
        raise ValueError(f"--log-every is {arguments.log_every}; expected at least 1")
    restore_folder(arguments.out)
    given = {name: value for name in _DEFAULTS if (value := getattr(arguments, name)) is not None}
    if arguments.resume:
        return _resumed(arguments.out, given)
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        raise CheckpointError(f"{arguments.out}: exists; go on with it by --resume, or choose another --out")
    return TrainSettings(**given)


def _model(arguments):
    where = {"backend": arguments.backend, "device": arguments.device, "kernels": arguments.kernels}
    if arguments.resume or arguments.init:
        return factory.load(arguments.out if arguments.resume else arguments.init, dtype=arguments.dtype, **where)
    config = preset(arguments.preset or "mamba-130m")
    if arguments.config is not None:
        fields = read_json(arguments.config)
        try:
            config = from_dict(fields)
        except (ValueError, TypeError) as fault:
            raise ValueError(f"{arguments.config}: {fault}") from None
    return factory.build(config, dtype=arguments.dtype or "float32", seed=arguments.init_seed, **where)


def _tokenizer_of(model) -> Path | None:
    """The tokenizer.json beside the weights that training begins with."""
    folder = source_of(model)
    return folder / TOKENIZER_FILE if folder is not None and (folder / TOKENIZER_FILE).is_file() else None


def _data(arguments, tokenizer: Path | None) -> tuple[np.ndarray, np.ndarray | float | None]:
    """What is trained on, and what is held out."""
    texts = [path for path in (arguments.data, arguments.held_out) if path is not None and path.suffix != ".npy"]
    encoder = SubwordTokenizer(tokenizer) if texts and tokenizer is not None else None
    if arguments.held_out is None:
        return read_tokens(arguments.data, encoder), arguments.held_out_fraction
    data, held_out = arguments.data.resolve(), arguments.held_out.resolve()
    if held_out.is_relative_to(data) or data.is_relative_to(held_out):
        raise ValueError(
            f"--held-out {arguments.held_out} and --data {arguments.data} hold the same files, so that it would be "
            "trained on; move it elsewhere, or give --held-out-fraction"
        )
    return read_tokens(arguments.data, encoder), read_tokens(arguments.held_out, encoder)


def _resumed(path: Path, given: dict) -> TrainSettings:
    settings = load_settings(path)
    for name, value in given.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"{_option(name)} {value} differs from the run's {getattr(settings, name)}; a run resumes as is"
            )
    return settings


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _say(text: str) -> None:
    print(f"mamba-core: {text}", file=sys.stderr)
