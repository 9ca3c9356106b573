"""Adapters, which are no models: folders and names of PEFT and mlx-lm are refused, and their base is named."""

import re
from collections.abc import Collection
from pathlib import Path

from mamba_core.weights.formats import CheckpointError, read_json

CONFIG = "adapter_config.json"
_NAMES = re.compile(r"(?:^|[._])lora_|(?:^|\.)(?:base_layer|modules_to_save|original_module)\.")
# The fields that name the base in PEFT's config, and in mlx-lm's.
_BASE = ("base_model_name_or_path", "model")
_ADVICE = "merge it into its base first (peft: merge_and_unload; mlx-lm: fuse; mamba_core.save(merge=True))"


def refuse_folder(path: Path) -> None:
    """Raises CheckpointError for a folder of an adapter, and for an adapter's file in one.

    A folder may hold the base too, of which a reader that knows adapters would make another model.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG).exists() and (path.is_dir() or path.name.startswith("adapter")):
        raise CheckpointError(f"{path}: is {_of_base(folder)}; {_ADVICE}")


def refuse_names(path: Path, names: Collection[str]) -> None:
    """Raises CheckpointError for tensors of an adapter, or of a model that has some."""
    if found := next((name for name in names if _NAMES.search(name)), None):
        folder = path if path.is_dir() else path.parent
        raise CheckpointError(f"{path}: has a tensor {found!r}: it is or holds {_of_base(folder)}; {_ADVICE}")


def _of_base(folder: Path) -> str:
    try:
        fields = read_json(folder / CONFIG)
    except (OSError, ValueError):
        fields = {}
    base = next((fields[name] for name in _BASE if isinstance(fields.get(name), str)), None)
    return f"an adapter of {base}" if base else "an adapter of another model"
