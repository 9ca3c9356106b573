"""mamba-core train: train a model on data of its task, with checkpoints and exact resume."""

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from mamba_core import architectures, datasets, factory, reports, tasks
from mamba_core.cli.interrupts import Interrupts
from mamba_core.cli.output import add_backend, add_json, progress_bar
from mamba_core.cli.pace import Pace
from mamba_core.config import from_dict, preset
from mamba_core.runs import PROGRESS_FILE, TOKENIZER_FILE, read_progress
from mamba_core.tokenizer import SubwordTokenizer, source_of
from mamba_core.training import TrainSettings, load_settings, train
from mamba_core.weights.formats import CheckpointError, read_json, restore_folder
from mamba_core.weights.opening import open_model

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
_HELP = {
    "steps": "updates in all",
    "batch_size": "examples in a batch",
    "length": "tokens in an example, or values of a series before its forecast",
    "learning_rate": "the highest, after the warm-up",
    "warmup_steps": "steps in which the rate rises",
    "final_fraction": "of the rate, at the end",
    "clip_norm": "the largest norm of a gradient",
    "seed": "of the batches, and of what is held out",
}
# Of what resumes a run: what its checkpoint does not say.
_SAID_AGAIN = (
    "data", "out", "held_out", "evaluate_every", "checkpoint_every", "log_every", "device", "dtype", "kernels", "remat",
    "json",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "; ".join(f"{_words(task)}: {datasets.find(task).DATA}" for task in datasets.names())
    parser.add_argument("--data", required=True, type=Path, metavar="PATH", help=what)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the checkpoint; written as training goes"
    )
    parser.add_argument(
        "--task",
        type=lambda text: text.replace("-", "_"),
        choices=datasets.names(),
        metavar="NAME",
        help=f"{', '.join(map(_words, datasets.names()))}; by default the config's",
    )
    whole = parser.add_argument_group("the model")
    model = whole.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=sorted(architectures.presets()), metavar="NAME", help=_presets())
    model.add_argument("--config", type=Path, metavar="FILE", help="a config as JSON, in any of the known forms")
    model.add_argument("--init", metavar="CHECKPOINT", help="go on training these weights")
    model.add_argument("--resume", action="store_true", help="go on with the run in --out exactly where it stopped")
    whole.add_argument("--new-head", action="store_true", help="with --init: a head of its own for the data's labels")
    others = parser.add_argument_group("how data is read")
    others.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json; that of --init or --resume, else bytes"
    )
    for names, options in datasets.options().items():
        group = parser.add_argument_group(f"data of --task {', '.join(map(_words, names))}")
        for option in options:
            metavar, count = "N" if option.type is int else "NAME", "+" if option.several else None
            group.add_argument(option.flag, type=option.type, nargs=count, metavar=metavar, help=option.help)
    _add_held_out(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="steps; 0 for the end only")
    run.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between lines of --json; 10")
    run.add_argument("--remat", action="store_true", help="keep less for the gradient, and compute it again")
    run.add_argument("--init-seed", type=int, default=0, metavar="N", help="of the initial values")
    for name, default in _DEFAULTS.items():
        said = f"{_HELP[name]}; {default}" if name in _HELP else f"of AdamW; {default}"
        run.add_argument(_option(name), type=type(default), metavar="X", help=said)
    add_backend(parser)
    add_json(parser)


