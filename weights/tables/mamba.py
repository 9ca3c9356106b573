"""Mamba-1 in every layout."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from mamba_core.architectures.base import MAX_SIZE, is_number, is_size
from mamba_core.spec.blocks.hybrid import HybridConfig
from mamba_core.weights.layouts import HIDDEN
from mamba_core.weights.names import EMBEDDING, FINAL_NORM, HEAD
from mamba_core.weights.tables.base import Field, Row, Scheme, Table
from mamba_core.weights.transforms import CHANNELS_LAST, DENSE, HALVES, SAME, Shape, Transform

LAYERS = "backbone.layers"
_LAYERS = f"{LAYERS}.{{layer}}."
CONV = "mixer.conv1d.weight"
# Of one layer: the names are the same in every library but for those of the convolution in one.
_LAYER = (
    *("norm.weight", "mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.in_proj.bias", CONV, "mixer.conv1d.bias"),
    *("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.out_proj.weight"),
    "mixer.out_proj.bias",
)


def scheme(
    task: str,
    layers: str = LAYERS,
    outer: Mapping[str, str] | None = None,
    *,
    layer: tuple[str, ...] = _LAYER,
    marks: tuple[str, ...] = (CONV,),
    conv: Transform = SAME,
    conv_name: str = "mixer.conv1d.",
    classes: tuple[str, ...] = (),
    left_out: tuple[str, ...] = (),
) -> Scheme:
    """The names of a model's tensors.

    layers: theirs for the layers. outer: canonical name -> theirs, outside the layers.
    layer: the names of one layer's tensors. marks: those that tell such a file.
    conv, conv_name: how the convolution's weight is stored, and its name.
    """
    rows = [Row(ours, theirs, mark=ours == EMBEDDING) for ours, theirs in (outer or {}).items()]
    for name in layer:
        theirs = f"{layers}.{{layer}}.{name.replace('mixer.conv1d.', conv_name)}"
        rows.append(Row(f"{LAYERS}.{{layer}}.{name}", theirs, conv if name == CONV else SAME, mark=name in marks))
    return Scheme(task, tuple(rows), classes, left_out)


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# --- transformers, and mlx-lm ----------------------------------------------------------------------

HF_FIELDS = {
    "d_model": Field("hidden_size", 768),
    "n_layer": Field("num_hidden_layers", 32),
    "vocab_size": Field("vocab_size", 50280),
    "d_state": Field("state_size", 16),
    "d_conv": Field("conv_kernel", 4),
    "expand": Field("expand", 2),
    "dt_rank": Field("time_step_rank", "auto"),
    "dt_min": Field("time_step_min", 0.001),
    "dt_max": Field("time_step_max", 0.1),
    "dt_init": Field("time_step_init_scheme", "random"),
    "dt_scale": Field("time_step_scale", 1.0),
    "dt_init_floor": Field("time_step_floor", 1e-4),
    "bias": Field("use_bias", False),
    "conv_bias": Field("use_conv_bias", True),
    "norm_eps": Field("layer_norm_epsilon", 1e-5),
    "residual_in_fp32": Field("residual_in_fp32", True),
    "tie_embeddings": Field("tie_word_embeddings", True),
    # transformers 5 divides the out_proj.weight that it loads by sqrt(n_layer) where this is true.
    "rescale_prenorm_residual": Field("rescale_prenorm_residual", False, writes=False),
    "initializer_range": Field("initializer_range", 0.1),
    "bos_token_id": Field("bos_token_id", 0),
    "eos_token_id": Field("eos_token_id", 0),
    "pad_token_id": Field("pad_token_id", 0),
}
# The first follows from the width, or counts instead of it. Published configs have the fields of mamba_ssm too.
HF_IGNORED = (
    "intermediate_size",
    "d_inner",
    "d_model",
    "fused_add_norm",
    "n_layer",
    "pad_vocab_size_multiple",
    "rms_norm",
    "ssm_cfg",
)
ACTIVATION = {"hidden_act": ("silu", "swish")}


def hf_completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers has it: an intermediate_size counts, whatever expand is."""
    d, inner = values["d_model"], rest.pop("intermediate_size", None)
    if inner is not None:
        if not is_size(inner):
            raise ValueError(f"config has intermediate_size {inner!r}; expected an integer from 1 to {MAX_SIZE}")
        if is_size(d) and not (is_number(values["expand"]) and inner <= values["expand"] * d < inner + 1):
            values["expand"] = ratio(inner, d)
    return automatic_rank(values)


