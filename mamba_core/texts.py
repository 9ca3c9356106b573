"""Classes of texts, by a checkpoint of task "sequence_classification"."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mamba_core import factory, registry, tasks
from mamba_core.datasets.base import record_of
from mamba_core.tasks.sequence_classification import SINGLE
from mamba_core.tokenizer import ByteTokenizer, as_tokenizer, tokenizer_of
from mamba_core.vision import Guess, checked_top, likeliest
from mamba_core.weights.formats import read_input
from mamba_core.wrappers import unwrap

TASK = "sequence_classification"


def classify_text(
    texts: str | Iterable[str], checkpoint: Any, *, top: int | None = None, tokenizer: Any = None, **options: Any
) -> list[list[Guess]]:
    """The likeliest classes of each text, the likeliest first.

    A text is cut to the length that the checkpoint records of its training, as the texts were there. The names of the
    classes are its labels.

    Args:
        texts: one or several.
        checkpoint: what `mamba_core.load` takes, or a model.
        top: how many classes; by default 5, or all where there are fewer.
        tokenizer: an object with `encode`; by default that of the checkpoint, or bytes where it was trained on them.
        options: of `mamba_core.load`, such as backend and dtype.

    Raises:
        CheckpointError: as `mamba_core.load`.
        ValueError: the model is of another task, or of other targets than one label a row; top is out of range, there
            is no tokenizer, or a text is empty or has tokens that the model does not know.
        TypeError: options are given with a model.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    model = factory.for_use(checkpoint, options)
    plain = unwrap(model, "classifying texts")
    config, task = plain.config, tasks.of(plain.config)
    if config.task != TASK:
        raise ValueError(f"the model is of task {config.task!r}; classifying texts needs one of task {TASK!r}")
    assert hasattr(task, "problem_type")
    if task.problem_type != SINGLE:
        raise ValueError(f"the model's problem_type is {task.problem_type!r}; expected {SINGLE!r}, one class a text")
    top = checked_top(top, task.size)  # type: ignore[attr-defined]
    encode = _encoder(plain, tokenizer)
    names = {str(number): name for number, name in enumerate(task.labels or ())}  # type: ignore[attr-defined]
    backend, found = registry.get(plain.backend), []
    for place, text in enumerate(texts):
        ids = np.array([_ids(text, place, encode, config)], np.int64)
        logits = backend.to_numpy(backend.infer(model, ids.astype(np.int32)).logits)[0]
        found.append(likeliest(np.asarray(logits, np.float64), names, top))
    return found


def read_text(path: str | Path) -> str:
    """A text of a file, without the end of its last line.

    Raises:
        ValueError, OSError: it is none, or no UTF-8.
    """
    try:
        return read_input(path).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as fault:
        raise ValueError(f"{path}: is not UTF-8 at byte {fault.start}; expected a text file") from None


def _encoder(model: Any, tokenizer: Any):
    record = record_of(model.config) or {}
    if tokenizer is None:
        found = ByteTokenizer() if record.get("bytes") is True else tokenizer_of(model)
    else:
        found = as_tokenizer(tokenizer)
    if found is None:
        raise ValueError("the checkpoint has no tokenizer.json; give tokenizer, an object with encode(text)")
    length = record.get("length")
    return lambda text: list(found.encode(text))[: length if type(length) is int and length > 0 else None]


def _ids(text: Any, place: int, encode, config: Any) -> list[int]:
    if not isinstance(text, str) or not text:
        raise ValueError(f"text {place} is {text!r:.80}; expected one that is not empty")
    ids = encode(text)
    if not ids or not (min(ids) >= 0 and max(ids) < config.vocab_size):
        what = f"tokens {min(ids)} to {max(ids)}" if ids else "no tokens"
        raise ValueError(f"text {place} has {what}; expected 0 to {config.vocab_size - 1}, the model's vocabulary")
    return ids
