"""Classes of image files, by a checkpoint of task "image_classification". Pillow reads the files."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core import factory, registry, tasks
from mamba_core.architectures.base import is_number
from mamba_core.datasets.base import record_of
from mamba_core.spec.images import Pair
from mamba_core.weights.formats import InputFile
from mamba_core.wrappers import unwrap

TASK = "image_classification"
# Of the red, green and blue of ImageNet's images, from 0 to 1.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The published models see this part of the image's shorter side.
CROP = 0.875
# What a checkpoint that was trained here says of these (`mamba_core.datasets`).
PREPROCESSING = {"mean": list(MEAN), "deviation": list(DEVIATION), "crop": CROP}
# Classes that are told, where nobody says how many.
TOP = 5
# Images that are computed at once.
BATCH = 16


class Guess(NamedTuple):
    """label: the name of the class, or its number where the checkpoint has no names. probability: from 0 to 1."""

    label: str
    probability: float


def classify_images(
    paths: str | Path | Iterable[str | Path], checkpoint: Any, *, top: int | None = None, **options: Any
) -> list[list[Guess]]:
    """The likeliest classes of each image, the likeliest first.

    An image is scaled so that its shorter side is 8/7 of the model's, its middle is cut out, and its colours are
    normalised as those of ImageNet, as for the published models; or as the checkpoint records that it was trained. The
    names of the classes are `id2label` of the checkpoint's config.json.

    Args:
        paths: one file or several, of any kind that Pillow reads.
        checkpoint: what `mamba_core.load` takes, or a model.
        top: how many classes; by default 5, or all where there are fewer.
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
    model = factory.for_use(checkpoint, options)
    config = unwrap(model, "classifying images").config
    if config.task != TASK:
        raise ValueError(f"the model is of task {config.task!r}; classifying images needs one of task {TASK!r}")
    task: Any = tasks.of(config)
    if task.channels != len(MEAN):
        raise ValueError(f"the model's images have {task.channels} channels; files are read as red, green and blue")
    top = checked_top(top, task.num_classes)
    found, names, prepared = [], _names(config), preprocessing(config)
    for start in range(0, len(paths), BATCH):
        images = np.stack([read_image(path, task.size, **prepared) for path in paths[start : start + BATCH]])
        found += [likeliest(row, names, top) for row in _logits(model, images)]
    return found


def preprocessing(config: Any) -> dict[str, Any]:
    """mean, deviation and crop of `read_image`: those that the config records, or those of the published models.

    Raises:
        ValueError: what it records are no such numbers.
    """
    record = record_of(config) or {}
    found = {name: record.get(name, own) for name, own in PREPROCESSING.items()}
    for name in ("mean", "deviation"):
        value = found[name]
        fits = isinstance(value, (list, tuple)) and len(value) == len(MEAN) and all(map(is_number, value))
        if not fits or (name == "deviation" and min(value) <= 0):
            raise ValueError(
                f"the config records {name} {value!r:.80} of images; expected 3 numbers, deviations above 0"
            )
    crop = found["crop"]
    if not (is_number(crop) and 0 < crop <= 1):
        raise ValueError(f"the config records crop {crop!r:.80} of images; expected a number above 0, 1 at most")
    return found


def read_image(
    path: str | Path, size: Pair, *, mean: Any = MEAN, deviation: Any = DEVIATION, crop: float = CROP
) -> np.ndarray:
    """(3, height, width) float32: the middle of an image file, normalised.

    size: height and width. mean, deviation: of red, green and blue, from 0 to 1. crop: the part of the shorter side
    that is cut out.

    Raises:
        ValueError, OSError, ImportError: as `classify_images`.
    """
    return normalised(read_pixels(path, size, crop), mean, deviation)


def read_pixels(path: str | Path, size: Pair, crop: float = CROP) -> np.ndarray:
    """(height, width, 3) uint8: the middle of an image file; as `read_image`."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise ImportError("image files are read by Pillow; pip install 'mamba_core[vision]'") from None
    data = InputFile(path)[:]
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
            return np.asarray(_middle(image, size, crop, Image.Resampling.BICUBIC))
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: the image has more pixels than Pillow takes for no attack") from None
    except Exception as fault:  # of any of Pillow's readers, which say what they do not in many ways
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0][:200]
        reason = "its format is not known" if "cannot identify" in reason else reason
        raise ValueError(f"{path}: no image that Pillow reads: {reason}") from None


def _middle(image: Any, size: Pair, crop: float, kind: Any) -> Any:
    """Scaled so that a part of it of that size, `crop` of the shorter side, can be cut out of its middle."""
    height, width = size
    scale = max(int(height / crop) / image.height, int(width / crop) / image.width)
    columns, rows = (max(least, round(of * scale)) for of, least in ((image.width, width), (image.height, height)))
    image = image.resize((columns, rows), kind)
    left, above = (columns - width) // 2, (rows - height) // 2
    return image.crop((left, above, left + width, above + height))


def normalised(pixels: np.ndarray, mean: Any = MEAN, deviation: Any = DEVIATION) -> np.ndarray:
    """(..., 3, height, width) float32 of (..., height, width, 3) uint8; as `read_image`."""
    value, mean, deviation = (np.asarray(given, np.float32) for given in (pixels, mean, deviation))
    return np.ascontiguousarray(np.moveaxis((value / 255 - mean) / deviation, -1, -3))


def _logits(model: Any, images: np.ndarray) -> np.ndarray:
    backend = registry.get(unwrap(model, "classifying images").backend)
    given = backend.from_numpy(images, device=unwrap(model, "classifying images").device)
    return np.asarray(backend.to_numpy(model(given).logits), np.float64)


def checked_top(top: Any, classes: int) -> int:
    """How many classes are told.

    Raises:
        ValueError: it is none from 1 to their number.
    """
    top = min(TOP, classes) if top is None else top
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= classes:
        raise ValueError(f"top is {top!r}; expected an integer from 1 to {classes}, the number of classes")
    return top


def likeliest(logits: np.ndarray, names: Mapping[str, str], top: int) -> list[Guess]:
    """The largest of (labels,) logits. names: number -> name.

    Raises:
        ValueError: they are not all finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not all finite; compute in float32")
    shifted = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")[:top]
    return [Guess(names.get(str(index), str(index)), float(shifted[index] / shifted.sum())) for index in order]


def class_names(config: Any) -> tuple[str, ...] | None:
    """The names of all classes in their order; None where the config has not all."""
    names = _names(config)
    count = config.task_options.get("num_classes", len(names))
    found = tuple(names[str(number)] for number in range(count) if str(number) in names)
    return found if found and len(found) == count else None


def _names(config: Any) -> dict[str, str]:
    """Number -> name of the classes; {} where the checkpoint has none."""
    given = config.extra.get("id2label")
    return {str(key): str(value) for key, value in given.items()} if isinstance(given, Mapping) else {}
