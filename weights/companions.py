"""Files beside a checkpoint that go with it into another: those of its tokenizer and of generation.

A link that leads out of the folder is not followed. Whoever made the checkpoint chose where it leads, and what lies
there, such as a private key under the name of a tokenizer, would be published with the result. Such a file is left out
with a warning: a model that took days is saved all the same.
"""

import os
import warnings
from pathlib import Path

from mamba_core.weights.formats import CheckpointError, explained, read_input


def read_companion(path: Path) -> bytes | None:
    """The bytes of a file beside a checkpoint; None where there is none, or where it is left out, with a warning."""
    if not os.path.lexists(path):
        return None
    if (target := _outside(path)) is not None:
        fault = f"{path}: is a link to {target}, outside of the checkpoint; to keep the file, put it where the link is"
    else:
        try:
            return read_input(path)
        except (OSError, CheckpointError) as raised:
            fault = explained(path, raised)
    warnings.warn(f"{CheckpointError(fault)}; it is left out", stacklevel=4)
    return None


def copy_companion(source: Path, target: Path) -> None:
    if (data := read_companion(source)) is not None:
        target.write_bytes(data)


def _outside(path: Path) -> Path | None:
    """Where a path leads, if that is neither in its folder nor where the hub's cache keeps the files of a folder.

    There it is ../../blobs/HASH, seen from models--OWNER--NAME/snapshots/REVISION.
    """
    folder, target = (Path(os.path.realpath(each)) for each in (path.parent, path))
    repository = folder.parent.parent
    of_hub = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    if target.is_relative_to(folder) or (of_hub and target.parent == repository / "blobs"):
        return None
    return target
