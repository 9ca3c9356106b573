"""Configs: sizes, translation to and from the other libraries' fields, and refusals."""

import copy
import dataclasses
import json
import pickle

import pytest

from mamba_core import architectures
from mamba_core.config import MambaConfig, from_dict, preset
from mamba_core.spec.params import parameter_count, parameter_table

from .layout_files import of_architecture

CHANGED = MambaConfig(
    d_model=40, n_layer=3, vocab_size=101, d_state=7, d_conv=3, expand=3, dt_rank=5, dt_min=0.002, dt_max=0.2,
    dt_init="constant", dt_scale=2.0, dt_init_floor=1e-3, bias=True, conv_bias=False, residual_in_fp32=False,
    tie_embeddings=False, pad_vocab_size_multiple=16,
)  # fmt: skip
FEATURES = dataclasses.replace(CHANGED, task="features")
MINIMAMBA = of_architecture(CHANGED, "minimamba")
# Of Mamba-1: those that every library has.
PRESETS = {name: config for name, config in architectures.presets().items() if type(config) is MambaConfig}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
    ],
)
def test_presets_have_the_published_sizes(name, count):
    assert parameter_count(preset(name)) == count
    assert preset(name).padded_vocab_size == 50280


@pytest.mark.parametrize(
    "config",
    [
        *(*PRESETS.values(), CHANGED, FEATURES, MINIMAMBA),
        *(dataclasses.replace(CHANGED, norm_eps=1e-3), dataclasses.replace(MINIMAMBA, task="features")),
    ],
)
def test_hf_fields_and_back(config):
    assert from_dict(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("config", [*PRESETS.values(), CHANGED])
def test_mamba_ssm_fields_and_back(config):
    assert from_dict(json.loads(json.dumps(config.to_mamba_ssm()))) == config


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), CHANGED, FEATURES, MINIMAMBA, dataclasses.replace(MINIMAMBA, task="layers")]
)
def test_own_fields_and_back(config):
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_published_hf_config_is_read():
    """The fields of state-spaces/mamba-130m-hf."""
    fields = {
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
        "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
        "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
        "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
        "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
        "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "use_bias": False, "use_cache": True,
        "use_conv_bias": True, "vocab_size": 50280,
    }  # fmt: skip
    config = from_dict(fields)
    assert parameter_count(config) == 129_135_360
    assert config.extra["ssm_cfg"] == {}
    assert config.to_hf()["use_cache"] is True
    assert from_dict(config.to_hf()) == config


