"""What training has in common on every backend: the settings, the schedule, the data and the checkpoints.

The arithmetic of a step (loss, gradients, AdamW) is native: see `training.py` of each backend. A batch depends on the
seed and the number of the step alone, and the optimizer's moments are saved under canonical parameter names, so a run
resumes exactly, on the same backend or on another.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mamba_core import factory, registry
from mamba_core.spec.init import random_stream
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
from mamba_core.wrappers import unwrap

OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "training.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: updates in all; the schedule is a function of this.
        batch_size, length: sequences in a batch and tokens in a sequence.
        learning_rate: the peak, reached after warmup_steps, from where a cosine falls to final_fraction of it.
        beta1, beta2, eps, weight_decay: of AdamW. Parameters that the table exempts are not decayed.
        clip_norm: gradients are scaled down to this global norm.
        seed: of the batches.
    """

    steps: int = 1000
    batch_size: int = 8
    length: int = 256
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, least in {"steps": 1, "batch_size": 1, "length": 1, "warmup_steps": 0, "seed": 0}.items():
            value = getattr(self, name)
            self._expect(name, isinstance(value, int) and value >= least, f"an integer, at least {least}")
        for name in ("learning_rate", "eps", "clip_norm"):
            self._expect(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("beta1", "beta2"):
            self._expect(name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        self._expect("final_fraction", 0 <= self.final_fraction <= 1, "a number from 0 to 1")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    def rate(self, step: int) -> float:
        """The learning rate of update number `step`, from 0: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def batch(data: np.ndarray, settings: TrainSettings, step: int) -> np.ndarray:
    """(batch_size, length + 1) int32: windows of the data at places drawn for this step."""
    windows = len(data) - settings.length
    if windows < 1:
        raise ValueError(f"the data has {len(data)} tokens; expected more than length={settings.length}")
    starts = random_stream(settings.seed, f"batch.{step}").integers(0, windows, settings.batch_size)
    return np.stack([data[start : start + settings.length + 1] for start in starts]).astype(np.int32)


def train(
    model: Any,
    data: np.ndarray,
    settings: TrainSettings,
    *,
    log: Callable[[dict], None] | None = None,
    resume: Path | str | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 0,
    tokenizer: Path | str | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[dict]:
    """Train a model in place.

    A model in half precision keeps no float32 copy of its parameters, so updates below its rounding are lost: train in
    float32 unless memory forbids it.

    Args:
        data: (tokens,) ints; windows of it are the batches.
        log: called after every update with {"step", "loss", "gradient_norm", "learning_rate"}.
        resume: a folder that `save_checkpoint` wrote, whose model `model` is.
        checkpoint: a folder to write, after every `checkpoint_every` updates (0 for the end only) and at the end. It
            must be new, or the one that is resumed.
        tokenizer: the tokenizer.json that made the data, kept in the checkpoint.
        stop: asked after every update; where it says so, the checkpoint is written and the run ends early.

    Returns:
        What was logged, one entry an update, those before the resumption included.

    Raises:
        TypeError: this is no model of this library, or one that is spread over processes.
        ValueError: the data does not fit the model or the settings, the run cannot be resumed with these, nothing of
            the model can be trained, or a checkpoint cannot hold it.
        CheckpointError: the checkpoint's folder holds something else, or what is resumed is broken.
        FloatingPointError: the loss is no longer finite.
    """
    if type(model).__name__ == "DistributedDataParallel":
        raise TypeError("model is DistributedDataParallel, but train runs in one process; give it model.module")
    model = unwrap(model, "training")
    data = _checked(data, model.config)
    if not (isinstance(checkpoint_every, int) and checkpoint_every >= 0):
        raise ValueError(f"checkpoint_every is {checkpoint_every!r}; expected an integer >= 0")
    if checkpoint is not None or resume is not None:
        factory.storable(model)  # refused now rather than at the end, where the files cannot hold the model
    _check_target(checkpoint, resume)
    trainer = registry.get(model.backend).trainer(model, settings)
    run = {"settings": dataclasses.asdict(settings), "data": _digest(data), "config": model.config.fingerprint}
    history = [] if resume is None else _restore(trainer, model, Path(resume), run)
    for step in range(len(history), settings.steps):
        loss, norm = trainer.step(batch(data, settings, step))
        entry = {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": settings.rate(step)}
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; lower the learning rate")
        history.append(entry)
        if log:
            log(entry)
        last = step + 1 == settings.steps or (stop is not None and stop())
        if checkpoint is not None and (last or (checkpoint_every and (step + 1) % checkpoint_every == 0)):
            save_checkpoint(checkpoint, model, trainer, run | {"history": history}, tokenizer)
        if last:
            break
    return history


def save_checkpoint(path: Path | str, model, trainer, progress: dict, tokenizer: Path | str | None = None) -> None:
    """A folder that `mamba_core.load` reads, with the optimizer's state and the log beside the model."""
    kept = None if tokenizer is None else read_input(tokenizer)
    with atomic_folder(path, overwrite=True) as folder:
        factory.save_into(folder, model, factory.storable(model))
        if kept is not None:
            (folder / TOKENIZER_FILE).write_bytes(kept)
        save_file(trainer.state(), folder / OPTIMIZER_FILE)
        (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=1))


def load_settings(path: Path | str) -> TrainSettings:
    """The settings that a checkpoint was trained with."""
    path = Path(path)
    try:
        return TrainSettings(**_progress(path)["settings"])
    except TypeError as fault:
        raise CheckpointError(f"{path / PROGRESS_FILE}: cannot resume: {fault}") from None


def _checked(data, config) -> np.ndarray:
    data = np.asanyarray(data)
    if data.ndim != 1 or data.dtype.kind not in "iu":
        raise ValueError(f"the data is {data.dtype} of shape {data.shape}; expected one axis of integers")
    if data.size and not (int(data.min()) >= 0 and int(data.max()) < config.vocab_size):
        raise ValueError(f"the data holds tokens {data.min()} to {data.max()}; vocab_size is {config.vocab_size}")
    return data


def _check_target(checkpoint, resume) -> None:
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


def _digest(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data, dtype=np.int64).data).hexdigest()


def _restore(trainer, model, path: Path, run: dict) -> list[dict]:
    """Give the trainer its state back; what is resumed must be this run, in every respect."""
    progress = _progress(path)
    for name, value in run["settings"].items():
        if progress["settings"].get(name) != value:
            raise ValueError(f"{path} was trained with {name}={progress['settings'].get(name)}, not {value}")
    if progress["data"] != run["data"]:
        raise ValueError(f"{path} was trained on other data")
    if progress["config"] != run["config"]:
        raise ValueError(f"{path} is a run of a model with another config")
    values = registry.get(model.backend).parameters(model)
    for name, stored in open_model(path).tensors():
        if not np.array_equal(stored, values[name]):
            raise ValueError(f"the model is not the one in {path}, load it from there: {name} differs")
    trainer.load_state(_optimizer_state(path, trainer, len(progress["history"])))
    return progress["history"]


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


def _progress(path: Path) -> dict:
    file = path / PROGRESS_FILE
    try:
        progress = parse_json(read_input(file))
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{file}: cannot resume: {fault}") from None
    kinds = {"settings": dict, "history": list, "data": str, "config": str}
    if faults := [name for name, kind in kinds.items() if not isinstance(progress.get(name), kind)]:
        raise CheckpointError(f"{file}: cannot resume: {', '.join(faults)} missing or of another kind")
    return progress
