"""mamba-core train: train a model on text, with checkpoints and exact resume."""

import argparse
import dataclasses
import datetime
import json
import shlex
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from mamba_core import architectures, factory
from mamba_core.cli.output import add_backend, add_json, console, progress_bar
from mamba_core.config import from_dict, preset
from mamba_core.data import read_tokens
from mamba_core.tokenizer import SubwordTokenizer
from mamba_core.training import TOKENIZER_FILE, TrainSettings, load_settings, train
from mamba_core.weights.formats import CheckpointError, read_json, restore_folder

SIGNALLED = 128  # plus the signal's number is the exit status of what a signal ended, as shells have it
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainSettings)}


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
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json; bytes without one")
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="steps; 0 for the end only")
    parser.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between lines of --json; 10")
    parser.add_argument("--remat", action="store_true", help="keep less for the gradient, and compute it again")
    parser.add_argument("--init-seed", type=int, default=0, metavar="N", help="of the initial values")
    for name, default in _DEFAULTS.items():
        parser.add_argument(_option(name), type=type(default), metavar="X", help=f"{default}")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    restore_folder(arguments.out)
    given = {name: value for name in _DEFAULTS if (value := getattr(arguments, name)) is not None}
    settings = _resumed(arguments.out, given) if arguments.resume else TrainSettings(**given)
    if not arguments.resume and arguments.out.exists() and any(arguments.out.iterdir()):
        raise CheckpointError(f"{arguments.out}: exists; go on with it by --resume, or choose another --out")
    tokenizer = arguments.tokenizer
    if arguments.resume and (arguments.out / TOKENIZER_FILE).is_file():
        tokenizer = tokenizer or arguments.out / TOKENIZER_FILE
    data = read_tokens(arguments.data, None if tokenizer is None else SubwordTokenizer(tokenizer))
    if arguments.log_every < 1:
        raise ValueError(f"--log-every is {arguments.log_every}; expected at least 1")
    model = _model(arguments)
    model.remat = arguments.remat
    with progress_bar(quiet=arguments.json) as progress, _Signals() as signals:
        task = progress.add_task(f"train on {model.backend}", total=settings.steps, status="")
        pace = _Pace(settings)

        def log(entry):
            entry = entry | pace.after(entry["step"] + 1)
            progress.update(task, completed=entry["step"] + 1, status=_status(entry))
            if arguments.json and (entry["step"] + 1) % arguments.log_every == 0:
                print(json.dumps(entry), flush=True)

        history = train(
            model,
            data,
            settings,
            log=log,
            resume=arguments.out if arguments.resume else None,
            checkpoint=arguments.out,
            checkpoint_every=arguments.checkpoint_every,
            tokenizer=tokenizer,
            stop=lambda: signals.received is not None,
        )
    if arguments.json:
        print(json.dumps({"checkpoint": str(arguments.out), "history": history}))
    else:
        console.print(f"loss {history[0]['loss']:.4f} -> {history[-1]['loss']:.4f}; checkpoint {arguments.out}")
    if len(history) == settings.steps or signals.received is None:
        return 0
    line = shlex.join(["mamba-core", "train", "--data", str(arguments.data), "--out", str(arguments.out), "--resume"])
    print(f"mamba-core: stopped after step {len(history)} of {settings.steps}; go on with: {line}", file=sys.stderr)
    return SIGNALLED + signals.received


class _Signals:
    """While it is entered, the first Ctrl-C or SIGTERM is kept here, for the run to end well; the second ends it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._receive) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("mamba-core: ends after this step, with a checkpoint; once more ends it at once", file=sys.stderr)


class _Pace:
    """How fast a run is, over the steps of the last seconds: the first step compiles."""

    SECONDS = 30.0

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._times: deque[tuple[int, float]] = deque()

    def after(self, steps: int) -> dict[str, float]:
        """tokens_per_second and seconds_left; nothing after the first step."""
        now = time.perf_counter()
        self._times.append((steps, now))
        while len(self._times) > 2 and now - self._times[1][1] > self.SECONDS:
            self._times.popleft()
        first, began = self._times[0]
        if steps == first:
            return {}
        seconds = (now - began) / (steps - first)
        tokens = self._settings.batch_size * self._settings.length
        return {"tokens_per_second": tokens / seconds, "seconds_left": seconds * (self._settings.steps - steps)}


def _status(entry: dict) -> str:
    shown = f"loss {entry['loss']:.4f}  rate {entry['learning_rate']:.2e}"
    if "seconds_left" in entry:
        left = datetime.timedelta(seconds=round(entry["seconds_left"]))
        shown += f"  {entry['tokens_per_second']:,.0f} tokens/s  {left} left"
    return shown


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