def test_published_mamba_ssm_config_is_read():
    """The fields of state-spaces/mamba-130m."""
    fields = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    fields |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    assert from_dict(fields) == PRESETS["mamba-130m"]
    assert from_dict(fields | {"ssm_cfg": {"d_state": 8, "dt_rank": 3, "use_fast_path": False}}).d_state == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "rwkv"}, "model_type 'rwkv'; this version reads .*'mamba'"),
        ({"model_type": ["mamba"]}, r"model_type \['mamba'\]"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "hidden_act='gelu'; this version reads hidden_act='silu' only"),
        ({"model_type": "mamba", "hidden_act": "minimamba"}, "hidden_act='minimamba'"),
        (
            {"model_type": "mamba_core_minimamba", "hidden_act": "silu"},
            "hidden_act='silu'; this version reads hidden_act='minimamba' only",
        ),
        ({"task": "classification"}, "task is 'classification'; expected one of .*features, .*lm"),
        ({"compat": "minimamba"}, "unknown fields: compat"),
        ({f"field{n:03}": 1 for n in range(300)}, "field006, field007 and 292 more; known"),
        ({"x" * 5000: 1}, "unknown fields: x{60}; known"),
        ({"model_type": "mamba", "architectures": [{}] * 5000}, r"architectures \[\{\}, [^\n]{400,500}\.\.\.$"),
        ({"d_model": 64, "ssm_cfg": {f"field{n:03}": 1 for n in range(300)}}, "'field007' and 292 more$"),
        ({"d_model": "x" * 5000}, r"d_model is 'x+\.\.\.x+'; expected"),
        ({"task_options": "x"}, "task_options is 'x'; expected a mapping"),
        ({"task_options": {"a": []}}, "do not fit task 'lm'; expected names and numbers"),
        ({"model_type": "mamba", "intermediate_size": "100"}, "intermediate_size '100'; expected an integer from 1"),
        ({"model_type": "mamba", "intermediate_size": 0}, "intermediate_size 0; expected"),
        ({"model_type": "mamba", "architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'; those of .*MambaModel"),
        ({"model_type": "mamba", "architectures": "MambaModel"}, "architectures 'MambaModel'; expected a list"),
        (
            {"model_type": "mamba", "use_bcdt_rms": True},
            "use_bcdt_rms=True; this version reads use_bcdt_rms=False only",
        ),
        ({"model_type": "mamba", "hidden_size": 10**400}, "d_model is 1000.*from 1 to 2147483647"),
        ({"model_type": "mamba", "vocab_size": 2**31}, "vocab_size is 2147483648; expected an integer from 1 to"),
        ({"dt_rank": 10**400}, "dt_rank is 1000"),
        ({"expand": 1e308}, r"expand=1e\+308 of d_model=768"),
        ({"expand": 10**400}, "expand is 1000.* a positive number"),
        ({"dt_max": 10**400}, "dt_max is 1000.* a positive number"),
        ({"eos_token_id": [3, 10**400]}, "eos_token_id is .3, 1000.* an integer"),
        ({"d_model": 64, "ssm_cfg": {"layer": "Mamba3"}}, "layer 'Mamba3'"),
        ({"d_model": 64, "ssm_cfg": {"ngroups": 8}}, "ngroups"),
        ({"d_model": 64, "ssm_cfg": {}, "rms_norm": False}, "rms_norm=False"),
        ({"d_model": 64, "ssm_cfg": {}, "attn_layer_idx": [3]}, "attn_cfg has num_heads None; expected an"),
        ({"d_model": 64, "layers": 3}, "unknown fields: layers"),
        ({"d_model": 0}, "d_model is 0; expected an integer from 1 to 2147483647"),
        ({"d_model": True}, "d_model is True"),
        ({"dt_min": 0.5}, "dt_max is 0.1"),
        ({"dt_rank": "full"}, "dt_rank is 'full'"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"architecture": "transformer"}, "architecture 'transformer'"),
        ({"architecture": "x" * 5000}, r"architecture 'x+\.\.\.x+'; known"),
    ],
)
def test_what_cannot_be_read_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_dict(fields)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"mamba-130m.*mamba-2.8b"):
        preset("mamba-3b")


def test_transformers_must_not_rescale_what_it_loads():
    assert CHANGED.rescale_prenorm_residual
    assert CHANGED.to_hf()["rescale_prenorm_residual"] is False
    assert from_dict(CHANGED.to_hf()).rescale_prenorm_residual


def test_unknown_fields_never_change_what_is_written_as_hf():
    """Fields that mean nothing to mamba_ssm, but something to transformers or mlx-lm."""
    extra = {"layer_norm_epsilon": 0.1, "hidden_size": 3, "hidden_act": "gelu", "vocab_size_note": 1}
    extra |= {"use_bcdt_rms": False, "dtype": "float16", "torch_dtype": "float16", "mamba_core": {"vocab_size": 7}}
    extra |= {"architecture": "mamba"}  # by which this project's own fields are told
    config = MambaConfig.from_mamba_ssm({"d_model": 64, "n_layer": 2, "vocab_size": 50, "rms_norm": True} | extra)
    written = config.to_hf()
    assert from_dict(written) == config
    assert written == MambaConfig(d_model=64, n_layer=2, vocab_size=50).to_hf() | {"vocab_size_note": 1}


