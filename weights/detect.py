"""Which layout a checkpoint has, told from the names of its tensors and the fields of its config together, and why."""

import os.path
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from mamba_core.config import MambaConfig
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import Checkpoint
from mamba_core.weights.names import SCHEMES, Scheme, scheme_of

# layout -> fields of config.json; one of them tells that it can be of this layout. Ordered, the plainest first.
CONFIG_KEYS = {
    "hf": ("model_type", "hidden_size"),
    "mamba_ssm": ("ssm_cfg", "d_model"),
    "mambapy": ("n_layers",),
    "mambapy_mlx": ("n_layers",),
    "minimamba": ("norm_epsilon", "d_model"),
    "mlx_lm": ("model_type", "hidden_size"),
}
# What torch's compiler, its data parallelism and habit put before every name of a model that they wrap.
_WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.|model\.)*")
# Ends of names -> why a file that has one is not read.
_QUANTISED = "quantised checkpoints are not read; dequantise it first"
_UNREAD = dict.fromkeys((".scales", ".qweight", ".absmax"), _QUANTISED) | {
    ".mixer.dt_layernorm.weight": "the model has norms of dt, B and C, another function than Mamba, which is not read"
}


class Detected(NamedTuple):
    """prefix: what a wrapper put before every name. evidence: a short sentence on how the layout was told."""

    layout: str
    scheme: Scheme
    prefix: str
    evidence: str


def detect(path: Path, fields: Mapping | None, checkpoint: Checkpoint, layout: str | None) -> Detected:
    """The layout and the scheme of names of a checkpoint; of the layout that is named, if one is.

    fields: of config.json, None where there is none.

    Raises:
        CheckpointError: none fits, or several.
    """
    _refuse_unread(path, checkpoint)
    prefix = _wrapper(checkpoint)
    names = {name.removeprefix(prefix) for name in checkpoint}
    fitting = {name: scheme for name in SCHEMES if (scheme := scheme_of(names, name)) is not None}
    evidence = []
    if layout is None:
        layout = _choose(path, fields, fitting, checkpoint.metadata)
        evidence = [_config_evidence(fields, layout)]
    scheme = fitting.get(layout, SCHEMES[layout][0])
    if layout in fitting:
        evidence.append(f"tensors have {' and '.join(scheme.marks())}")
    if prefix:
        evidence.append(f"every name begins with {prefix!r}")
    if _is_of_mlx(checkpoint.metadata) and layout == "mlx_lm":
        evidence.append("the file says that MLX wrote it")
    return Detected(layout, scheme, prefix, "; ".join(evidence) or "the layout was named")


def _choose(path: Path, fields: Mapping | None, fitting: Collection[str], metadata: Mapping[str, str]) -> str:
    by_config = [name for name in SCHEMES if fields is None or _config_key(fields, name)]
    both = [name for name in by_config if name in fitting]
    if set(both) == {"hf", "mlx_lm"}:  # the same names and config: only who wrote the file tells them apart
        return "mlx_lm" if _is_of_mlx(metadata) else "hf"
    if len(both) == 1:
        return both[0]
    config = "there is no config.json" if fields is None else f"config.json fits {' and '.join(by_config) or 'none'}"
    raise CheckpointError(
        f"{path}: cannot tell the layout: {config}, the tensor names fit {' and '.join(fitting) or 'none'} of "
        f"{', '.join(SCHEMES)}; if you know it, name it (--from)"
    )


def _config_key(fields: Mapping, layout: str) -> str | None:
    if "architecture" in fields:  # this project's own fields, which no layout has
        return None
    return next((key for key in CONFIG_KEYS[layout] if key in fields), None)


def _config_evidence(fields: Mapping | None, layout: str) -> str:
    if fields is None:
        defaults = f"the rest are defaults, norm_eps {MambaConfig.norm_eps} among them"
        return f"there is no config.json: sizes are the tensors', {defaults}"
    return f"config.json has {_config_key(fields, layout)}"


def _is_of_mlx(metadata: Mapping[str, str]) -> bool:
    return metadata.get("format") == "mlx"


def _refuse_unread(path: Path, names: Collection[str]) -> None:
    for end, reason in _UNREAD.items():
        if found := next((name for name in names if name.endswith(end)), None):
            raise CheckpointError(f"{path}: has a tensor {found!r}: {reason}")


def _wrapper(names: Collection[str]) -> str:
    shared = os.path.commonprefix([_WRAPPERS.match(name)[0] for name in names])  # noqa: RUF071  of characters
    return _WRAPPERS.match(shared)[0]
