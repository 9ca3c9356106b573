"""Figures of training and of forecasts, as PNG, by matplotlib."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mamba_core.weights.formats import atomic_file


def check() -> None:
    """Raises ImportError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ImportError("figures are drawn by matplotlib; pip install 'mamba_core[cli]'")


def curve(
    path: Path, history: Sequence[Mapping[str, Any]], baseline: Mapping[str, float], names: Sequence[str]
) -> None:
    """The losses of a run's history over its steps, and a panel for each metric of these names."""
    figure, panels = _panels(1 + len(names), 1)
    steps = [entry["step"] + 1 for entry in history]
    panels[0].plot(steps, [entry["loss"] for entry in history], label="training", alpha=0.6, lw=1)
    evaluated = [entry for entry in history if "held_out_loss" in entry]
    if evaluated:
        at = [entry["step"] + 1 for entry in evaluated]
        panels[0].plot(at, [entry["held_out_loss"] for entry in evaluated], marker=".", label="held out")
    panels[0].set(ylabel="loss")
    for name, panel in zip(names, panels[1:], strict=True):
        measured = {entry["step"] + 1: entry[name] for entry in history if name in entry}
        panel.plot(list(measured), list(measured.values()), marker=".", label="held out")
        for other, value in baseline.items():
            if other.endswith(f"_{name}"):
                panel.axhline(value, color="k", ls="--", lw=1, label=other.replace("_", " "))
        panel.set(ylabel=name.replace("_", " "))
    panels[-1].set(xlabel="step")
    _save(figure, panels, path)


def forecast(
    path: Path,
    names: Sequence[str],
    shown: np.ndarray,
    count: int,
    starts: np.ndarray,
    middle: np.ndarray,
    naive: np.ndarray,
    band: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """A panel a channel: the end of the series, (n, c), and what was forecast of it, (windows, h, c)."""
    figure, panels = _panels(len(names), 1)
    places = starts[:, None] + np.arange(middle.shape[1])
    for channel, (name, panel) in enumerate(zip(names, panels, strict=True)):
        panel.plot(np.arange(count - len(shown), count), shown[:, channel], "k", lw=1, label="series")
        for window, at in enumerate(places):
            said = {} if window else {"label": "forecast"}
            panel.plot(at, middle[window, :, channel], "C0", lw=1.2, **said)
            said = {} if window else {"label": "seasonal naive"}
            panel.plot(at, naive[window, :, channel], "C1", lw=0.8, ls="--", **said)
            if band is not None:
                said = {} if window else {"label": "outermost quantiles"}
                panel.fill_between(
                    at, *(edge[window, :, channel] for edge in band), color="C0", alpha=0.2, lw=0, **said
                )
        panel.axvline(starts[0] - 0.5, color="0.6", lw=0.8)
        panel.set(ylabel=name)
    panels[-1].set(xlabel="position")
    _save(figure, panels, path)


def _panels(rows: int, columns: int) -> tuple[Any, list[Any]]:
    check()
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(7, 1 + 2.4 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    return figure, list(axes[:, 0])


def _save(figure: Any, panels: Sequence[Any], path: Path) -> None:
    from matplotlib import pyplot

    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend()
    with atomic_file(path, overwrite=True) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
