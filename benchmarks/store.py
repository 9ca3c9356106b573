"""The file that measurements are kept in."""

import json
import math
from pathlib import Path
from typing import Any

from mamba_core.weights.formats import atomic_file, probe_file

# A case is measured under these; results of others do not stand in the same file.
CONDITIONS = ("machine", "threads", "quick")


def begin(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The results to add to: those of the file, or `found` where there is none.

    Raises:
        ValueError: the file is none of ours, was measured under other conditions, or cannot be written.
    """
    probe_file(path, overwrite=True)
    if not path.exists():
        return found
    kept = read(path)
    if differ := [name for name in CONDITIONS if kept.get(name) != found[name]]:
        raise ValueError(f"{path} was measured with another {', '.join(differ)}; give another --out, or remove it")
    return kept


def read(path: Path) -> dict[str, Any]:
    """The results of a file.

    Raises:
        ValueError: it is none of ours.
    """
    try:
        kept = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        kept = None
    if not isinstance(kept, dict) or not isinstance(kept.get("cases"), dict):
        raise ValueError(f"{path} holds no results of mamba-core bench")
    return kept


def write(path: Path, found: dict[str, Any]) -> None:
    with atomic_file(path, overwrite=True) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")


def milliseconds(seconds: float) -> str:
    """With at least three digits that count."""
    value = seconds * 1e3
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f} ms"