def _add_held_out(parser: argparse.ArgumentParser) -> None:
    whole = parser.add_argument_group("held-out data")
    held_out = whole.add_mutually_exclusive_group()
    held_out.add_argument(
        "--held-out", type=Path, metavar="PATH", help="as --data, never trained on: its loss is shown too"
    )
    own = {task: datasets.find(task).HELD_OUT for task in datasets.names()}
    usual = "; ".join(f"{_words(task)}: {fraction or 'nothing'}" for task, fraction in own.items())
    held_out.add_argument(
        "--held-out-fraction",
        type=float,
        metavar="X",
        help=f"instead, this part of --data: the end of a text or a series, a part of each class. By default {usual}",
    )
    whole.add_argument(
        "--evaluate-every", type=int, metavar="N", help="steps between losses on held-out data; a tenth of the run"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.new_head and not arguments.init:
        raise ValueError("--new-head is given without --init; a model that begins anew has no other head")
    settings = _settings(arguments)
    model, data, tokenizer = _begun(arguments, settings)
    model.remat = arguments.remat
    before = len(read_progress(arguments.out)["history"]) if arguments.resume else 0
    with Interrupts("the run ends after this step, with a checkpoint") as interrupts:
        reported = _Report(arguments, model, settings, interrupts, before)
        try:
            with reported.progress:
                history = train(
                    model,
                    data.examples,
                    settings,
                    log=reported.log,
                    resume=arguments.out if arguments.resume else None,
                    checkpoint=arguments.out,
                    checkpoint_every=arguments.checkpoint_every,
                    tokenizer=tokenizer,
                    stop=reported.stops,
                    held_out=data.held_out,
                    evaluate_every=arguments.evaluate_every,
                    evaluating=reported.evaluating,
                    metrics=data.metrics if data.measures else None,
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
        reported.end(history, None if stopped else reports.finish(data, model, history, arguments.out))
        return interrupts.status if stopped else 0


class _Report:
    """What is shown of a run while it goes on and at its end, and whether it is to stop."""

    def __init__(self, arguments, model, settings: TrainSettings, interrupts: Interrupts, before: int) -> None:
        """before: the steps that were made before."""
        self.progress = progress_bar(quiet=arguments.json)
        described = f"train on {model.backend}"
        self._task = self.progress.add_task(described, total=settings.steps, completed=before, status="")
        self._arguments, self._settings, self._interrupts = arguments, settings, interrupts
        self._unit = "examples" if tasks.of(model.config).labelled else "tokens"
        self._pace, self._held_out = Pace(settings, self._unit), ""
        self._fault: OSError | None = None
        self.cut_short = False  # whether the last evaluation was

    def log(self, entry: dict) -> None:
        shown = entry | self._pace.after(entry["step"] + 1)
        if "held_out_loss" in entry:
            self._held_out = f", held-out {entry['held_out_loss']:.4f}" + reports.measured(entry)
        status = _status(shown, self._held_out, self._unit)
        self.progress.update(self._task, completed=entry["step"] + 1, status=status)
        if self._arguments.json and ((entry["step"] + 1) % self._arguments.log_every == 0 or "held_out_loss" in entry):
            self._print(shown)

    def evaluating(self, done: int, batches: int) -> None:
        self._pace.evaluating(done, batches)
        self.cut_short = done < batches
        self.progress.update(self._task, status=f"held-out data: batch {done} of {batches}")

    def stops(self) -> bool:
        return self._interrupts.received is not None or self._fault is not None

    def end(self, history: list[dict], report: dict | None) -> None:
        """report: of `reports.finish`, None for a run that goes on.

        Raises:
            OSError: standard output has not taken a line.
        """
        if self._fault is not None:
            raise self._fault
        if self._arguments.json:
            kept = str(self._arguments.out) if history else None
            print(json.dumps({"checkpoint": kept, "history": history} | ({"report": report} if report else {})))
        elif history:
            shown = f"loss {history[0]['loss']:.4f} -> {history[-1]['loss']:.4f}"
            evaluated = [entry["held_out_loss"] for entry in history if "held_out_loss" in entry]
            if evaluated:
                shown += f", held-out {evaluated[0]:.4f} -> {evaluated[-1]:.4f}"
            print(f"{shown}; checkpoint {self._arguments.out}")
            for line in reports.lines(report) if report else ():
                print(line)

    def _print(self, shown: dict) -> None:
        """Nobody may read any more, as when Ctrl-C ends a pipe: the run then ends well before that is told."""
        try:
            print(json.dumps(shown), flush=True)
        except OSError as fault:
            self._fault = self._fault or fault


def _status(shown: dict, held_out: str, unit: str) -> str:
    status = f"loss {shown['loss']:.4f}{held_out}, rate {shown['learning_rate']:.2e}"
    if "seconds_left" in shown:
        left = datetime.timedelta(seconds=round(shown["seconds_left"]))
        status += f", {shown[f'{unit}_per_second']:,.0f} {unit}/s, {left} left"
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


def _begun(arguments, settings: TrainSettings) -> tuple[Any, datasets.Data, Path | None]:
    """The model, its data, and the tokenizer.json that made the data."""
    where = {"backend": arguments.backend, "device": arguments.device, "kernels": arguments.kernels}
    if arguments.resume:
        model = factory.load(arguments.out, dtype=arguments.dtype, **where)
        data, tokenizer = _data(arguments, settings, model.config, source_of(model))
        return model, data, tokenizer
    if arguments.init:
        opened = open_model(arguments.init)
        config = datasets.without_labels(opened.config) if arguments.new_head else opened.config
        data, tokenizer = _data(arguments, settings, config, opened.folder)
        more = {"dtype": arguments.dtype, "seed": arguments.init_seed, "new_head": arguments.new_head}
        return factory.begin(opened, data.config, **more, **where), data, tokenizer
    data, tokenizer = _data(arguments, settings, _config(arguments), None)
    model = factory.build(data.config, dtype=arguments.dtype or "float32", seed=arguments.init_seed, **where)
    return model, data, tokenizer


def _config(arguments) -> Any:
    """That of a new model."""
    if arguments.config is None:
        return preset(arguments.preset) if arguments.preset else datasets.preset_of(arguments.task or "lm")
    fields = read_json(arguments.config)
    try:
        return from_dict(fields)
    except (ValueError, TypeError) as fault:
        raise ValueError(f"{arguments.config}: {fault}") from None


def _data(arguments, settings: TrainSettings, config: Any, folder: Path | None) -> tuple[datasets.Data, Path | None]:
    """The data for a model of that config, whose checkpoint is in the folder, and its tokenizer.json."""
    task = arguments.task or config.task
    texts = datasets.find(task).TEXTS
    if arguments.tokenizer is not None and not texts:
        raise ValueError(f"--tokenizer is given, but data of task {task!r} has no text; leave it out")
    kept = None if folder is None else folder / TOKENIZER_FILE
    tokenizer = arguments.tokenizer or (kept if texts and kept is not None and kept.is_file() else None)
    paths = [path for path in (arguments.data, arguments.held_out) if path is not None and path.suffix != ".npy"]
    encoder = SubwordTokenizer(tokenizer) if paths and tokenizer is not None else None
    options = {
        option.name: getattr(arguments, option.name) for found in datasets.options().values() for option in found
    }
    fraction = arguments.held_out_fraction
    data = datasets.read(
        arguments.data,
        config,
        task=task,
        held_out=arguments.held_out if fraction is None else fraction,
        length=settings.length,
        seed=settings.seed,
        tokenizer=encoder,
        resume=arguments.resume,
        **options,
    )
    if data.measures:
        reports.check()
    return data, tokenizer


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


def _words(task: str) -> str:
    """The task as it is named here."""
    return task.replace("_", "-")


def _presets() -> str:
    return f"a published size: {', '.join(sorted(architectures.presets()))}"


def _say(text: str) -> None:
    print(f"mamba-core: {text}", file=sys.stderr)
