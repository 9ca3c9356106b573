"""Configs of the libraries that save a state dict alone: mambapy, its MLX port and MiniMamba.

The sizes come from the tensors, the rest from a config.json beside them in the library's own field names, where there
is one. What neither says is this project's default, which is theirs too for all that changes the function.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mamba_core.config import MambaConfig
from mamba_core.weights.names import EMBEDDING, LAYERS
from mamba_core.weights.transforms import Shape

_OURS = "mamba_core"  # the field that holds what a library has no field for
_READ_ELSEWHERE = ("task", "compat", "extra")


class Library(NamedTuple):
    """The fields of a library's config.

    fields: ours -> theirs.
    plain: theirs that would change the function -> the one value that this architecture has.
    unused: theirs that follow from others, or concern speed only.
    keeps_unknown: whether fields that it does not have may be written; where not, they are lost.
    required: ours -> the one value that it can run; required_of_lm: that one with a head can.
    """

    fields: dict[str, str]
    plain: dict[str, Any]
    unused: tuple[str, ...]
    keeps_unknown: bool
    required: dict[str, Any]
    required_of_lm: dict[str, Any]


_SAME_NAMES = (
    *("d_model", "dt_rank", "d_state", "d_conv", "dt_min", "dt_max", "dt_init", "dt_scale", "bias", "conv_bias"),
    *("vocab_size", "pad_vocab_size_multiple"),
)
_MAMBAPY_MLX_FIELDS = {name: name for name in _SAME_NAMES} | {"n_layer": "n_layers", "expand": "expand_factor"}
_MAMBAPY_PLAIN = {"inner_layernorms": False, "mup": False}
_MAMBAPY_UNUSED = ("mup_base_width", "pscan", "use_cuda", "d_inner")

LIBRARIES = {
    "mambapy": Library(
        fields=_MAMBAPY_MLX_FIELDS | {"norm_eps": "rms_norm_eps", "initializer_range": "base_std"},
        plain=_MAMBAPY_PLAIN,
        unused=_MAMBAPY_UNUSED,
        keeps_unknown=True,
        required={},
        required_of_lm={},
    ),
    "mambapy_mlx": Library(
        fields=_MAMBAPY_MLX_FIELDS,
        plain=_MAMBAPY_PLAIN,
        unused=_MAMBAPY_UNUSED,
        keeps_unknown=True,
        required={"norm_eps": 1e-5, "conv_bias": True},  # for which it has no choice
        required_of_lm={},
    ),
    "minimamba": Library(
        fields={name: name for name in (*_SAME_NAMES, "n_layer", "expand", "dt_init_floor", "tie_embeddings")}
        | {"norm_eps": "norm_epsilon"},
        plain={"rms_norm": True},
        unused=("d_inner", "padded_vocab_size", "use_fast_path", "device", "dtype", "gradient_checkpointing"),
        keeps_unknown=False,
        required={},
        required_of_lm={"bias": False},  # or its head has one too
    ),
}


# Read with another one, the config counts: the weights were trained with it, before mlx-lm had them.
MLX_LM_REQUIRED = {"norm_eps": 1e-5}


def pop_plain(fields: dict[str, Any], plain: Mapping[str, Any]) -> None:
    """Drop fields that have the one value of this architecture. Raises ValueError for another."""
    for name, only in plain.items():
        if (value := fields.pop(name, only)) not in (only, None):
            raise ValueError(f"config has {name}={value!r}; this version reads {name}={only!r} only")


def infer_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of `MambaConfig` that shapes by canonical name tell.

    Raises:
        ValueError: a tensor that tells a size is missing, or has another number of axes, or an empty one.
    """
    first = f"{LAYERS}.0."
    mixer = first + "mixer."
    if first + "norm.weight" not in shapes:
        raise ValueError(f"{first}norm.weight is missing; mambapy's models of mup=True have none, and are not read")
    (d,) = _shape(shapes, first + "norm.weight", "d")
    e, n = _shape(shapes, mixer + "A_log", "en")
    _, _, k = _shape(shapes, mixer + "conv1d.weight", "e1k")
    _, r = _shape(shapes, mixer + "dt_proj.weight", "er")
    sizes = {
        "d_model": d,
        # Counted, not the highest index: a name can claim any.
        "n_layer": len({name.split(".")[2] for name in shapes if name.startswith(LAYERS)}),
        "d_state": n,
        "d_conv": k,
        "expand": _ratio(e, d),
        "dt_rank": r,
        "bias": mixer + "in_proj.bias" in shapes,
        "conv_bias": mixer + "conv1d.bias" in shapes,
        "pad_vocab_size_multiple": 1,
    }
    if EMBEDDING in shapes:
        sizes["vocab_size"], _ = _shape(shapes, EMBEDDING, "vd")
    return sizes


