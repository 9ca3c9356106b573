"""What training has in common on every backend: the settings, the schedule, the batches and the loop.

The arithmetic of a step (loss, gradients, AdamW) is native: see `training.py` of each backend. A batch depends on the
seed and the number of the step alone, and the optimizer's moments are saved under canonical parameter names, so a run
resumes exactly, on the same backend or on another.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mamba_core import batches, evaluation, factory, registry, runs
from mamba_core.batches import Examples, Tokens, batch
from mamba_core.evaluation import HeldOut, HeldOutExamples
from mamba_core.runs import save_checkpoint
from mamba_core.weights.formats import CheckpointError, read_input
from mamba_core.weights.tables import write_config
from mamba_core.wrappers import unwrap

__all__ = ["TrainSettings", "batch", "load_settings", "save_checkpoint", "train"]


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
            # True is an integer to Python, and a settings file may hold it.
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._expect(name, whole and value >= least, f"an integer, at least {least}")
        for name in ("learning_rate", "eps", "clip_norm"):
            self._expect(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("beta1", "beta2"):
            self._expect(name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        self._expect("final_fraction", 0 <= self.final_fraction <= 1, "a number from 0 to 1")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {reprlib.repr(getattr(self, name))}; expected {expected}")

    def rate(self, step: int) -> float:
        """The learning rate of update number `step`, from 0: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def train(
    model: Any,
    data: Any,
    settings: TrainSettings,
    *,
    log: Callable[[dict], None] | None = None,
    resume: Path | str | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 0,
    tokenizer: Path | str | None = None,
    stop: Callable[[], bool] | None = None,
    held_out: np.ndarray | float | None = None,
    evaluate_every: int | None = None,
    evaluating: Callable[[int, int], None] | None = None,
    metrics: Callable[[np.ndarray], Mapping[str, float]] | None = None,
) -> list[dict]:
    """Train a model in place.

    A model in half precision keeps no float32 copy of its parameters, so updates below its rounding are lost: train in
    float32 unless memory forbids it.

    Args:
        data: (tokens,) ints; windows of it are the batches. Of a labelled task, the examples: a mapping with "inputs"
            and "targets" and where they are needed "mask" and the task's extras, or a tuple of the first two or three.
            Their first axis is of examples, of which every one is in a batch before one comes again; `length` is not
            used.
        log: called after every update with {"step", "loss", "gradient_norm", "learning_rate"}, and where there was an
            evaluation "held_out_loss": the mean cross-entropy in nats of every held-out token but the first, each
            predicted once, in windows of `length` (`mamba_core.evaluation`), or the mean loss of the held-out examples.
        resume: a folder that `save_checkpoint` wrote, whose model `model` is.
        checkpoint: a folder to write, after every `checkpoint_every` updates (0 for the end only) and at the end. It
            must be new, or the one that is resumed.
        tokenizer: the tokenizer.json that made the data, kept in the checkpoint.
        stop: asked before the first update, after every one, and before every batch of an evaluation. Where it says so,
            the run ends early, with a checkpoint if it has made an update. An evaluation that it cuts short is made
            when the run is resumed.
        held_out: data that is never trained on: as `data`, or the fraction of `data` that is kept apart. That is the
            end of the data, in one piece, so that no window of a batch reaches into it. A checkpoint remembers how
            much it is, and a resumed run holds out the same.
        evaluate_every: updates from one evaluation to the next, 0 for the end of the run only; by default a tenth of
            the run. An evaluation changes no bit of a later update, so a resumed run may choose another.
        evaluating: called during an evaluation with the number of batches done and of all.
        metrics: of a labelled task: called at each evaluation with the model's outputs for the held-out examples, in
            their order (`mamba_core.backend.Trainer.predict`). Its numbers are logged beside the loss on held-out data.

    Returns:
        What was logged, one entry an update, those before the resumption included.

    Raises:
        TypeError: this is no model of this library, or one that is spread over processes.
        ValueError: the data does not fit the model or the settings, the run cannot be resumed with these, nothing of
            the model can be trained, or a checkpoint cannot hold it.
        CheckpointError: the checkpoint's folder holds something else, its disk has no room for it, or what is resumed
            is broken.
        FloatingPointError: a loss or the gradient is no longer finite.
    """
    if type(model).__name__ == "DistributedDataParallel":
        raise TypeError("model is DistributedDataParallel, but train runs in one process; give it model.module")
    model = unwrap(model, "training")
    _check_count("checkpoint_every", checkpoint_every)
    if checkpoint is not None or resume is not None:
        # Refused now rather than at the end, where the files cannot hold the model.
        factory.storable(model)
        write_config("hf", model.config)
    runs.check_target(checkpoint, resume)
    kept = None if tokenizer is None else read_input(tokenizer)
    path = None if resume is None else Path(resume)
    progress = {} if path is None else runs.read_progress(path)
    data = batches.read("the data", data, model.config)
    apart = _apart(held_out, len(data), progress.get("held_out_tokens", 0))
    run = {"settings": dataclasses.asdict(settings), "data": data.digest(), "config": model.config.fingerprint}
    run["held_out_tokens"] = apart
    if path is not None:
        runs.check_same(path, progress, run)
    trained, held = _divided(data, apart, held_out, model.config, settings, evaluate_every)
    if metrics is not None and not isinstance(held, HeldOutExamples):
        raise ValueError("metrics are of held-out examples of a labelled task; give held_out, or no metrics")
    trainer = registry.get(model.backend).trainer(model, settings)
    history = progress.get("history", [])
    if path is not None:
        runs.restore(trainer, model, path, len(history))
    if checkpoint is not None:
        runs.check_room(checkpoint, model, trainer)

    def save() -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, trainer, run | {"history": history}, kept)

    loop = _Loop(trainer, trained, settings, held, history, save, checkpoint_every, log, stop, evaluating, metrics)
    loop.finish_evaluation()
    loop.run()
    return history


