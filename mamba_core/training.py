"""What training has in common on every backend: the settings, the schedule, the data and the checkpoints.

The arithmetic of a step (loss, gradients, AdamW) is native: see `train.py` of each backend. A batch depends on the seed
and the number of the step alone, and the optimizer's moments are saved under canonical parameter names, so a run
resumes exactly, on the same backend or on another.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mamba_core import factory, registry
from mamba_core.spec.init import random_stream
from mamba_core.weights.io import CheckpointError, atomic_folder, open_checkpoint

OPTIMIZER_FILE = "optimizer.safetensors"


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
        for name in ("steps", "batch_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("learning_rate", "eps", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("beta1", "beta2", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1")

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
    model,
    data: np.ndarray,
    settings: TrainSettings,
    *,
    log: Callable[[dict], None] | None = None,
    resume: Path | str | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 0,
) -> list[dict]:
    """Train a model in place.

    Args:
        data: (tokens,) ints; windows of it are the batches.
        log: called after every update with {"step", "loss", "gradient_norm", "learning_rate"}.
        resume: a folder that `save_checkpoint` wrote, whose model `model` is.
        checkpoint: a folder to write, after every `checkpoint_every` updates (0 for never) and at the end.

    Returns:
        What was logged, one entry an update, those before the resumption included.
    """
    if data.size and not (int(data.min()) >= 0 and int(data.max()) < model.config.vocab_size):
        raise ValueError(f"the data holds tokens {data.min()} to {data.max()}; vocab_size is {model.config.vocab_size}")
    trainer = registry.get(model.backend).trainer(model, settings)
    history = []
    if resume is not None:
        history = _restore(trainer, Path(resume), settings)
    for step in range(len(history), settings.steps):
        loss, norm = trainer.step(batch(data, settings, step))
        entry = {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": settings.rate(step)}
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; lower the learning rate")
        history.append(entry)
        if log:
            log(entry)
        last = step + 1 == settings.steps
        if checkpoint is not None and (last or (checkpoint_every and (step + 1) % checkpoint_every == 0)):
            save_checkpoint(checkpoint, model, trainer, settings, history)
    return history


def save_checkpoint(path: Path | str, model, trainer, settings: TrainSettings, history: list[dict]) -> None:
    """A folder that `mamba_core.load` reads, with the optimizer's state and the log beside the model."""
    with atomic_folder(path, overwrite=True) as folder:
        factory.save_into(folder, model)
        save_file(trainer.state(), folder / OPTIMIZER_FILE)
        progress = {"settings": dataclasses.asdict(settings), "history": history}
        (folder / "training.json").write_text(json.dumps(progress, indent=1))


def load_settings(path: Path | str) -> TrainSettings:
    """The settings that a checkpoint was trained with."""
    return TrainSettings(**_progress(Path(path))["settings"])


def _restore(trainer, path: Path, settings: TrainSettings) -> list[dict]:
    progress = _progress(path)
    if progress["settings"] != dataclasses.asdict(settings):
        changed = {key for key, value in dataclasses.asdict(settings).items() if progress["settings"].get(key) != value}
        raise ValueError(f"{path} was trained with other settings: {', '.join(sorted(changed))} differ")
    trainer.load_state(open_checkpoint(path / OPTIMIZER_FILE))
    return progress["history"]


def _progress(path: Path) -> dict:
    try:
        return json.loads((path / "training.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'training.json'}: cannot resume: {error}") from None
