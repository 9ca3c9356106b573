"""mamba-core train: train a model on text, with checkpoints and exact resume."""

import argparse
import dataclasses
from pathlib import Path

from mamba_core import architectures, factory
from mamba_core.cli.output import add_backend, add_json, console, print_json, progress_bar
from mamba_core.config import from_dict, preset
from mamba_core.data import read_tokens
from mamba_core.tokenizer import SubwordTokenizer
from mamba_core.training import TOKENIZER_FILE, TrainSettings, load_settings, train
from mamba_core.weights.formats import CheckpointError, parse_json

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
    parser.add_argument("--remat", action="store_true", help="keep less for the gradient, and compute it again")
    parser.add_argument("--init-seed", type=int, default=0, metavar="N", help="of the initial values")
    for name, default in _DEFAULTS.items():
        parser.add_argument(_option(name), type=type(default), metavar="X", help=f"{default}")
    add_backend(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    given = {name: value for name in _DEFAULTS if (value := getattr(arguments, name)) is not None}
    settings = _resumed(arguments.out, given) if arguments.resume else TrainSettings(**given)
    if not arguments.resume and arguments.out.exists() and any(arguments.out.iterdir()):
        raise CheckpointError(f"{arguments.out}: exists; go on with it by --resume, or choose another --out")
    tokenizer = arguments.tokenizer
    if arguments.resume and (arguments.out / TOKENIZER_FILE).is_file():
        tokenizer = tokenizer or arguments.out / TOKENIZER_FILE
    data = read_tokens(arguments.data, None if tokenizer is None else SubwordTokenizer(tokenizer))
    model = _model(arguments)
    model.remat = arguments.remat
    with progress_bar(quiet=arguments.json) as progress:
        task = progress.add_task(f"train on {model.backend}", total=settings.steps, status="")

        def log(entry):
            progress.update(task, completed=entry["step"] + 1, status=f"loss {entry['loss']:.4f}")

        history = train(
            model,
            data,
            settings,
            log=log,
            resume=arguments.out if arguments.resume else None,
            checkpoint=arguments.out,
            checkpoint_every=arguments.checkpoint_every,
            tokenizer=tokenizer,
        )
    if arguments.json:
        print_json({"checkpoint": str(arguments.out), "history": history})
    else:
        console.print(f"loss {history[0]['loss']:.4f} -> {history[-1]['loss']:.4f}; checkpoint {arguments.out}")
    return 0


def _model(arguments):
    where = {"backend": arguments.backend, "device": arguments.device, "kernels": arguments.kernels}
    if arguments.resume or arguments.init:
        return factory.load(arguments.out if arguments.resume else arguments.init, dtype=arguments.dtype, **where)
    config = preset(arguments.preset or "mamba-130m")
    if arguments.config is not None:
        try:
            config = from_dict(parse_json(arguments.config.read_bytes()))
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