@dataclass
class _Loop:
    """The updates of a run, with what stands between them; it adds to the history."""

    trainer: Any
    data: Tokens | Examples
    settings: TrainSettings
    held: HeldOut | None
    history: list[dict]
    save: Callable[[], None]
    save_every: int
    log: Callable[[dict], None] | None
    stop: Callable[[], bool] | None
    evaluating: Callable[[int, int], None] | None
    metrics: Callable[[np.ndarray], Mapping[str, float]] | None

    def run(self) -> None:
        ended = self._is_finished() or self._stops()
        while not ended:
            entry = self._update(len(self.history))
            self.history.append(entry)
            self._evaluate(entry)
            if self.log:
                self.log(entry)
            ended = self._is_finished() or self._stops()
            if ended or (self.save_every and len(self.history) % self.save_every == 0):
                self.save()
                ended = ended or self._stops()

    def finish_evaluation(self) -> None:
        """Make the evaluation after the last update that was made, where it was due and is missing."""
        if self.history and self._evaluate(self.history[-1]):
            if self.log:
                self.log(self.history[-1])
            if self._is_finished():
                self.save()

    def _update(self, step: int) -> dict:
        loss, norm = self.trainer.step(self.data.batch(self.settings, step))
        _check_finite("the loss", loss, step)
        _check_finite("the gradient's norm", norm, step)
        return {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": self.settings.rate(step)}

    def _evaluate(self, entry: dict) -> bool:
        """Give the entry its loss on held-out data; whether there is a new one."""
        if self.held is None or evaluation.ENTRY in entry or not self.held.due(len(self.history)):
            return False
        loss = self.held.loss(self.trainer, self._stops, self.evaluating)
        if loss is None:
            return False
        _check_finite("the loss on held-out data", loss, entry["step"])
        measured = self._measured()
        if measured is None:
            return False
        if clashes := sorted(measured.keys() & {*entry, evaluation.ENTRY}):
            raise ValueError(f"metrics gave {', '.join(clashes)}, which is logged already; expected other names")
        for name, value in measured.items():
            _check_finite(f"{name} on held-out data", value, entry["step"])
        entry |= {evaluation.ENTRY: loss} | {name: float(value) for name, value in measured.items()}
        return True

    def _measured(self) -> Mapping[str, float] | None:
        """The metrics by name; None where they were cut short."""
        if self.metrics is None:
            return {}
        assert isinstance(self.held, HeldOutExamples)
        outputs = self.held.outputs(self.trainer, self._stops, self.evaluating)
        return None if outputs is None else self.metrics(outputs)

    def _is_finished(self) -> bool:
        return len(self.history) >= self.settings.steps

    def _stops(self) -> bool:
        return self.stop is not None and self.stop()


def load_settings(path: Path | str) -> TrainSettings:
    """The settings that a checkpoint was trained with."""
    path = Path(path)
    try:
        return TrainSettings(**runs.read_progress(path)["settings"])
    except TypeError as fault:
        raise CheckpointError(f"{path / runs.PROGRESS_FILE}: cannot resume: {fault}") from None


def _apart(held_out: Any, tokens: int, before: int) -> int:
    """How many tokens at the end of the data are held out. before: in the run that is resumed."""
    return evaluation.tokens_apart(held_out, tokens) if isinstance(held_out, (float, int)) else before


def _divided(data, apart, held_out, config, settings, every) -> tuple[Any, HeldOut | None]:
    """What is trained on and what is held out, checked."""
    trained, end = data[: len(data) - apart], data[len(data) - apart :]
    trained.check_size("the data" if not apart else "the data that is not held out", settings)
    if every is not None:
        _check_count("evaluate_every", every)
    if held_out is None and not apart:
        if every is not None:
            raise ValueError(f"evaluate_every is {every}, but no data is held out; give held_out")
        return trained, None
    if not (held_out is None or isinstance(held_out, (float, int))):
        end = batches.read("the held-out data", held_out, config)
    end.check_size("the held-out data", settings)
    every = evaluation.tenth(settings.steps) if every is None else every
    return trained, end.held_out(settings, every)


def _check_count(name: str, value: Any) -> None:
    if not (isinstance(value, int) and value >= 0):
        raise ValueError(f"{name} is {value!r}; expected an integer >= 0")


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value} at step {step}; lower the learning rate")
