"""A training run on disk: what its checkpoint holds beside the model, whether it can be written, and how it goes on."""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mamba_core import factory, registry
from mamba_core.spec.params import parameter_table
from mamba_core.weights.formats import (
    CheckpointError,
    atomic_folder,
    parse_json,
    probe_folder,
    read_input,
    restore_folder,
)
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model

OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "training.json"
TOKENIZER_FILE = "tokenizer.json"
# What is logged of each step, beside its number.
_LOGGED = ("loss", "gradient_norm", "learning_rate")
# Of each parameter that is trained: two moments in float32.
MOMENT_BYTES = 8


def save_checkpoint(path: Path | str, model, trainer, progress: dict, tokenizer: bytes | None = None) -> None:
    """A folder that `mamba_core.load` reads, with the optimizer's state and the log beside the model.

    tokenizer: what the tokenizer.json holds that made the data.
    """
    with atomic_folder(path, overwrite=True) as folder:
        factory.save_into(folder, model, factory.storable(model))
        if tokenizer is not None:
            (folder / TOKENIZER_FILE).write_bytes(tokenizer)
        save_file(trainer.state(), folder / OPTIMIZER_FILE)
        (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=1))


def check_target(checkpoint, resume) -> None:
    """Check that the checkpoint can be written, before the work is done that it is to hold."""
    for folder in (checkpoint, resume):
        if folder is not None:
            restore_folder(folder)
    if checkpoint is None:
        return
    if resume is not None and Path(checkpoint).resolve() == Path(resume).resolve():
        probe_folder(checkpoint, overwrite=True)
        return
    path = Path(checkpoint)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path}: exists; resume the run in it, or choose another folder for the checkpoint")
    probe_folder(path)


def check_room(checkpoint, model, trainer) -> None:
    """Check that the disk has room for a checkpoint, beside the one that it replaces.

    Raises:
        CheckpointError: it has less than the arrays take.
    """
    model_bytes = sum(
        math.prod(parameter.shape) * (4 if parameter.dtype(model.dtype) == "float32" else 2)
        for parameter in parameter_table(model.config).values()
    )
    needed = model_bytes + MOMENT_BYTES * sum(math.prod(shape) for shape in trainer.shapes().values())
    path = Path(checkpoint).resolve()
    free = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free
    if free < needed:
        raise CheckpointError(
            f"{checkpoint}: a checkpoint takes {needed / 1e6:,.0f} MB, and the disk has {free / 1e6:,.0f} MB left; "
            "make room, or choose a folder on another disk"
        )


def digest(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data, dtype=np.int64).data).hexdigest()


def read_progress(path: Path) -> dict:
    """What a checkpoint says of its run: "settings", "data", "config", "history" and "held_out_tokens".

    Raises:
        CheckpointError: it says less, or something else.
    """
    file = path / PROGRESS_FILE
    try:
        progress = {"held_out_tokens": 0} | parse_json(read_input(file))
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{file}: cannot resume: {fault}") from None
    kinds = {"settings": dict, "history": list, "data": str, "config": str, "held_out_tokens": int}
    if faults := [name for name, kind in kinds.items() if not isinstance(progress.get(name), kind)]:
        raise CheckpointError(f"{file}: cannot resume: {', '.join(faults)} missing or of another kind")
    for step, entry in enumerate(progress["history"]):
        if not _is_of_step(entry, step):
            raise CheckpointError(
                f"{file}: cannot resume: entry {step} of the history is not that of step {step}, with "
                f"{', '.join(_LOGGED)} as numbers"
            )
    return progress


def _is_of_step(entry: Any, step: int) -> bool:
    if not isinstance(entry, dict) or not {"step", *_LOGGED} <= entry.keys():
        return False
    # JSON has no NaN, but Python reads it; true is an integer to it.
    numbers = all(isinstance(value, float) and math.isfinite(value) for name, value in entry.items() if name != "step")
    return numbers and type(entry["step"]) is int and entry["step"] == step


def check_same(path: Path, progress: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Check that what the checkpoint says is this run, in every respect.

    Raises:
        ValueError: it is another.
    """
    for name, value in run["settings"].items():
        if progress["settings"].get(name) != value:
            raise ValueError(f"{path} was trained with {name}={progress['settings'].get(name)}, not {value}")
    if progress["data"] != run["data"]:
        raise ValueError(f"{path} was trained on other data")
    if progress["held_out_tokens"] != run["held_out_tokens"]:
        raise ValueError(
            f"{path} held out the last {progress['held_out_tokens']} of its data, not {run['held_out_tokens']}; "
            "a run resumes as is"
        )
    if progress["config"] != run["config"]:
        raise ValueError(f"{path} is a run of a model with another config")


def restore(trainer, model, path: Path, steps: int) -> None:
    """Give the trainer the state after so many steps back. The model must be the checkpoint's.

    Raises:
        ValueError: it is not.
        CheckpointError: the state is broken.
    """
    values = registry.get(model.backend).parameters(model)
    for name, stored in open_model(path).tensors():
        if not np.array_equal(stored, values[name]):
            raise ValueError(f"the model is not the one in {path}, load it from there: {name} differs")
    trainer.load_state(_optimizer_state(path, trainer, steps))


def _optimizer_state(path: Path, trainer, steps: int):
    """The optimizer's state as stored, checked."""
    file = path / OPTIMIZER_FILE
    state = open_checkpoint(file)
    shapes = {f"{moment}.{name}": shape for name, shape in trainer.shapes().items() for moment in "mv"}
    shapes["step"] = ()
    if faults := sorted(set(shapes) ^ set(state)):
        raise CheckpointError(f"{file}: missing or unexpected: {', '.join(faults[:8])}")
    if faults := [name for name, shape in shapes.items() if state.header(name).shape != shape]:
        raise CheckpointError(f"{file}: other shapes than the model's: {', '.join(faults[:8])}")
    if int(state["step"]) != steps:
        raise CheckpointError(f"{file}: the optimizer has made {int(state['step'])} steps, the log has {steps}")
    return state
