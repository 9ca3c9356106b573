"""Data of the tasks from files: a file a task, found by the task's name.

data = datasets.read("reviews.csv", config, task="sequence_classification", length=128)
model = mc.build(data.config)
mc.train(model, data.examples, settings, held_out=data.held_out, metrics=data.metrics)
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mamba_core import architectures, discovery
from mamba_core.datasets.base import RECORD, Data, Option, Source, record_of, with_extra

__all__ = [
    "Data",
    "Option",
    "Source",
    "find",
    "names",
    "options",
    "preset_of",
    "read",
    "record_of",
    "with_task",
    "without_labels",
]
FOLDER = "datasets"
_OF_LABELS = ("labels", "num_labels", "num_classes", "class_weights")


def names() -> tuple[str, ...]:
    """The tasks whose data can be read from files."""
    return discovery.names(FOLDER)


def find(task: str) -> ModuleType:
    """The file of that task.

    Raises:
        ValueError: there is none.
    """
    if task not in names():
        raise ValueError(
            f"data of task {task!r} is not read from files; expected one of {', '.join(names())}. "
            "mamba_core.train takes arrays of every task"
        )
    return discovery.find(FOLDER, task)


def options() -> dict[tuple[str, ...], list[Option]]:
    """All settings, by the tasks that have them."""
    having: dict[str, tuple[Option, tuple[str, ...]]] = {}
    for task in names():
        for option in find(task).OPTIONS:
            _, tasks = having.get(option.name, (option, ()))
            having[option.name] = option, (*tasks, task)
    found: dict[tuple[str, ...], list[Option]] = {}
    for option, tasks in having.values():
        found.setdefault(tasks, []).append(option)
    return found


def preset_of(task: str) -> Any:
    """The config of a model for a task, where nobody says which."""
    presets = architectures.presets()
    return next((config for config in presets.values() if config.task == task != "lm"), presets["mamba-130m"])


def with_task(config: Any, task: str | None) -> Any:
    """The config for a task, by default its own.

    Raises:
        ValueError: it is of another task, and not because nobody said otherwise.
    """
    if task is None or task == config.task:
        return config
    unsaid = next(item.default for item in dataclasses.fields(config) if item.name == "task")
    if config.task != unsaid or config.task_options:
        raise ValueError(f"the config is of task {config.task!r}; expected {task!r}")
    return dataclasses.replace(config, task=task, task_options={})


def without_labels(config: Any) -> Any:
    """The config without what it says of labels, for data with others."""
    options = {name: value for name, value in config.task_options.items() if name not in _OF_LABELS}
    extra = {name: value for name, value in config.extra.items() if name not in ("id2label", "label2id")}
    return dataclasses.replace(config, task_options=options, extra=extra)


def read(
    path: Path | str,
    config: Any,
    *,
    task: str | None = None,
    held_out: Path | str | float | None = None,
    length: int = 256,
    seed: int = 0,
    tokenizer: Any = None,
    resume: bool = False,
    **options: Any,
) -> Data:
    """The data of a model's task from files, divided into what is trained on and what is held out.

    Args:
        path: as DATA of the task's file says.
        config: of the model. The result has it with what the data tells, such as the names of the labels.
        task: by default the config's.
        held_out: a path, as `path`; or a fraction of the data: of each label as many examples, drawn by the seed, and
            of a series its end. By default the task's file says; 0 for nothing.
        length: positions of an example: tokens of a text, or values of a series before the forecast.
        seed: of the division.
        tokenizer: an object with `encode`; a text is its UTF-8 bytes without one.
        resume: the config is a checkpoint's. The data must be that of its run, and what is not given is as it was.
        options: OPTIONS of the task's file.

    Raises:
        ValueError: the data cannot be read, does not fit the model or the options, or is not the run's.
        OSError: a file cannot be read.
        ImportError: a package that reads it is not installed.
    """
    config = with_task(config, task)
    file = find(config.task)
    given = {name: value for name, value in options.items() if value is not None}
    known = {option.name for option in file.OPTIONS}
    if unknown := [name for name in given if name not in known]:
        expected = f"expected {', '.join(sorted(known))}" if known else "expected none"
        raise ValueError(f"{', '.join(unknown)} given, but data of task {config.task!r} has no such option; {expected}")
    record = record_of(config) if resume and file.HELD_OUT is not None else None
    if record is not None:
        given, held_out = _as_before(record, given), _held_as_before(record, held_out)
    elif resume and file.HELD_OUT is not None:
        raise ValueError("the checkpoint does not say how its data was read; resume it from Python, with its arrays")
    held_out = file.HELD_OUT if held_out is None else held_out
    path, held_out = Path(path), Path(held_out) if isinstance(held_out, (str, Path)) else held_out
    if isinstance(held_out, Path):
        _check_apart(path, held_out)
    elif held_out is not None and not (isinstance(held_out, (float, int)) and 0 <= held_out < 1):
        raise ValueError(f"held_out is {held_out!r}; expected a path, or a fraction of the data from 0 to below 1")
    config = with_extra(config, {}) if record is not None else _without_record(config)
    data = file.read(Source(path, config, held_out, length, seed, tokenizer, given))
    if record is not None:
        _check_same(path, config, record, data.config)
    return data


def _as_before(record: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that is resumed."""
    before = record.get("options")
    before = dict(before) if isinstance(before, Mapping) else {}
    for name, value in given.items():
        if _plain(value) != before.get(name):
            raise ValueError(f"{name} is {value!r}, and the run's was {before.get(name)!r}; a run resumes as is")
    return before


def _held_as_before(record: Mapping[str, Any], held_out: Any) -> Any:
    fraction = record.get("held_out_fraction")
    if fraction is not None:
        if held_out is not None and held_out != fraction:
            raise ValueError(f"held_out is {held_out!r}, and the run held out {fraction}; a run resumes as is")
        return fraction
    if record.get("held_out_digest") is None:
        if held_out:
            raise ValueError(f"held_out is {held_out!r}, and the run held out nothing; a run resumes as is")
        return 0
    if not isinstance(held_out, (str, Path)):
        raise ValueError("the run held out a file of its own; give it again by held_out (--held-out)")
    return held_out


def _check_same(path: Path, config: Any, record: Mapping[str, Any], now: Any) -> None:
    found = now.extra[RECORD]
    if found["held_out_digest"] != record.get("held_out_digest"):
        raise ValueError(f"{path}: what is held out is not what the run held out; a run resumes with its own data")
    if found != record or now != config:
        differing = [name for name in found if found[name] != record.get(name)] or ["the labels or sizes"]
        raise ValueError(f"{path}: is not the data of the run: {', '.join(differing)} differ; a run resumes as is")


def _check_apart(path: Path, held_out: Path) -> None:
    data, apart = path.resolve(), held_out.resolve()
    if apart.is_relative_to(data) or data.is_relative_to(apart):
        raise ValueError(
            f"--held-out {held_out} and --data {path} hold the same files, so that it would be trained on; "
            "move it elsewhere, or give --held-out-fraction"
        )


def _without_record(config: Any) -> Any:
    extra = {name: value for name, value in config.extra.items() if name != RECORD}
    return dataclasses.replace(config, extra=extra)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
