"""What is told of a run when it ends, in the folder of its checkpoint: data, metrics beside a baseline, and figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mamba_core import figures
from mamba_core.datasets.base import Data
from mamba_core.weights.formats import atomic_file

REPORT, CURVE = "report.json", "training.png"
# What every entry of a history may have.
_COMMON = ("step", "loss", "gradient_norm", "learning_rate", "held_out_loss")
_LONGEST = 8  # entries of a list that are shown


def check() -> None:
    """Raises ImportError where what draws figures is not installed."""
    figures.check()


def finish(data: Data, model: Any, history: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any] | None:
    """Draw the figures of a run that is finished, and write its report beside the checkpoint; None without metrics."""
    if not data.measures or not history:
        return None
    names = list(_metrics(history[-1]))
    drawn = [folder / CURVE]
    figures.curve(drawn[0], history, data.baseline, names)
    drawn += data.draw(model, folder)
    report = {
        "task": data.config.task,
        "data": data.facts,
        "metrics": {"held_out_loss": history[-1]["held_out_loss"]} | _metrics(history[-1]),
        "baseline": data.baseline,
        "figures": [path.name for path in drawn],
    }
    with atomic_file(folder / REPORT, overwrite=True) as partial:
        partial.write_text(json.dumps(report, indent=1))
    return report


def measured(entry: Mapping[str, Any]) -> str:
    """The metrics of an entry of a history, for a line of progress."""
    return "".join(f", {_words(name)} {value:.4g}" for name, value in _metrics(entry).items())


def lines(report: Mapping[str, Any]) -> list[str]:
    """A report for people."""
    facts = ", ".join(f"{_words(name)} {_shown(value)}" for name, value in report["data"].items())
    found = [f"data: {facts}"]
    for name, value in report["metrics"].items():
        beside = [f"{_words(other)} {known:.4g}" for other, known in report["baseline"].items() if other.endswith(name)]
        found.append(f"{_words(name)}: {value:.4g}" + (f" ({', '.join(beside)})" if beside else ""))
    drawn = ", ".join(report["figures"])
    return [*found, f"in the folder of the checkpoint: {REPORT}, {drawn}"]


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name not in _COMMON}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        return str(value)
    more = f" and {len(value) - _LONGEST} more" if len(value) > _LONGEST else ""
    return f"{len(value)} ({', '.join(map(str, value[:_LONGEST]))}{more})"
