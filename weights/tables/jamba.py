"""Jamba in every layout that can hold it.

transformers keeps experts in files apart and stacks them in memory. The first remote code, which mambapy follows, has
other names, and calls a feed-forward without a mixture an expert 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mamba_core.architectures.base import is_size
from mamba_core.weights.layouts import HIDDEN
from mamba_core.weights.names import EMBEDDING, FINAL_NORM, HEAD
from mamba_core.weights.tables import mamba
from mamba_core.weights.tables.base import Field, Row, Scheme, Table
from mamba_core.weights.transforms import CHANNELS_LAST, SAME, Transform

# --- names -----------------------------------------------------------------------------------------

_LAYER = f"{mamba.LAYERS}.{{layer}}."
# Of a layer of Mamba, the same in every library, and the norms of dt, B and C.
_SAME = (
    *("A_log", "D", "in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "x_proj.weight"),
    *("dt_proj.weight", "dt_proj.bias", "out_proj.weight", "out_proj.bias"),
)
_NORMS = ("dt", "B", "C")
_HALVES = ("gate_proj", "up_proj")


def _feed_forward(own: str) -> tuple[Row, ...]:
    """As files of transformers have it."""
    return (
        Row("feed_forward.gate_up_proj.weight", tuple(f"{own}{name}.weight" for name in _HALVES)),
        Row("feed_forward.down_proj.weight", f"{own}down_proj.weight"),
        Row("feed_forward.router.weight", f"{own}router.weight"),
    )


_APART = (
    *_feed_forward("feed_forward."),
    Row("feed_forward.experts.gate_up_proj", tuple(f"feed_forward.experts.{{e}}.{name}.weight" for name in _HALVES)),
    Row("feed_forward.experts.down_proj", "feed_forward.experts.{e}.down_proj.weight"),
)
# As transformers 5 has it in memory, and torch saves it.
_STACKED = (
    *_feed_forward("feed_forward."),
    *(Row(name, name) for name in ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")),
)
_SWITCH = (
    *_feed_forward("feed_forward."),
    Row("feed_forward.experts.gate_up_proj", tuple(f"feed_forward.switch_mlp.{n}.weight" for n in _HALVES), axis=1),
    Row("feed_forward.experts.down_proj", "feed_forward.switch_mlp.down_proj.weight"),
)
_MOE = (
    *_feed_forward("moe.experts.0.")[:2],
    Row("feed_forward.router.weight", "moe.router.weight"),
    Row("feed_forward.experts.gate_up_proj", tuple(f"moe.experts.{{e}}.{name}.weight" for name in _HALVES)),
    Row("feed_forward.experts.down_proj", "moe.experts.{e}.down_proj.weight"),
)


def _scheme(
    task: str,
    layers: str,
    outer: Mapping[str, str],
    feed_forward: tuple[Row, ...] = _APART,
    *,
    conv: Transform = SAME,
    classes: tuple[str, ...] = (),
) -> Scheme:
    """layers, outer: as for Mamba. feed_forward: its rows, those of the first remote code for all its names."""
    first = feed_forward is _MOE
    norms = {name: f"{name if first else name.lower()}_layernorm" for name in _NORMS}
    mixer = [
        *(Row(f"mixer.{name}", f"mamba.{name}", conv if name == "conv1d.weight" else SAME) for name in _SAME),
        *(Row(f"mixer.{ours}_norm.weight", f"mamba.{theirs}.weight") for ours, theirs in norms.items()),
    ]
    attention = [
        Row("mixer.in_proj.weight", tuple(f"self_attn.{name}_proj.weight" for name in "qkv")),
        Row("mixer.out_proj.weight", "self_attn.o_proj.weight"),
    ]
    of_layer = [
        Row("norm.weight", "input_layernorm.weight", mark=True),
        *(row._replace(mixer="jamba") for row in mixer),
        *(row._replace(mixer="attention") for row in attention),
        Row("norm2.weight", "pre_moe_layernorm.weight" if first else "pre_ff_layernorm.weight", mark=True),
        *feed_forward,
    ]
    rows = [Row(ours, theirs, mark=ours == EMBEDDING) for ours, theirs in outer.items()]
    for row in of_layer:
        stored = tuple(f"{layers}.{{layer}}.{name}" for name in row.names)
        rows.append(row._replace(canonical=_LAYER + row.canonical, stored=stored))
    return Scheme(task, tuple(rows), classes)


_OUTER = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.final_layernorm.weight", HEAD: "lm_head.weight"}
_BARE = {EMBEDDING: "embed_tokens.weight", FINAL_NORM: "final_layernorm.weight"}
_MAMBAPY_OUTER = {EMBEDDING: "embedding.weight", FINAL_NORM: "final_layernorm.weight", HEAD: "lm_head.weight"}

# --- fields ----------------------------------------------------------------------------------------

_LISTS = {"layers_block_type": ("attention", "mamba"), "layer_types": ("full_attention", "linear_attention")}
_AUX, _OUTPUT = "router_aux_loss_coef", "output_router_logits"
_LENGTH = "max_position_embeddings"


def _completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers has it."""
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    _expect("num_local_experts", rest.pop("num_local_experts", None), "num_experts", values["num_experts"])
    heads, d = values["num_heads"], values["d_model"]
    if is_size(heads) and is_size(d):
        _expect("head_dim", rest.pop("head_dim", None), "hidden_size / num_attention_heads", d // heads)
    for name, kinds in _LISTS.items():
        _check_layers(name, rest.pop(name, None), kinds, values)
    # The loss of the routers counts only where their logits are an output. The file's fields are kept for that.
    output = rest.pop(_OUTPUT, False)
    if not output or not values[_AUX]:
        rest |= {_AUX: values[_AUX], _OUTPUT: output}
        values[_AUX] = 0.0
    return _common(values)


def _common(values: dict[str, Any]) -> dict[str, Any]:
    """One expert is no mixture, however many a position has."""
    if values["num_experts"] == 1:
        values["num_experts_per_tok"] = 1
    return mamba.automatic_rank(values)


def _expect(name: str, value: Any, other: str, expected: Any) -> None:
    if value is not None and value != expected:
        raise ValueError(f"config has {name} {value!r} but {other} {expected!r}; expected the same of both")


def _check_layers(name: str, found: Any, kinds: tuple[str, str], values: Mapping[str, Any]) -> None:
    """A list of the layers' kinds must be what the period gives, from which the layers are made."""
    period, offset, count = (values[field] for field in ("attn_layer_period", "attn_layer_offset", "n_layer"))
    if found is None or not all(type(value) is int for value in (period, offset, count)) or period < 1:
        return
    of_attention, of_mamba = kinds
    if not isinstance(found, list) or len(found) != count:
        size = f"{len(found)} entries" if isinstance(found, list) else f"{found!r}"
        raise ValueError(f"config has {name} of {size}; expected a list of {count}, one a layer")
    for layer, kind in enumerate(found):
        expected = of_attention if layer % period == offset else of_mamba
        if kind != expected:
            raise ValueError(
                f"config has {name} with {kind!r} at layer {layer}, but by attn_layer_period {period} and "
                f"attn_layer_offset {offset} it is {expected!r}; expected the same of both"
            )


def _derived(config: Any, layout: str) -> dict[str, Any]:
    fields = {"mamba_expand": mamba.whole_expand(config, layout), "mamba_dt_rank": config.dt_rank_size}
    if config.router_aux_loss_coef:
        return fields | {_OUTPUT: True}
    kept = {_AUX: HF_FIELDS[_AUX].default, _OUTPUT: False}
    return fields | {name: config.extra.get(name, value) for name, value in kept.items()}


HF_FIELDS = {
    "d_model": Field("hidden_size", 4096),
    "n_layer": Field("num_hidden_layers", 32),
    "vocab_size": Field("vocab_size", 65536),
    "norm_eps": Field("rms_norm_eps", 1e-6),
    "tie_embeddings": Field("tie_word_embeddings", False),
    "initializer_range": Field("initializer_range", 0.02),
    "bos_token_id": Field("bos_token_id", 1),
    "eos_token_id": Field("eos_token_id", 2),
    "pad_token_id": Field("pad_token_id", 0),
    "d_state": Field("mamba_d_state", 16),
    "d_conv": Field("mamba_d_conv", 4),
    "expand": Field("mamba_expand", 2),
    "dt_rank": Field("mamba_dt_rank", "auto"),
    "bias": Field("mamba_proj_bias", False),
    "conv_bias": Field("mamba_conv_bias", True),
    "d_intermediate": Field("intermediate_size", 14336),
    "num_heads": Field("num_attention_heads", 32),
    "num_kv_heads": Field("num_key_value_heads", 8),
    "attn_layer_period": Field("attn_layer_period", 8),
    "attn_layer_offset": Field("attn_layer_offset", 4),
    "num_experts": Field("num_experts", 16),
    "num_experts_per_tok": Field("num_experts_per_tok", 2),
    "expert_layer_period": Field("expert_layer_period", 2),
    "expert_layer_offset": Field("expert_layer_offset", 1),
    _AUX: Field(_AUX, 0.001),
}
_NO_NORMS = "a model without norms of dt, B and C is another function than Jamba, and is not read"
_WINDOW = "attention goes over the whole sequence"
HF = Table(
    schemes=(
        _scheme("lm", "model.layers", _OUTER, classes=("JambaForCausalLM",)),
        _scheme("lm", "model.layers", _OUTER, _STACKED, classes=("JambaForCausalLM",)),
        _scheme("lm", "model.layers", _OUTER, _MOE, classes=("JambaForCausalLM",)),
        _scheme("features", "layers", _BARE, classes=("JambaModel",)),
        _scheme("features", "layers", _BARE, _STACKED, classes=("JambaModel",)),
        _scheme("features", "layers", _BARE, _MOE, classes=("JambaModel",)),
    ),
    fields=HF_FIELDS,
    kinds=("jamba",),
    fixed=mamba.ACTIVATION | {"mamba_inner_layernorms": (True,), "sliding_window": (None,)},
    reasons={"mamba_inner_layernorms": _NO_NORMS, "sliding_window": _WINDOW},
    constants={"hidden_act": "silu"},
    ignored=("num_local_experts", "head_dim", *_LISTS, _OUTPUT, _LENGTH),
    unread=dict.fromkeys(
        ("_proj_scale_inv", "_proj_scale", "_proj_scales", "_proj_blocks"), "quantised; save it dequantised"
    ),
    completed=_completed,
    derived=lambda config: _derived(config, "hf"),
)

# --- mlx-lm ----------------------------------------------------------------------------------------


def _mlx_differs(config: Any) -> str | None:
    """It softmaxes the logits of the chosen experts alone, and counts layers from the other side of the offset."""
    mixtures = [bool(config.feed_forward(layer).experts) for layer in range(config.n_layer)]
    if any(mixtures) and config.num_experts_per_tok < config.num_experts:
        return (
            f"mlx_lm lets the weights of the {config.num_experts_per_tok} chosen of {config.num_experts} experts sum "
            "to 1, where Jamba takes their probabilities among all"
        )
    theirs = [
        config.num_experts > 1 and (layer + config.expert_layer_offset) % config.expert_layer_period == 0
        for layer in range(config.n_layer)
    ]
    if theirs != mixtures:
        return (
            f"mlx_lm has mixtures in other layers for expert_layer_period={config.expert_layer_period} and "
            f"expert_layer_offset={config.expert_layer_offset}"
        )
    return None


def _mlx_derived(config: Any) -> dict[str, Any]:
    if len({config.attention(layer) is None for layer in range(config.n_layer)}) < 2:
        raise ValueError("a model of attention or of Mamba alone cannot be written as mlx_lm, which wants both")
    # It has no default for the length, and nothing that depends on it.
    return _derived(config, "mlx_lm") | {_LENGTH: config.extra.get(_LENGTH, 262144)}


MLX_LM = dataclasses.replace(
    HF,
    schemes=(_scheme("lm", "model.layers", _OUTER, _SWITCH, conv=CHANNELS_LAST, classes=("JambaForCausalLM",)),),
    fields=HF_FIELDS | {"tie_embeddings": Field("tie_word_embeddings", True)},
    differs=_mlx_differs,
    derived=_mlx_derived,
)

# --- mambapy ---------------------------------------------------------------------------------------

_NEEDED = ("d_model", "n_layer", "d_intermediate")  # for which it has no default


def _mambapy_completed(values: dict[str, Any], rest: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    theirs = MAMBAPY.rows()
    if missing := [theirs[name].theirs for name in _NEEDED if values[name] is None]:
        raise ValueError(
            f"config has no {' and no '.join(missing)}; the tensors do not tell how many heads attention has, nor how "
            "many experts a position; expected the fields of mambapy's JambaLMConfig in a config.json beside them"
        )
    return _common(values)


def _mambapy_derived(config: Any) -> dict[str, Any]:
    fields = {"expand_factor": mamba.whole_expand(config, "mambapy"), "dt_rank": config.dt_rank_size}
    if config.padded_vocab_size != config.vocab_size:
        fields |= {"vocab_size": config.padded_vocab_size, HIDDEN: {"vocab_size": config.vocab_size}}
    return fields


_ONE_NAME = (
    *("d_model", "initializer_range", "d_state", "d_conv", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale"),
    *("bias", "conv_bias", "num_experts", "num_experts_per_tok", "attn_layer_offset", "attn_layer_period"),
    *("expert_layer_offset", "expert_layer_period", "vocab_size"),
)
MAMBAPY = Table(
    schemes=(
        _scheme("lm", "jamba.layers", _MAMBAPY_OUTER, _MOE),
        _scheme("layers", "layers", {}, _MOE),
    ),
    fields=mamba.same(*_ONE_NAME)
    | {
        "d_model": Field("d_model", None),
        "n_layer": Field("n_layers", None),
        "d_intermediate": Field("mlp_size", None),
        "norm_eps": Field("rms_norm_eps", 1e-5),
        "expand": Field("expand_factor", 2),
        "num_heads": Field("num_attention_heads", 32),
        "num_kv_heads": Field("num_key_value_heads", 8),
        "pad_token_id": Field("pad_token_id", 0),
        "tie_embeddings": Field("tie_lm_weights", True),
    },
    fixed={"inner_layernorms": (True,)},
    reasons={"inner_layernorms": _NO_NORMS},
    unused=("pscan", "use_cuda", "d_inner"),
    hides=("vocab_size",),
    completed=_mambapy_completed,
    derived=_mambapy_derived,
)

TABLES = {"hf": HF, "mambapy": MAMBAPY, "mlx_lm": MLX_LM}
