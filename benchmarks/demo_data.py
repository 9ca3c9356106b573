"""Data that Python packages ship, written as the files that `mamba-core train` reads.

Each writer makes two files or folders, of what is trained on and of what is held out. The division is the same in every
run: a seed of training changes nothing of it.
"""

import csv
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PACKAGES = ("sklearn", "statsmodels", "django", "polib", "PIL", "matplotlib")
HELD_OUT = 0.2  # of images and of messages
DIVISION = 0  # the seed of what is held out
SEASONS = 3  # of a series, held out at its end
MONTHS, SUNSPOTS = 12, 11  # positions of a season
LANGUAGES = ("da", "de", "es", "fi", "fr", "it", "nl", "pl", "pt", "sv")


class Files(NamedTuple):
    train: Path
    held_out: Path


def check() -> None:
    """Raises ImportError where a package is missing that has the data or reads it."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f"the data of the demo needs {', '.join(missing)}; pip install 'mamba_core[demo]'")


def digits(folder: Path) -> Files:
    """scikit-learn's 1,797 handwritten digits of 8 by 8 pixels, as a folder of PNG for each class."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    numbers, labels = np.arange(len(loaded.target)), loaded.target
    divided = train_test_split(numbers, test_size=HELD_OUT, random_state=DIVISION, stratify=labels)
    files = Files(folder / "train", folder / "held_out")
    for path, rows in zip(files, divided, strict=True):
        for row in rows:
            # Reading cuts an eighth off. A row and a column of black at the end are what it cuts.
            pixels = np.pad((loaded.images[row] * (255 / 16)).round().astype(np.uint8), (0, 1))
            of_class = path / str(labels[row])
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(of_class / f"{row:04}.png")
    return files


def co2(folder: Path) -> Files:
    """statsmodels' CO2 at Mauna Loa, the mean of each month from March 1958 to December 2001, in ppm; 5 are missing."""
    from statsmodels.datasets import co2 as source

    months = source.load().data["co2"].resample("MS").mean()
    values = ["" if np.isnan(value) else f"{value:.4f}" for value in months]
    times = [f"{time:%Y-%m-%d}" for time in months.index]
    return _series(folder, ("time", "co2"), times, values, SEASONS * MONTHS)


def sunspots(folder: Path) -> Files:
    """statsmodels' number of sunspots of each year from 1700 to 2008."""
    from statsmodels.datasets import sunspots as source

    loaded = source.load().data
    times = [str(int(year)) for year in loaded["YEAR"]]
    return _series(
        folder, ("year", "sunspots"), times, [str(value) for value in loaded["SUNACTIVITY"]], SEASONS * SUNSPOTS
    )


def _series(folder: Path, names: Sequence[str], times: Sequence[str], values: Sequence[str], apart: int) -> Files:
    files, rows = Files(folder / "train.csv", folder / "held_out.csv"), list(zip(times, values, strict=True))
    for path, part in zip(files, (rows[:-apart], rows[-apart:]), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *part])
    return files


def languages(folder: Path) -> Files:
    """Translations of Django's messages and their language, as .jsonl.

    The messages are divided, so that all translations of one are on the same side. What is no translation is left out,
    and of training what a held-out message reads like too.
    """
    from sklearn.model_selection import train_test_split

    rows = messages()
    known = sorted({row["message"] for row in rows})
    _, apart = train_test_split(known, test_size=HELD_OUT, random_state=DIVISION)
    held = [row for row in rows if row["message"] in set(apart)]
    texts = {row["text"] for row in held}
    trained = [row for row in rows if row["message"] not in set(apart) and row["text"] not in texts]
    files = Files(folder / "train.jsonl", folder / "held_out.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(files, (trained, held), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    return files


def messages() -> list[dict[str, str]]:
    """message, text and label of each translation in Django's catalogues, and of each form of a plural, once."""
    import django
    import polib

    found: dict[tuple[str, str, str], None] = {}
    for name in LANGUAGES:
        for path in sorted(Path(django.__file__).parent.rglob(f"locale/{name}/LC_MESSAGES/*.mo")):
            for entry in polib.mofile(str(path)):
                for text in [entry.msgstr, *entry.msgstr_plural.values()]:
                    if text.strip() and text not in (entry.msgid, entry.msgid_plural):
                        found[entry.msgid, text, name] = None
    return [{"message": message, "text": text, "label": name} for message, text, name in found]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