def test_hf_numbers_have_the_types_that_transformers_checks():
    config = dataclasses.replace(CHANGED, expand=2.0, dt_scale=1, dt_init_floor=0, dt_max=1, initializer_range=1)
    fields = config.to_hf()
    assert type(fields["expand"]) is int
    names = ("step_scale", "step_floor", "step_max", "step_min")
    for name in ("layer_norm_epsilon", "initializer_range", *(f"time_{name}" for name in names)):
        assert type(fields[name]) is float, name
    assert from_dict(fields) == config
    fractional = dataclasses.replace(CHANGED, expand=1.5)
    assert from_dict(fractional.to_hf()) == fractional
    assert fractional.to_hf()["expand"] == 2


def test_a_vocabulary_that_transformers_resized():
    fields = dataclasses.replace(CHANGED, vocab_size=101, pad_vocab_size_multiple=16).to_hf()
    resized = from_dict(fields | {"vocab_size": 120})
    assert (resized.vocab_size, resized.padded_vocab_size) == (120, 120)
    assert resized == dataclasses.replace(CHANGED, vocab_size=120, pad_vocab_size_multiple=1)


def test_without_a_model_type_it_is_mamba():
    assert from_dict({"hidden_size": 64}) == from_dict({"hidden_size": 64, "model_type": "mamba"})
    assert from_dict({"hidden_size": 64}).architecture == "mamba"


def test_the_class_that_transformers_names_is_the_task():
    assert from_dict({"model_type": "mamba", "architectures": ["MambaModel"]}).task == "features"
    assert from_dict({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}).task == "lm"
    assert from_dict({"model_type": "mamba"}).task == "lm"
    assert FEATURES.to_hf()["architectures"] == ["MambaModel"]
    assert CHANGED.to_hf()["architectures"] == ["MambaForCausalLM"]


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"task": "layers"}, "hf", "task 'layers' cannot be written as hf.*layout mambapy"),
        ({"task": "layers"}, "mamba_ssm", "task 'layers' cannot be written as mamba_ssm"),
        ({"task": "features"}, "mamba_ssm", "task 'features' cannot be written as mamba_ssm"),
    ],
)
def test_what_a_library_cannot_express_is_not_written(change, layout, message):
    with pytest.raises(ValueError, match=message):
        getattr(dataclasses.replace(CHANGED, **change), f"to_{layout}")()


def test_another_architecture_is_not_written_for_mamba_ssm():
    with pytest.raises(
        ValueError, match=r"'minimamba' cannot be written as mamba_ssm.*expected layout hf or minimamba"
    ):
        MINIMAMBA.to_mamba_ssm()


@pytest.mark.parametrize(
    ("expand", "inner"), [(2, 192), (16, 8192), (2, 100), (3, 64), (1.5, 97), (2, 1), (2, 12345), ("many", 128)]
)
@pytest.mark.parametrize("d", [64, 7, 49, 4096])
def test_an_intermediate_size_counts_whatever_expand_is(expand, inner, d):
    """As transformers has it."""
    config = from_dict({"model_type": "mamba", "hidden_size": d, "expand": expand, "intermediate_size": inner})
    assert config.d_inner == inner
    written = config.to_hf()
    assert written["intermediate_size"] == inner
    assert type(written["expand"]) is int
    assert from_dict(json.loads(json.dumps(written))) == config
    assert from_dict(written | {"intermediate_size": inner + 1}).d_inner == inner + 1


def test_a_state_belongs_to_the_arithmetic_not_to_the_task():
    assert FEATURES.fingerprint == CHANGED.fingerprint
    assert MINIMAMBA.fingerprint != CHANGED.fingerprint


def test_the_tables_of_the_tasks():
    tables = {
        task: set(parameter_table(dataclasses.replace(CHANGED, task=task))) for task in ("lm", "features", "layers")
    }
    assert tables["lm"] - tables["features"] == {"lm_head.weight"}
    assert tables["features"] - tables["layers"] == {"backbone.embeddings.weight", "backbone.norm_f.weight"}
    assert tables["layers"] < tables["features"] < tables["lm"]


def test_what_the_architecture_says_is_no_field():
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=16)
    assert config.facts.traits.steps
    for other in (MambaConfig(**vars(config)), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
        assert other.facts == config.facts
