"""Mamba-2 in every layout that can hold it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mamba_core.architectures.base import MAX_SIZE, is_number, is_size
from mamba_core.spec.ops.ssd import NO_LIMIT
from mamba_core.weights.tables import mamba
from mamba_core.weights.tables.base import Field, Scheme, Table
from mamba_core.weights.transforms import CHANNELS_LAST, Shape

# Of one layer, the same in every library. The last is no tensor of Mamba-1.
_LAYER = (
    *("norm.weight", "mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.in_proj.bias", mamba.CONV),
    *("mixer.conv1d.bias", "mixer.norm.weight", "mixer.out_proj.weight", "mixer.out_proj.bias", "mixer.dt_bias"),
)
_INFINITE = {"__float__": "Infinity"}  # as transformers 5 writes it
# What mamba_ssm alone has a choice for.
_PLAIN = {"D_has_hdim": False, "norm_before_gate": False, "rmsnorm": True}


def _scheme(task: str, layers: str = mamba.LAYERS, outer: Mapping[str, str] | None = None, **options) -> Scheme:
    return mamba.scheme(task, layers, outer, layer=_LAYER, marks=(mamba.CONV, _LAYER[-1]), **options)


# --- the limit of the step sizes -------------------------------------------------------------------


def _with_limit(values: dict[str, Any], *_: Any) -> dict[str, Any]:
    """The values with the limit as two numbers, however infinity is spelt in it."""
    limit = values.get("dt_limit", NO_LIMIT)
    if limit is None:
        limit = NO_LIMIT
    if isinstance(limit, list | tuple) and len(limit) == 2:
        limit = tuple(bound if said is None else _number(said) for said, bound in zip(limit, NO_LIMIT, strict=True))
    return values | {"dt_limit": limit}


def _number(value: Any) -> Any:
    """A number that JSON has no token for, from what stands for it; any other value as it is."""
    text = value.get("__float__") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        return value
    try:
        return float(text)
    except ValueError:
        return value


# --- transformers, and mlx-lm ----------------------------------------------------------------------


# A model type that transformers' Auto classes refuse, and an activation that its other classes refuse: of models that
# it would compute otherwise.
_OURS = "mamba_core_mamba2"


def _hf_completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers has it: heads and channels are told apart, and must agree."""
    heads, d, expand, p = rest.pop("num_heads", 128), values["d_model"], values["expand"], values["headdim"]
    _expect_size("num_heads", heads)
    if is_size(d) and is_size(p) and is_number(expand):
        some = values.get("d_ssm")  # of ours
        channels = some if is_size(some) else int(d * expand)
        if channels != heads * p:
            raise ValueError(
                f"config has hidden_size {d} and expand {expand}, which are {channels} channels, but num_heads {heads} "
                f"and head_dim {p}, which are {heads * p}; expected as many of both"
            )
    return _with_limit(values)