def read_library_config(layout: str, fields: Mapping[str, Any], shapes: Mapping[str, Shape], **told) -> MambaConfig:
    """A config from a library's fields, where it has some, and from the shapes of the tensors by canonical name.

    told: fields of `MambaConfig` that the file tells otherwise; where the fields have them too, those count.

    Raises:
        ValueError: a field has a value that this architecture does not, or a shape does not tell its sizes.
    """
    library, fields = LIBRARIES[layout], dict(fields)
    pop_plain(fields, library.plain)  # before a tensor is missing because of it
    sizes = infer_sizes(shapes)
    for name in library.unused:
        fields.pop(name, None)
    hidden = fields.pop(_OURS, {})
    if not isinstance(hidden, Mapping) or not set(hidden) <= {"extra", *_hidden_names(library)}:
        raise ValueError(f"config has {_OURS} fields {hidden!r}; expected some of {', '.join(_hidden_names(library))}")
    hidden = dict(hidden)
    if not isinstance(shadowed := hidden.pop("extra", {}), Mapping):
        raise ValueError(f"config has {_OURS} fields with extra {shadowed!r}; expected a JSON object")
    known = {ours: fields.pop(theirs) for ours, theirs in library.fields.items() if theirs in fields}
    rows = sizes.get("vocab_size")
    if rows is not None and known.get("vocab_size", rows) != rows:
        known = {"pad_vocab_size_multiple": 8} | known  # the default of the classes that pad
    if known.get("dt_rank") == "auto":  # of which each library has an idea of its own
        del known["dt_rank"]
    known = {**sizes, **told, **known, **hidden}
    if known["dt_rank"] == math.ceil(sizes["d_model"] / 16):
        known["dt_rank"] = "auto"
    return MambaConfig(**known, extra=fields | shadowed)


def write_library_config(layout: str, config: MambaConfig) -> dict[str, Any]:
    """A config in a library's fields, and where it keeps them those that it does not have.

    Fields of `extra` that mean something to the library are kept where it does not look, under "mamba_core".

    Raises:
        ValueError: the library cannot run a model of this config.
    """
    library = LIBRARIES[layout]
    _require(layout, config, library.required | (library.required_of_lm if config.task == "lm" else {}))
    known = {theirs: getattr(config, ours) for ours, theirs in library.fields.items()}
    known["dt_rank"] = config.dt_rank_size
    if library.fields["expand"] == "expand_factor":
        if config.d_inner % config.d_model:
            raise ValueError(f"expand={config.expand} cannot be written as {layout}, which has whole numbers only")
        known["expand_factor"] = config.d_inner // config.d_model
    if not library.keeps_unknown:
        return known
    defaults = MambaConfig()
    hidden = {name: getattr(config, name) for name in _hidden_names(library)}
    changed = {name: value for name, value in hidden.items() if value != getattr(defaults, name)}
    taken = {*known, *library.plain, *library.unused, _OURS, "architecture"}
    if shadowed := {name: value for name, value in config.extra.items() if name in taken}:
        changed["extra"] = shadowed
    extra = {name: value for name, value in config.extra.items() if name not in taken}
    return extra | known | ({_OURS: changed} if changed else {})


def write_mlx_lm_config(config: MambaConfig) -> dict[str, Any]:
    """A config in the fields of transformers, as mlx-lm reads them.

    Raises:
        ValueError: another norm_eps than the one that mlx-lm has, whatever the fields say.
    """
    _require("mlx_lm", config, MLX_LM_REQUIRED)
    return config.to_hf()


def _require(layout: str, config: MambaConfig, required: Mapping[str, Any]) -> None:
    for name, only in required.items():
        if (value := getattr(config, name)) != only:
            raise ValueError(f"{name}={value!r} cannot be written as {layout}, which has {only!r} only")


def _hidden_names(library: Library) -> list[str]:
    """The fields of `MambaConfig` that the library has none for."""
    names = (field.name for field in dataclasses.fields(MambaConfig))
    return [name for name in names if name not in (*library.fields, *_READ_ELSEWHERE)]


def _shape(shapes: Mapping[str, Shape], name: str, axes: str) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) != len(axes) or 0 in shape:
        found = "is missing" if shape is None else f"has shape {shape}"
        raise ValueError(f"the sizes cannot be told: {name} {found}, expected ({', '.join(axes)})")
    return shape


def _ratio(e: int, d: int) -> int | float:
    """expand, such that int(expand * d) is e."""
    if e % d == 0:
        return e // d
    ratio = e / d
    return ratio if int(ratio * d) == e else math.nextafter(ratio, math.inf)