def hf_derived(config: Any) -> dict[str, Any]:
    """transformers takes no expand that is no whole number, but counts intermediate_size."""
    fields = {"intermediate_size": config.d_inner, "time_step_rank": config.dt_rank_size}
    if config.expand != int(config.expand):
        fields |= {"expand": math.ceil(config.expand), HIDDEN: {"expand": config.expand}}
    return fields


HF_OUTER = same(EMBEDDING, FINAL_NORM, HEAD)
HF_BARE = {EMBEDDING: "embeddings.weight", FINAL_NORM: "norm_f.weight"}
HF_BARE_LM = HF_BARE | same(HEAD)
HF = Table(
    schemes=(
        scheme("lm", outer=HF_OUTER, classes=("MambaForCausalLM",)),
        scheme("lm", "layers", HF_BARE_LM, classes=("MambaForCausalLM",)),  # without "backbone."
        scheme(
            "features",
            "layers",
            HF_BARE,
            classes=("MambaModel",),
        ),
    ),
    fields=HF_FIELDS,
    kinds=("mamba",),
    assumed=True,
    fixed=ACTIVATION | {"use_bcdt_rms": (False,)},
    constants={"hidden_act": "silu"},
    ignored=HF_IGNORED,
    hides=("expand",),
    completed=hf_completed,
    derived=hf_derived,
)
MLX_LM = dataclasses.replace(
    HF,
    # Its one class reads both; without a head it reads none.
    schemes=(scheme("lm", outer=HF_OUTER, conv=CHANNELS_LAST, classes=("MambaForCausalLM",)),),
    # It has no choice. Read with another one, the config counts: the weights were trained with it, before mlx-lm.
    required={"norm_eps": 1e-5},
)

# --- mamba_ssm -------------------------------------------------------------------------------------

_SSM = (
    *("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"),
    *("bias", "conv_bias"),
)
MAMBA_SSM_OUTER = HF_OUTER | {EMBEDDING: "backbone.embedding.weight"}
MAMBA_SSM = Table(
    schemes=(scheme("lm", outer=MAMBA_SSM_OUTER),),
    fields={
        "d_model": Field("d_model", 2560),
        "n_layer": Field("n_layer", 64),
        "vocab_size": Field("vocab_size", 50277),
        "residual_in_fp32": Field("residual_in_fp32", True),
        "tie_embeddings": Field("tie_embeddings", True),
        "pad_vocab_size_multiple": Field("pad_vocab_size_multiple", 8),
    }
    | {name: f"ssm_cfg.{name}" for name in _SSM},
    kinds=("Mamba1",),
    assumed=True,
    fixed={"rms_norm": (True,), "d_intermediate": (0,), "attn_layer_idx": ([],), "attn_cfg": ({},)},
    constants={"rms_norm": True, "fused_add_norm": True},
    unused=("fused_add_norm", "use_fast_path", "ssm_cfg.fused_add_norm", "ssm_cfg.use_fast_path"),
    required={"norm_eps": 1e-5},
)

# --- mambapy and its port to MLX -------------------------------------------------------------------

LIBRARY_NAMES = (
    *("d_model", "dt_rank", "d_state", "d_conv", "dt_min", "dt_max", "dt_init", "dt_scale", "bias", "conv_bias"),
    *("vocab_size", "pad_vocab_size_multiple"),
)
_MAMBAPY_MLX_FIELDS = same(*LIBRARY_NAMES) | {"n_layer": "n_layers", "expand": "expand_factor"}
MAMBAPY_OUTER = {EMBEDDING: "embedding.weight", FINAL_NORM: "norm_f.weight", HEAD: "lm_head.weight"}


def sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes by canonical name tell."""
    found = common_sizes(shapes)
    mixer = f"{LAYERS}.0.mixer."
    e, n = shape_of(shapes, mixer + "A_log", "en")
    _, r = shape_of(shapes, mixer + "dt_proj.weight", "er")
    return found | {"d_state": n, "expand": ratio(e, found["d_model"]), "dt_rank": r}


def common_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Those that every Mamba's tensors tell in the same way."""
    first = f"{LAYERS}.0."
    if first + "norm.weight" not in shapes:
        raise ValueError(
            f"{first}norm.weight is missing, which tells d_model; mambapy's models of mup=True are not read"
        )
    (d,) = shape_of(shapes, first + "norm.weight", "d")
    _, _, k = shape_of(shapes, first + CONV, "e1k")
    found = {
        "d_model": d,
        # Counted, not the highest index: a name can claim any.
        "n_layer": len({name.split(".")[2] for name in shapes if name.startswith(LAYERS)}),
        "d_conv": k,
        "bias": first + "mixer.in_proj.bias" in shapes,
        "conv_bias": first + "mixer.conv1d.bias" in shapes,
        "pad_vocab_size_multiple": 1,
    }
    if EMBEDDING in shapes:
        found["vocab_size"], _ = shape_of(shapes, EMBEDDING, "vd")
    return found


def library_completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("dt_rank") == "auto":  # of which each library has an idea of its own
        values["dt_rank"] = sizes.get("dt_rank", "auto")
    return automatic_rank(values, sizes.get("d_model", values["d_model"]))


def _mambapy_derived(config: Any) -> dict[str, Any]:
    return {"expand_factor": whole_expand(config, "mambapy"), "dt_rank": config.dt_rank_size}


def whole_expand(config: Any, layout: str) -> int:
    """expand, for a library that has whole numbers only."""
    if config.d_inner % config.d_model:
        raise ValueError(f"expand={config.expand} cannot be written as {layout}, which has whole numbers only")
    return config.d_inner // config.d_model


MAMBAPY = Table(
    schemes=(scheme("lm", "mamba.layers", MAMBAPY_OUTER), scheme("layers", "layers")),
    fields=_MAMBAPY_MLX_FIELDS | {"norm_eps": "rms_norm_eps", "initializer_range": "base_std"},
    fixed={"inner_layernorms": (False,), "mup": (False,)},
    unused=("mup_base_width", "pscan", "use_cuda", "d_inner"),
    unread={
        ".mixer.dt_layernorm.weight": "the model has norms of dt, B and C, another function than Mamba, which is not "
        "read"
    },
    sizes=sizes,
    completed=library_completed,
    derived=_mambapy_derived,
)
# Of mamba-minimal, whose head is always the embedding. mamba_ssm's model without its head has the same names.
MAMBA_MINIMAL = dataclasses.replace(
    MAMBA_SSM,
    schemes=(scheme("lm", "layers", MAMBAPY_OUTER),),
    required={"norm_eps": 1e-5, "tie_embeddings": True},
    sizes=sizes,
    completed=library_completed,
)
_dense = partial(scheme, conv=DENSE, conv_name="mixer.conv1d.conv1d.")
MAMBAPY_MLX = dataclasses.replace(
    MAMBAPY,
    schemes=(_dense("lm", "mamba.layers", MAMBAPY_OUTER), _dense("layers", "layers")),
    fields=_MAMBAPY_MLX_FIELDS,
    required={"norm_eps": 1e-5, "conv_bias": True},  # for which it has no choice
)

# --- hybrids ---------------------------------------------------------------------------------------

_PLAIN = {"attn_layer_idx": (), "d_intermediate": 0}
_MAMBA_SSM_FORWARD = {"norm2.weight": "norm2.weight", "feed_forward.down_proj.weight": "mlp.fc2.weight"}
_OWN_FORWARD = same("norm2.weight", "feed_forward.gate_up_proj.weight", "feed_forward.down_proj.weight")


def without_hybrids(table: Table) -> Table:
    """Of a library that has no hybrids."""
    return dataclasses.replace(table, required={**table.required, **_PLAIN}, hides=(*table.hides, *HybridConfig.FIELDS))