def _hf_derived(config: Any) -> dict[str, Any]:
    least, most = config.dt_limit
    fields: dict[str, Any] = {"num_heads": config.nheads}
    if math.isinf(most):
        fields["time_step_limit"] = [least, dict(_INFINITE)]
    plain = all(getattr(config, name) == only for name, only in _PLAIN.items())
    if plain and not config.d_gated and config.d_inner % config.d_model == 0:
        return fields | {"expand": config.d_inner // config.d_model}
    return fields | {"model_type": _OURS, "hidden_act": _OURS}


def _refuse_gated_channels(config: Any, layout: str) -> None:
    if config.d_gated:
        raise ValueError(
            f"d_ssm={config.d_ssm} cannot be written as {layout}, whose recurrence has all {config.d_inner} channels"
        )


def _expect_size(name: str, value: Any) -> None:
    if not is_size(value):
        raise ValueError(f"config has {name} {value!r}; expected an integer from 1 to {MAX_SIZE}")


_OF_HF = ("time_step_rank", "time_step_init_scheme", "time_step_scale")
HF = Table(
    schemes=(
        _scheme("lm", outer=mamba.HF_OUTER, classes=("Mamba2ForCausalLM",)),
        _scheme("lm", "layers", mamba.HF_BARE_LM, classes=("Mamba2ForCausalLM",)),  # without "backbone."
        _scheme("features", "layers", mamba.HF_BARE, classes=("Mamba2Model",)),
    ),
    fields={ours: theirs for ours, theirs in mamba.HF_FIELDS.items() if theirs.theirs not in _OF_HF}
    | {
        "d_model": Field("hidden_size", 4096),
        "n_layer": Field("num_hidden_layers", 64),
        "vocab_size": Field("vocab_size", 32768),
        "d_state": Field("state_size", 128),
        "headdim": Field("head_dim", 64),
        "ngroups": Field("n_groups", 8),
        "dt_limit": Field("time_step_limit", NO_LIMIT),
        "chunk_size": Field("chunk_size", 256),
        "tie_embeddings": Field("tie_word_embeddings", False),
        "eos_token_id": Field("eos_token_id", 2),
        "pad_token_id": Field("pad_token_id", 1),
    },
    kinds=("mamba2", _OURS),
    fixed={"hidden_act": (*mamba.ACTIVATION["hidden_act"], _OURS)},
    constants={"hidden_act": "silu"},
    # The first follows from the width and is not used. transformers 4 had the others, and does not use them either.
    unused=("time_step_rank",),
    ignored=(*mamba.HF_IGNORED, *_OF_HF[1:], "intermediate_size", "norm_before_gate", "d_ssm"),
    completed=_hf_completed,
    derived=_hf_derived,
)


def _mlx_completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """As mlx-lm has it: it does not read expand, and a second name of the states counts."""
    heads, states = rest.pop("num_heads", None), rest.pop("ssm_state_size", None)
    d, p = values["d_model"], values["headdim"]
    _expect_size("num_heads", heads)
    if is_size(d) and is_size(p) and (not is_number(values["expand"]) or int(values["expand"] * d) != heads * p):
        values["expand"] = mamba.ratio(heads * p, d)
    return _with_limit(values if states is None else values | {"d_state": states})


def _mlx_derived(config: Any) -> dict[str, Any]:
    _refuse_gated_channels(config, "mlx_lm")
    return {"num_heads": config.nheads, "intermediate_size": config.d_inner}


MLX_LM = dataclasses.replace(
    HF,
    schemes=(_scheme("lm", outer=mamba.HF_OUTER, conv=CHANNELS_LAST, classes=("Mamba2ForCausalLM",)),),
    kinds=("mamba2",),
    fixed=mamba.ACTIVATION,
    constants={**HF.constants, "time_step_rank": "auto"},
    unused=("time_step_rank", "intermediate_size"),
    # Its gated norm goes over all groups, and the norms of its blocks have 1e-5. Read with other values, the config
    # counts: the weights were trained with it, before mlx-lm.
    required={**_PLAIN, "norm_eps": 1e-5, "ngroups": 1},
    completed=_mlx_completed,
    derived=_mlx_derived,
)

# --- mamba_ssm, and mistral-inference which runs it --------------------------------------------------

_SSM = (
    *("d_state", "d_conv", "conv_init", "expand", "headdim", "d_ssm", "ngroups", "A_init_range", "D_has_hdim"),
    *("rmsnorm", "norm_before_gate", "dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias", "conv_bias"),
    "chunk_size",
)
_SPEED = ("use_mem_eff_path", "sequence_parallel", "process_group", "layer_idx")
MAMBA_SSM = dataclasses.replace(
    mamba.MAMBA_SSM,
    schemes=(_scheme("lm", outer=mamba.MAMBA_SSM_OUTER),),
    fields={ours: theirs for ours, theirs in mamba.MAMBA_SSM.fields.items() if isinstance(theirs, Field)}
    | {name: f"ssm_cfg.{name}" for name in _SSM},
    kinds=("Mamba2",),
    assumed=False,
    unused=("fused_add_norm", *(f"ssm_cfg.{name}" for name in _SPEED)),
    completed=_with_limit,
    derived=lambda config: {"ssm_cfg.expand": mamba.whole_expand(config, "mamba_ssm")},
)


def _mistral_derived(config: Any) -> dict[str, Any]:
    _refuse_gated_channels(config, "mistral_inference")
    return {}


MISTRAL_INFERENCE = Table(
    schemes=(_scheme("lm", f"model.{mamba.LAYERS}", {o: f"model.{t}" for o, t in mamba.MAMBA_SSM_OUTER.items()}),),
    fields={
        "d_model": "dim",
        "n_layer": "n_layers",
        "vocab_size": "vocab_size",
        "ngroups": "n_groups",
        "residual_in_fp32": "residual_in_fp32",
        "tie_embeddings": "tie_embeddings",
        "pad_vocab_size_multiple": "pad_vocab_size_multiple",
    },
    kinds=("mamba",),
    assumed=True,
    fixed={"rms_norm": (True,)},
    constants={"rms_norm": True, "fused_add_norm": True},
    unused=("fused_add_norm",),
    # The rest is what mamba_ssm takes where it is told nothing.
    required=_PLAIN
    | {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "dt_limit": NO_LIMIT}
    | {"bias": False, "conv_bias": True, "norm_eps": 1e-5},
    derived=_mistral_derived,
)

# --- mambapy ---------------------------------------------------------------------------------------

_OF_GROUPS = "states of all groups"  # what the tensors tell, and no field is
_MAMBAPY_SAME = ("d_model", "d_conv", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "dt_limit", "bias")
_HEADS = 8  # its convolution wants them in such numbers


def _sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes by canonical name tell."""
    found = mamba.common_sizes(shapes)
    mixer = f"{mamba.LAYERS}.0.mixer."
    (h,) = mamba.shape_of(shapes, mixer + "A_log", "h")
    (e,) = mamba.shape_of(shapes, mixer + "norm.weight", "e")
    (filters, *_) = mamba.shape_of(shapes, f"{mamba.LAYERS}.0.{mamba.CONV}", "c1k")
    beside = filters - e
    if beside < 2 or beside % 2 or e % h:
        raise ValueError(
            f"the sizes cannot be told: {e} channels in {h} heads, of a convolution over {filters}; expected heads of "
            "equal size, and as many filters for B as for C"
        )
    return found | {"expand": mamba.ratio(e, found["d_model"]), "headdim": e // h, _OF_GROUPS: beside // 2}


def _mambapy_completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Groups and states from each other, as the tensors tell their product alone."""
    values = _with_limit(values)
    whole, given = values.pop(_OF_GROUPS, None), {name: values.get(name) for name in ("ngroups", "d_state")}
    if whole is None:
        values = {"ngroups": 1, "d_state": 64} | values
    elif given == {"ngroups": None, "d_state": None}:
        raise ValueError(
            f"the tensors tell that all groups together have {whole} states, not how many groups there are; expected "
            "n_groups in a config.json beside them"
        )
    for name, other in (("ngroups", "d_state"), ("d_state", "ngroups")):
        if whole is not None and given[name] is None and is_size(given[other]):
            values[name] = max(1, whole // given[other])
    fused = rest.pop("use_mem_eff_path", True)
    if not fused and values["ngroups"] != 1:
        raise ValueError(
            f"config has use_mem_eff_path={fused!r} and n_groups={values['ngroups']!r}; mambapy norms all groups "
            "together then, which is another function than Mamba-2, and is not read"
        )
    if values.get("norm_eps", 1e-5) != 1e-5:
        raise ValueError(
            f"config has rms_norm_eps={values['norm_eps']!r}; mambapy's gated norm has 1e-05 whatever it says, and a "
            "model with two of them is not read"
        )
    return values


def _mambapy_derived(config: Any) -> dict[str, Any]:
    _refuse_gated_channels(config, "mambapy")
    if config.nheads % _HEADS:
        raise ValueError(f"{config.nheads} heads cannot be written as mambapy, which has multiples of {_HEADS} only")
    return {"expand_factor": mamba.whole_expand(config, "mambapy")}


MAMBAPY = Table(
    schemes=(_scheme("lm", "mamba.layers", mamba.MAMBAPY_OUTER), _scheme("layers", "layers")),
    fields=mamba.same(*_MAMBAPY_SAME, "conv_bias", "chunk_size", "vocab_size", "pad_vocab_size_multiple")
    | {
        "n_layer": "n_layers",
        "headdim": "d_head",
        "d_state": "d_state",
        "ngroups": "n_groups",
        "expand": "expand_factor",
        "norm_eps": "rms_norm_eps",
        "initializer_range": "base_std",
    },
    fixed={"mup": (False,), "learnable_init_states": (False,), "activation": ("silu", "swish")},
    constants={"use_mem_eff_path": True},
    unused=("mup_base_width", "mup_width_mult", "d_inner", "n_heads"),
    required={**_PLAIN, "norm_eps": 1e-5},
    unread={".mixer.init_states": "the model has learned initial states, which are not read"},
    sizes=_sizes,
    completed=_mambapy_completed,
    derived=_mambapy_derived,
)

TABLES = {
    "hf": mamba.with_hybrids(HF, _OURS),
    "mamba_ssm": mamba.hybrids_of_mamba_ssm(MAMBA_SSM),
    "mambapy": mamba.without_hybrids(MAMBAPY),
    "mistral_inference": mamba.without_hybrids(MISTRAL_INFERENCE),
    "mlx_lm": mamba.without_hybrids(MLX_LM),
}
