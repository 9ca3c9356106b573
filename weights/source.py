"""Where a checkpoint lies: a local folder or file, or a repository on the Hugging Face hub; and its config.json."""

from pathlib import Path

from mamba_core.weights.formats import CheckpointError, parse_json

# The second is downloaded only where there is nothing of the first.
_HUB_PATTERNS = (["*.safetensors"], ["*.bin", "*.pt", "*.npz"])


def locate(source: str | Path, revision: str | None) -> Path:
    """The local path of a folder, a file or a hub id. Raises CheckpointError."""
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such file or folder")
    return _download(source, revision)


def read_config(folder: Path) -> dict | None:
    """The parsed config.json of a folder, None where it has none."""
    path = folder / "config.json"
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: {fault}") from None


def _download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{repository}: no such folder; reading it from the hub needs pip install 'mamba_core[hub]'"
        ) from None
    try:
        for patterns in _HUB_PATTERNS:
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", *patterns]))
            if any(found for pattern in patterns for found in folder.glob(pattern)):
                break
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise CheckpointError(f"{repository}: no such folder, and not to be had from the hub: {reason}") from None