def with_hybrids(table: Table, ours: str) -> Table:
    """Of our own layout: hybrids have our names, and a model type and an activation that transformers refuses."""

    def derived(config: Any) -> dict[str, Any]:
        fields, changed = table.derived(config), _changed(config)
        if changed:
            fields = fields | {HIDDEN: fields.get(HIDDEN, {}) | changed}
        return fields | ({"model_type": ours, "hidden_act": ours} if set(changed) - {"attn_cfg"} else {})

    return dataclasses.replace(
        table,
        schemes=tuple(_with_rows(scheme, _OWN_FORWARD) for scheme in table.schemes),
        kinds=tuple(dict.fromkeys((*table.kinds, ours))),
        fixed={**table.fixed, "hidden_act": tuple(dict.fromkeys((*table.fixed["hidden_act"], ours)))},
        hides=(*table.hides, *HybridConfig.FIELDS),
        derived=derived,
    )


def hybrids_of_mamba_ssm(table: Table) -> Table:
    """Their fields are written where they are not the defaults: early releases do not take them."""

    def completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: rest.pop(name, None) for name in HybridConfig.FIELDS}
        return table.completed(values | {k: v for k, v in given.items() if v is not None}, rest, sizes)

    up_before_gate = Row(f"{_LAYERS}feed_forward.gate_up_proj.weight", f"{_LAYERS}mlp.fc1.weight", HALVES)
    schemes = (_with_rows(scheme, _MAMBA_SSM_FORWARD) for scheme in table.schemes)
    return dataclasses.replace(
        table,
        schemes=tuple(dataclasses.replace(scheme, rows=(*scheme.rows, up_before_gate)) for scheme in schemes),
        fixed={name: values for name, values in table.fixed.items() if name not in HybridConfig.FIELDS},
        ignored=(*table.ignored, *HybridConfig.FIELDS),
        completed=completed,
        derived=lambda config: table.derived(config) | _changed(config),
    )


def _changed(config: Any) -> dict[str, Any]:
    """The fields of hybrids that are not the defaults, as JSON has them."""
    found = {name: getattr(config, name) for name in HybridConfig.FIELDS}
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items() if value}


def _with_rows(scheme: Scheme, names: Mapping[str, str]) -> Scheme:
    """names: ours in a layer -> theirs."""
    first = next(row.names[0] for row in scheme.rows if row.canonical == f"{_LAYERS}norm.weight")
    layers = first.removesuffix("norm.weight")
    rows = tuple(Row(_LAYERS + ours, layers + theirs) for ours, theirs in names.items())
    return dataclasses.replace(scheme, rows=(*scheme.rows, *rows))


TABLES = {
    "hf": with_hybrids(HF, "mamba_core_mamba"),
    "mamba_ssm": hybrids_of_mamba_ssm(MAMBA_SSM),
    "mamba_minimal": without_hybrids(MAMBA_MINIMAL),
    "mambapy": without_hybrids(MAMBAPY),
    "mambapy_mlx": without_hybrids(MAMBAPY_MLX),
    "mlx_lm": without_hybrids(MLX_LM),
}


def automatic_rank(values: dict[str, Any], d: Any = None) -> dict[str, Any]:
    """The rank as "auto" where it is what that stands for, so that equal models have equal configs."""
    d = values["d_model"] if d is None else d
    if is_size(d) and values["dt_rank"] == math.ceil(d / 16):
        values["dt_rank"] = "auto"
    return values


def ratio(e: int, d: int) -> int | float:
    """expand, such that int(expand * d) is e."""
    if e % d == 0:
        return e // d
    found = e / d
    return found if int(found * d) == e else math.nextafter(found, math.inf)


def shape_of(shapes: Mapping[str, Shape], name: str, axes: str) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) != len(axes) or 0 in shape:
        found = "is missing" if shape is None else f"has shape {shape}"
        raise ValueError(f"the sizes cannot be told: {name} {found}, expected ({', '.join(axes)})")
    return shape
