"""Classes of image files, by a checkpoint of task "image_classification". Pillow reads the files."""

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core import factory, registry, tasks
from mamba_core.spec.images import Pair
from mamba_core.weights.formats import InputFile
from mamba_core.wrappers import unwrap

TASK = "image_classification"
# Of the red, green and blue of ImageNet's images, from 0 to 1.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The published models see this part of the image's shorter side.
CROP = 0.875
# Images that are computed at once.
BATCH = 16


class Guess(NamedTuple):
    """label: the name of the class, or its number where the checkpoint has no names. probability: from 0 to 1."""

    label: str
    probability: float


def classify_images(
    paths: str | Path | Iterable[str | Path], checkpoint: Any, *, top: int = 5, **options: Any
) -> list[list[Guess]]:
    """The likeliest classes of each image, the likeliest first.

    An image is scaled so that its shorter side is 8/7 of the model's, its middle is cut out, and its colours are
    normalised as those of ImageNet, as for the published models. The names of the classes are `id2label` of the
    checkpoint's config.json.

    Args:
        paths: one file or several, of any kind that Pillow reads.
        checkpoint: what `mamba_core.load` takes, or a model.
        top: how many classes.
        options: of `mamba_core.load`, such as backend and dtype.

    Raises:
        CheckpointError: as `mamba_core.load`; or a path is no regular file, or an empty one.
        ValueError: the model is of another task or of other colours than three, top is out of range, or a file is no
            image that Pillow reads.
        TypeError: options are given with a model.
        OSError: a file cannot be read.
        ImportError: Pillow is not installed.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if isinstance(checkpoint, (str, os.PathLike)):
        model = factory.load(Path(checkpoint) if isinstance(checkpoint, os.PathLike) else checkpoint, **options)
        model.eval()
        if hasattr(model, "requires_grad_"):  # PyTorch would keep what a gradient needs
            model.requires_grad_(False)
    elif options:
        raise TypeError(f"{', '.join(options)} given with a model; they are of a checkpoint that is loaded")
    else:
        model = checkpoint
    config = unwrap(model, "classifying images").config
    if config.task != TASK:
        raise ValueError(f"the model is of task {config.task!r}; classifying images needs one of task {TASK!r}")
    task: Any = tasks.of(config)
    if task.channels != len(MEAN):
        raise ValueError(f"the model's images have {task.channels} channels; files are read as red, green and blue")
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= task.num_classes:
        raise ValueError(f"top is {top!r}; expected an integer from 1 to {task.num_classes}, the number of classes")
    found, names = [], _names(config)
    for start in range(0, len(paths), BATCH):
        images = np.stack([read_image(path, task.size) for path in paths[start : start + BATCH]])
        found += [_likeliest(row, names, top) for row in _logits(model, images)]
    return found


def read_image(path: str | Path, size: Pair) -> np.ndarray:
    """(3, height, width) float32: the middle of an image file, normalised.

    size: height and width.

    Raises:
        ValueError, OSError, ImportError: as `classify_images`.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise ImportError("image files are read by Pillow; pip install 'mamba_core[vision]'") from None
    data = InputFile(path)[:]
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
            return _normalised(_middle(image, size, Image.Resampling.BICUBIC))
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: the image has more pixels than Pillow takes for no attack") from None
    except Exception as fault:  # of any of Pillow's readers, which say what they do not in many ways
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0][:200]
        reason = "its format is not known" if "cannot identify" in reason else reason
        raise ValueError(f"{path}: no image that Pillow reads: {reason}") from None


def _middle(image: Any, size: Pair, kind: Any) -> Any:
    """Scaled so that a part of it of that size, CROP of the shorter side, can be cut out of its middle."""
    height, width = size
    scale = max(int(height / CROP) / image.height, int(width / CROP) / image.width)
    columns, rows = (max(least, round(of * scale)) for of, least in ((image.width, width), (image.height, height)))
    image = image.resize((columns, rows), kind)
    left, above = (columns - width) // 2, (rows - height) // 2
    return image.crop((left, above, left + width, above + height))


def _normalised(image: Any) -> np.ndarray:
    value, mean, deviation = (np.asarray(given, np.float32) for given in (image, MEAN, DEVIATION))
    return np.ascontiguousarray(((value / 255 - mean) / deviation).transpose(2, 0, 1))


def _logits(model: Any, images: np.ndarray) -> np.ndarray:
    backend = registry.get(unwrap(model, "classifying images").backend)
    given = backend.from_numpy(images, device=unwrap(model, "classifying images").device)
    return np.asarray(backend.to_numpy(model(given).logits), np.float64)


def _likeliest(logits: np.ndarray, names: Mapping[str, str], top: int) -> list[Guess]:
    if not np.isfinite(logits).all():
        raise ValueError("the logits of an image are not all finite; compute in float32")
    shifted = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")[:top]
    return [Guess(names.get(str(index), str(index)), float(shifted[index] / shifted.sum())) for index in order]


def _names(config: Any) -> dict[str, str]:
    """Number -> name of the classes; {} where the checkpoint has none."""
    given = config.extra.get("id2label")
    return {str(key): str(value) for key, value in given.items()} if isinstance(given, Mapping) else {}
