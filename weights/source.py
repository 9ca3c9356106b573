"""Where a checkpoint lies: a local folder or file, or a repository on the Hugging Face hub; and its config's file."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from mamba_core.weights import layouts
from mamba_core.weights.formats import CheckpointError, read_json

# The second is downloaded only where there is nothing of the first.
_HUB_PATTERNS = (["*.safetensors"], ["*.bin", "*.pt", "*.npz"])
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
_SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})(?P<kind>\.\w+)")


def locate(source: str | Path, revision: str | None) -> Path:
    """The local path of a folder, a file or a hub id. A config stands for its folder. Raises CheckpointError."""
    path = Path(source)
    if source != "" and path.exists():  # "" would be the current folder
        _refuse_shard(path)
        return path.parent if path.name in layouts.config_files() and path.is_file() else path
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(f"{source or repr('')}: no such file or folder")
    return _download(source, revision)


def config_path(folder: Path, weights: Collection[str]) -> Path:
    """The file with the config of files of weights, by their names; config.json where there is none."""
    paths = [folder / name for name in layouts.config_files(weights)]
    return next((path for path in paths if os.path.lexists(path)), folder / layouts.Layout.config_file)


def read_config(path: Path) -> dict | None:
    """The parsed fields of a config's file, None where there is none."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None


def _refuse_shard(path: Path) -> None:
    shard = _SHARD.fullmatch(path.name)
    if shard is None or int(shard["count"]) == 1 or not path.is_file():
        return
    index = path.with_name(f"{shard['name']}{shard['kind']}.index.json")
    advice = f"the index, {index.name}, is missing"
    if index.is_file():
        advice = f"the index lies beside it: {index.name}; read that"
    raise CheckpointError(f"{path}: is one of {int(shard['count'])} shards; {advice}")


def _download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{repository}: no such folder; reading it from the hub needs pip install 'mamba_core[hub]'"
        ) from None
    try:
        for patterns in _HUB_PATTERNS:
            wanted = ["*.json", *TOKENIZER_FILES, *patterns]
            # Patterns match in subfolders too, where other checkpoints lie.
            folder = Path(
                snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"])
            )
            if any(found for pattern in patterns for found in folder.glob(pattern)):
                break
        return folder
    except Exception as fault:  # of the network, of the hub, of the disk
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise CheckpointError(f"{repository}: no such folder, and not to be had from the hub: {reason}") from None
