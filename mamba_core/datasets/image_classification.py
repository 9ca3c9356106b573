"""Classes of images: a folder with a folder of image files for each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamba_core import tasks, vision
from mamba_core.batches import Prepared
from mamba_core.datasets import _labels
from mamba_core.datasets.base import FRACTION, Data, Option, Source, with_extra

DATA = "a folder that has a folder of image files for each class, named as the class"
OPTIONS: tuple[Option, ...] = ()
HELD_OUT = FRACTION
TEXTS = False

CLASSIFIED = "image"


def read(source: Source) -> Data:
    """All images are in memory, 3 bytes a pixel of the model's size."""
    task: Any = tasks.of(source.config)
    if task.channels != len(vision.MEAN):
        raise ValueError(f"the model's images have {task.channels} channels; files are read as red, green and blue")
    paths, labels = _files(source.path)
    known = vision.class_names(source.config)
    count = source.config.task_options.get("num_classes")
    names = _labels.names_of(source, set(labels), known, count)
    config = _labels.with_options(source.config, num_classes=len(names))
    config = with_extra(config, {"id2label": {str(number): name for number, name in enumerate(names)}})
    examples = _examples(paths, source.path, labels, names, task)
    apart = None
    if isinstance(source.held_out, Path):
        held, of_held = _files(source.held_out)
        apart = _examples(held, source.held_out, of_held, names, task)
    record = {"options": {}, **vision.PREPROCESSING}
    facts = {"labels": list(names), "image_size": list(task.size)}
    return _labels.divided(source, config, examples, apart, record, facts)


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files and their classes. What is hidden is passed over."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; expected one that has a folder of image files for each class")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: has no folders; expected one of image files for each class")
    paths, labels = [], []
    for of_class in classes:
        found = sorted(entry for entry in of_class.rglob("*") if entry.is_file() and not entry.name.startswith("."))
        if not found:
            raise ValueError(f"{of_class}: has no files; expected images of class {of_class.name!r}, or no such folder")
        paths += found
        labels += [of_class.name] * len(found)
    return paths, labels


def _examples(paths: list[Path], folder: Path, labels, names, task: Any) -> dict[str, Any]:
    targets = _labels.numbers_of(folder, labels, names)
    pixels = np.empty((len(paths), *task.size, len(vision.MEAN)), np.uint8)
    for index, path in enumerate(paths):
        pixels[index] = vision.read_pixels(path, task.size)
    return {"inputs": Prepared(pixels, vision.normalised), "targets": targets}


def classify(
    model: Any, paths: Sequence[str], texts: Sequence[str], top: int | None
) -> list[tuple[str, list[vision.Guess]]]:
    if texts:
        raise ValueError(f"--text is given, but the model is of task {vision.TASK!r}; give image files")
    return list(zip(paths, vision.classify_images(paths, model, top=top), strict=True))
