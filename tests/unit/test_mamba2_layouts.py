"""Mamba-2's checkpoints: published configs, the limit of the steps, every layout and back, and what none can hold."""

import dataclasses
import json
import math

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.mamba2 import PRESETS, Mamba2Config
from mamba_core.config import from_dict
from mamba_core.weights import tables
from mamba_core.weights.formats import WRITERS, CheckpointError, sources_of, write_safetensors_file
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model

from .layout_files import CONFIG as MAMBA
from .layout_files import MAMBA2, arrays_of, contents, rewrite, state_dict, write

LAYOUTS = ("hf", "mamba_ssm", "mambapy", "mistral_inference", "mlx_lm")
SMALL = Mamba2Config(
    d_model=16, n_layer=2, vocab_size=13, d_state=6, d_conv=3, expand=3, headdim=6, bias=True, conv_bias=False,
    dt_limit=(0.01, 0.5), dt_min=0.002, dt_max=0.2, dt_init_floor=1e-3, chunk_size=64, tie_embeddings=False,
    residual_in_fp32=False, initializer_range=0.1,
)  # fmt: skip
# What mamba_ssm and mistral-inference have no field for; none of it changes the function.
LOST = ("rescale_prenorm_residual", "initializer_range", "residual_in_fp32", "bos_token_id", "eos_token_id")
INF = math.inf


# --- published configs -----------------------------------------------------------------------------

STATE_SPACES = {"ssm_cfg": {"layer": "Mamba2"}, "vocab_size": 50277, "rms_norm": True, "residual_in_fp32": True}
STATE_SPACES |= {"fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True, "d_intermediate": 0}
STATE_SPACES |= {"attn_layer_idx": [], "attn_cfg": {}}
# Of transformers 4.44, in which the ports and Codestral were published; the last fields mean nothing there.
PORT = {
    "architectures": ["Mamba2ForCausalLM"], "chunk_size": 256, "conv_kernel": 4, "expand": 2, "head_dim": 64,
    "hidden_act": "silu", "initializer_range": 0.1, "layer_norm_epsilon": 1e-05, "model_type": "mamba2",
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "state_size": 128,
    "time_step_floor": 0.0001, "time_step_limit": [0.0, INF], "time_step_max": 0.1, "time_step_min": 0.001,
    "transformers_version": "4.44.0", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    "norm_before_gate": False,
}  # fmt: skip
CODESTRAL = PORT | {
    "bos_token_id": 0, "eos_token_id": 2, "hidden_size": 4096, "n_groups": 8, "num_heads": 128, "pad_token_id": 1,
    "num_hidden_layers": 64, "tie_word_embeddings": False, "time_step_rank": 256, "torch_dtype": "bfloat16",
    "vocab_size": 32768, "norm_before_gate": True, "time_step_init_scheme": "random", "time_step_scale": 1.0,
    "intermediate_size": 8192,
}  # fmt: skip
PARAMS = {
    "dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba",
}  # fmt: skip
SIZES = {name: config for name, config in PRESETS.items() if name.startswith("mamba2-")}
PORTED = {"vocab_size": 50288, "pad_vocab_size_multiple": 1, "rescale_prenorm_residual": False}
PORTED |= {"initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.mark.parametrize("name", SIZES)
def test_mamba_ssms_published_configs_are_the_presets(name):
    config = SIZES[name]
    fields = STATE_SPACES | {"d_model": config.d_model, "n_layer": config.n_layer}
    assert from_dict(fields) == config
    assert config.to_mamba_ssm()["ssm_cfg"] == {"layer": "Mamba2"}, "what has its default is not written"
    assert from_dict(json.loads(json.dumps(config.to_mamba_ssm()))) == config


@pytest.mark.parametrize("name", SIZES)
def test_the_ports_to_transformers_are_the_presets_with_its_initial_values(name):
    config = SIZES[name]
    sizes = {"hidden_size": config.d_model, "num_hidden_layers": config.n_layer, "num_heads": config.nheads}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    fields = PORT | sizes | tokens | {"n_groups": 1, "tie_word_embeddings": True, "vocab_size": 50288}
    found = from_dict(fields)
    assert found == dataclasses.replace(config, **PORTED)
    assert from_dict(json.loads(json.dumps(found.to_hf()))) == found
    assert from_dict(json.loads(json.dumps(config.to_hf()))) == config
    with pytest.raises(ValueError, match=r"num_heads 128 and head_dim 64, which are 8192; expected as many of both"):
        from_dict({field: value for field, value in fields.items() if field != "num_heads"})


def test_codestrals_configs_are_the_preset():
    preset = PRESETS["mamba-codestral-7b"]
    assert from_dict(CODESTRAL) == preset
    ignored = {"use_cache", "transformers_version", "rms_norm", "norm_before_gate", "intermediate_size"}
    assert set(from_dict(CODESTRAL).extra) == ignored | {"time_step_init_scheme", "time_step_scale"}
    assert from_dict({"model_type": "mamba2"}) == preset, "transformers' defaults"
    assert from_dict(json.loads(json.dumps(preset.to_hf()))) == preset
    found = from_dict(PARAMS)
    told = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    assert dataclasses.replace(found, **told, rescale_prenorm_residual=False, initializer_range=0.1) == preset
    assert tables.write_config("mistral_inference", preset) == PARAMS
    with pytest.raises(ValueError, match=r"ngroups=8 cannot be written as mlx_lm, .* 1 only"):
        tables.write_config("mlx_lm", preset)


def test_groups_that_transformers_is_not_told_are_eight():
    fields = {"model_type": "mamba2", "hidden_size": 256, "num_heads": 8}
    assert from_dict(fields).ngroups == 8
    assert from_dict(fields | {"n_groups": 2}).ngroups == 2


# --- the limit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bound", ["Infinity", '{"__float__": "Infinity"}', '"inf"', '"Infinity"', "null", "1e999"], ids=str
)
@pytest.mark.parametrize("layout", ["hf", "mlx_lm", "mamba_ssm", "mambapy"])
def test_every_spelling_of_no_limit(tmp_path, layout, bound):
    config = dataclasses.replace(MAMBA2, dt_limit=(0.25, INF))
    folder = write(tmp_path / "out", config, layout)
    text = (folder / "config.json").read_text()
    fields = json.loads(text)
    for name, value in {"A": (0.25, "0.25"), "B": (0.0, "null")}.items():
        inside = fields["ssm_cfg"] if layout == "mamba_ssm" else fields
        inside["dt_limit" if layout in ("mamba_ssm", "mambapy") else "time_step_limit"] = ["least", "most"]
        changed = json.dumps(fields).replace('"least"', value[1]).replace('"most"', bound)
        (folder / "config.json").write_text(changed)
        assert open_model(folder).config.dt_limit == (value[0], INF), name
    (folder / "config.json").write_text(json.dumps(fields).replace('["least", "most"]', "null"))
    assert open_model(folder).config.dt_limit == (0.0, INF)


@pytest.mark.parametrize(
    "limit", [[0.1], [0.5, 0.1], "none", ["a", "b"], [0, {"__float__": "NaN"}], [0, {"float": "Infinity"}], [0, [1]]]
)
def test_a_limit_that_is_none(limit):
    with pytest.raises(ValueError, match=r"dt_limit is .*expected"):
        from_dict({"model_type": "mamba2", "time_step_limit": limit})


def test_no_limit_is_written_as_each_library_reads_it(tmp_path):
    texts = {name: (write(tmp_path / name, MAMBA2, name) / "config.json").read_text() for name in ("hf", "mlx_lm")}
    assert json.loads(texts["hf"])["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert "Infinity\n" in texts["mlx_lm"]
    assert json.loads(texts["mlx_lm"])["time_step_limit"] == [0.0, INF]
    limited = dataclasses.replace(MAMBA2, dt_limit=(0.01, 0.5))
    assert limited.to_hf()["time_step_limit"] == [0.01, 0.5]
    assert limited.to_mamba_ssm()["ssm_cfg"] == {"layer": "Mamba2", "dt_limit": [0.01, 0.5]}


# --- every layout and back -------------------------------------------------------------------------


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout_and_back(tmp_path, first, dtype):
    start = write(tmp_path / "start", MAMBA2, first, dtype)
    before = open_model(start)
    assert before.layout == first
    values = {name: array.tobytes() for name, array in before.tensors()}
    for number, layout in enumerate(LAYOUTS):
        there = rewrite(start, tmp_path / str(number), layout)
        opened = open_model(there)
        assert (opened.layout, opened.config, opened.dtype) == (layout, MAMBA2, dtype)
        assert {name: array.tobytes() for name, array in opened.tensors()} == values
        back = rewrite(there, tmp_path / f"{number}-back", first)
        assert contents(back) == contents(start)
        assert open_model(back).stored == before.stored


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "mistral_inference"])
def test_every_field_that_a_layout_has(tmp_path, layout, tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    found = open_model(write(tmp_path / "out", config, layout)).config
    lost = {name: getattr(Mamba2Config(), name) for name in LOST if name != "residual_in_fp32"}
    if layout == "mamba_ssm":
        assert found == dataclasses.replace(config, **lost)
    else:
        assert found == config


ALL_OF_MAMBA_SSM = dataclasses.replace(
    SMALL, d_ssm=24, ngroups=2, rmsnorm=True, norm_before_gate=True, D_has_hdim=True, A_init_range=(2.0, 3.0),
    conv_init=0.25, initializer_range=0.02, pad_vocab_size_multiple=8,
)  # fmt: skip


def test_mamba_ssm_has_every_field(tmp_path):
    folder = write(tmp_path / "out", ALL_OF_MAMBA_SSM, "mamba_ssm")
    assert open_model(folder).config == ALL_OF_MAMBA_SSM
    fields = json.loads((folder / "config.json").read_text())
    speed = {"use_mem_eff_path": False, "sequence_parallel": True, "process_group": None, "layer_idx": None}
    (folder / "config.json").write_text(json.dumps(fields | {"ssm_cfg": fields["ssm_cfg"] | speed}))
    assert open_model(folder).config == ALL_OF_MAMBA_SSM
    without_norm = dataclasses.replace(ALL_OF_MAMBA_SSM, rmsnorm=False)
    assert open_model(write(tmp_path / "other", without_norm, "mamba_ssm")).config == without_norm
    (folder / "config.json").write_text(json.dumps(fields | {"ssm_cfg": fields["ssm_cfg"] | {"headdims": 3}}))
    with pytest.raises(CheckpointError, match="unknown fields in ssm_cfg: 'headdims'"):
        open_model(folder)


def test_transformers_model_without_a_head(tmp_path):
    config = dataclasses.replace(SMALL, task="features")
    folder = write(tmp_path / "out", config, "hf")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Mamba2Model"]
    assert "layers.0.mixer.dt_bias" in open_checkpoint(folder)
    assert open_model(folder).config == config


def test_transformers_names_without_their_backbone(tmp_path):
    plain = write(tmp_path / "a", SMALL, "hf")
    arrays = {name.removeprefix("backbone."): array for name, array in arrays_of(plain).items()}
    opened = open_model(state_dict(tmp_path / "b", arrays, **json.loads((plain / "config.json").read_text())))
    assert opened.config == SMALL


@pytest.mark.parametrize("file_format", WRITERS)
def test_every_file_format(tmp_path, file_format):
    for layout in ("mamba_ssm", "mistral_inference"):
        opened = open_model(write(tmp_path / layout, MAMBA2, layout, file_format=file_format))
        assert (opened.layout, opened.config) == (layout, MAMBA2)


def test_a_conversion_and_an_inspection(tmp_path, capsys):
    main = pytest.importorskip("mamba_core.cli").main
    folder = write(tmp_path / "out", MAMBA2, "mamba_ssm", "bfloat16")
    steps = ["mistral-inference", "mlx-lm", "mambapy", "hf", "mamba-ssm"]
    for step in steps:
        target = tmp_path / step
        assert main(["convert", str(folder), str(target), "--to", step, "--verify", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["target_layout"] == step.replace("-", "_")
        folder = target
        assert main(["inspect", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["config"]["architecture"] == "mamba2"
        assert found["config"]["dt_limit"] == [0.0, None], "JSON has no number for it"
    assert contents(folder) == contents(tmp_path / "out")


# --- what a layout cannot hold ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("mamba_ssm", "hf")])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"D_has_hdim": True}, "D_has_hdim=True cannot be written as LAYOUT, which has False only"),
        ({"norm_before_gate": True}, "norm_before_gate=True cannot be written as LAYOUT"),
        ({"rmsnorm": False}, "rmsnorm=False cannot be written as LAYOUT, which has True only"),
        ({"d_ssm": 256}, "d_ssm=256 cannot be written as LAYOUT, whose recurrence has all 512 channels"),
    ],
)
def test_what_mamba_ssm_alone_can_run(tmp_path, layout, changes, words):
    with pytest.raises(ValueError, match=words.replace("LAYOUT", layout)):
        write(tmp_path / "out", dataclasses.replace(MAMBA2, **changes), layout)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("mlx_lm", {"ngroups": 2}, "ngroups=2 cannot be written as mlx_lm, which has 1 only"),
        ("mlx_lm", {"norm_eps": 1e-6}, "norm_eps=1e-06 cannot be written as mlx_lm, which has 1e-05 only"),
        ("mamba_ssm", {"norm_eps": 1e-6}, "norm_eps=1e-06 cannot be written as mamba_ssm"),
        ("mambapy", {"norm_eps": 1e-6}, "norm_eps=1e-06 cannot be written as mambapy"),
        ("mambapy", {"headdim": 128}, "4 heads cannot be written as mambapy, which has multiples of 8 only"),
        ("mamba_ssm", {"expand": 2.5}, "expand=2.5 cannot be written as mamba_ssm"),
        ("mistral_inference", {"headdim": 32}, "headdim=32 cannot be written as mistral_inference, which has 64 only"),
        ("mistral_inference", {"d_state": 64}, "d_state=64 cannot be written"),
        ("mistral_inference", {"dt_limit": (0.1, 1.0)}, r"dt_limit=\(0.1, 1.0\) cannot be written"),
        ("mistral_inference", {"task": "features"}, "task 'features' cannot be written .* expected layout hf"),
        ("mambapy_mlx", {}, r"'mamba2' cannot be written as mambapy_mlx.* expected layout hf or mamba_ssm or mambapy"),
    ],
)
def test_what_a_library_cannot_run_is_not_written(tmp_path, layout, changes, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "out", dataclasses.replace(MAMBA2, **changes), layout)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        *({"D_has_hdim": True}, {"norm_before_gate": True}, {"rmsnorm": False}, {"d_ssm": 256}, {"expand": 2.25}),
        {"d_ssm": 128, "D_has_hdim": True, "rmsnorm": False, "A_init_range": (2.0, 3.0), "conv_init": 0.25},
    ],
)
def test_what_transformers_cannot_run_is_kept_where_it_refuses_it(tmp_path, changes):
    """Or a model could not be saved at all: no other layout has all of our fields."""
    config = dataclasses.replace(MAMBA2, **changes, norm_eps=1e-3)
    folder = write(tmp_path / "out", config, "hf")
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == fields["hidden_act"] == "mamba_core_mamba2"
    assert open_model(folder).config == config == from_dict(fields)
    assert contents(rewrite(folder, tmp_path / "again", "hf")) == contents(folder)


def test_all_channels_named_are_all_channels(tmp_path):
    config = dataclasses.replace(MAMBA2, d_ssm=512)
    folder = write(tmp_path / "out", config, "hf")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mamba2"
    assert open_model(folder).config == config


@pytest.mark.parametrize(("field", "value"), [("n_groups", 8), ("layer_norm_epsilon", 1e-6)])
def test_what_mlx_lm_computes_otherwise_is_read_and_said(tmp_path, field, value):
    """Of whoever converted it: the weights are those that were trained with the config's values."""
    config = dataclasses.replace(MAMBA2, ngroups=8)
    arrays = arrays_of(write(tmp_path / "a", config if field == "n_groups" else MAMBA2, "hf"))
    plain = write(tmp_path / "b", MAMBA2, "mlx_lm")
    fields = json.loads((plain / "config.json").read_text())
    arrays = {name: array.swapaxes(1, 2) if "conv1d.weight" in name else array for name, array in arrays.items()}
    write_safetensors_file(plain / "model.safetensors", sources_of(arrays), metadata={"format": "mlx"})
    (plain / "config.json").write_text(json.dumps(fields | {field: value}))
    opened = open_model(plain)
    ours = {"n_groups": "ngroups", "layer_norm_epsilon": "norm_eps"}[field]
    assert getattr(opened.config, ours) == value
    assert f"{ours} is the config's {value}, though mlx_lm computes with" in opened.evidence


def test_mlx_lms_second_name_of_the_states_counts(tmp_path):
    folder = write(tmp_path / "a", SMALL, "mlx_lm")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"state_size": 99, "ssm_state_size": 6}))
    assert open_model(folder).config == SMALL
    del fields["expand"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert open_model(folder).config == SMALL, "it takes the channels from num_heads and head_dim"
    del fields["num_heads"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="num_heads None; expected an integer"):
        open_model(folder)


# --- what is not read ------------------------------------------------------------------------------


def test_a_model_is_not_read_as_the_other_architecture(tmp_path):
    second, first = write(tmp_path / "2", SMALL, "hf"), write(tmp_path / "1", MAMBA, "hf")
    texts = [(folder / "config.json").read_text() for folder in (first, second)]
    (second / "config.json").write_text(texts[0])
    with pytest.raises(CheckpointError, match=r"missing .*x_proj.*unexpected .*dt_bias"):
        open_model(second)
    (first / "config.json").write_text(texts[1])
    with pytest.raises(CheckpointError, match=r"missing .*dt_bias.*unexpected .*x_proj"):
        open_model(first)
    with pytest.raises(ValueError, match=r"n_groups=8, which is of architecture 'mamba2'; as 'mamba'"):
        from_dict({"model_type": "mamba", "n_groups": 8})
    with pytest.raises(ValueError, match=r"use_bcdt_rms=True, which is of architecture 'falcon_mamba'"):
        from_dict({"model_type": "mamba2", "use_bcdt_rms": True})


# --- mambapy ---------------------------------------------------------------------------------------


def of_mambapy(folder, config=SMALL, **changes):
    """A state dict with a config of few fields."""
    arrays = arrays_of(write(folder / "whole", config, "mambapy"))
    return state_dict(folder / "few", arrays, **{"n_layers": config.n_layer} | changes)


@pytest.mark.parametrize("given", [{"n_groups": 2}, {"d_state": 6}, {"n_groups": 2, "d_state": 6}])
def test_groups_or_states_tell_each_other(tmp_path, given):
    config = dataclasses.replace(SMALL, ngroups=2, dt_limit=(0.0, INF), chunk_size=256)
    found = open_model(of_mambapy(tmp_path, config, **given, vocab_size=13, pad_vocab_size_multiple=16)).config
    initial = {name: getattr(found, name) for name in ("dt_min", "dt_max", "dt_init_floor", "initializer_range")}
    assert found == dataclasses.replace(config, **initial, residual_in_fp32=True)


def test_groups_that_nothing_tells(tmp_path):
    words = r"all groups together have 6 states, not how many groups there are; expected n_groups in a config\.json"
    with pytest.raises(CheckpointError, match=words):
        open_model(of_mambapy(tmp_path))
    (tmp_path / "few" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=words):
        open_model(tmp_path / "few")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_groups": 4}, r"conv1d.weight has shape \(60, 1, 3\), expected \(56, 1, 3\)"),
        ({"n_groups": 1, "d_state": 5}, r"expected \(58, 1, 3\)"),
        ({"n_groups": 0}, "ngroups is 0; expected an integer"),
        ({"n_groups": 1, "mup": True}, "mup=True; this version reads mup=False only"),
        ({"n_groups": 1, "learnable_init_states": True}, "learnable_init_states=True"),
        ({"n_groups": 1, "rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06; mambapy's gated norm has 1e-05"),
        ({"n_groups": 2, "use_mem_eff_path": False}, "use_mem_eff_path=False and n_groups=2; .* is not read"),
        ({"n_groups": 1, "dt_rank": 3}, "dt_rank=3, which is of architecture 'jamba'"),
    ],
)
def test_faults_of_mambapys_config(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        open_model(of_mambapy(tmp_path, **changes))


def test_learned_initial_states_are_refused(tmp_path):
    arrays = arrays_of(write(tmp_path / "a", SMALL, "mambapy"))
    arrays["mamba.layers.0.mixer.init_states"] = np.zeros((8, 6, 6))
    with pytest.raises(CheckpointError, match=r"init_states.*learned initial states, which are not read"):
        open_model(state_dict(tmp_path / "b", arrays, n_layers=2, n_groups=1))


def test_layers_alone(tmp_path):
    config = dataclasses.replace(SMALL, task="layers", tie_embeddings=True)
    folder = write(tmp_path / "out", config, "mambapy")
    assert "layers.0.mixer.dt_bias" in open_checkpoint(folder)
    assert open_model(folder).config == config


# --- mistral-inference -----------------------------------------------------------------------------


def test_mistral_inferences_files(tmp_path):
    folder = write(tmp_path / "out", MAMBA2, "mistral_inference")
    assert sorted(path.name for path in folder.iterdir()) == ["consolidated.safetensors", "params.json"]
    assert set(open_checkpoint(folder)) == {
        f"model.{name}" for name in arrays_of(write(tmp_path / "a", MAMBA2, "mamba_ssm"))
    }
    assert open_model(folder / "params.json").config == MAMBA2
    assert open_model(folder / "consolidated.safetensors").config == MAMBA2
    (folder / "params.json").rename(folder / "config.json")  # as it was called at first
    opened = open_model(folder)
    assert (opened.layout, opened.config) == ("mistral_inference", MAMBA2)
    tied = write(tmp_path / "tied", dataclasses.replace(MAMBA2, tie_embeddings=True), "mistral_inference")
    assert "model.lm_head.weight" in open_checkpoint(tied), "its loader wants every name"
    (folder / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"params\.json: no such file; .* mistral_inference needs its params.json"
    ):
        open_model(folder)


def test_a_folder_with_both_of_codestrals_checkpoints(tmp_path):
    """As it is published; each file has a config of its own."""
    folder = write(tmp_path / "out", MAMBA2, "hf", seed=1)
    other = write(tmp_path / "other", MAMBA2, "mistral_inference", seed=2)
    for path in other.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert open_model(folder).layout == "hf"
    assert open_model(folder / "model.safetensors").layout == "hf"
    opened = open_model(folder / "consolidated.safetensors")
    assert opened.layout == "mistral_inference"
    assert "params.json has dim" in opened.evidence
    (folder / "model.safetensors").unlink()
    assert open_model(folder).layout == "mistral_inference"


def test_a_conversion_replaces_mistral_inferences_folder_and_no_other(tmp_path):
    folder = write(tmp_path / "out", MAMBA2, "mistral_inference")
    source = write(tmp_path / "source", MAMBA2, "hf", seed=1)
    mc.convert(source, folder, to="mistral-inference", overwrite=True)
    assert dict(open_model(folder).tensors())["backbone.layers.0.mixer.D"].tobytes() == (
        dict(open_model(source).tensors())["backbone.layers.0.mixer.D"].tobytes()
    )
    (folder / "consolidated.safetensors").rename(folder / "results.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no config\.json, so it is no checkpoint"):
        mc.convert(source, folder, to="mistral-inference", overwrite=True)


def test_a_wrapped_model_of_mamba_ssm_is_not_mistral_inferences(tmp_path):
    """The names alone do not tell it: the config does."""
    plain = write(tmp_path / "a", SMALL, "mamba_ssm")
    arrays = {"model." + name: array for name, array in arrays_of(plain).items()}
    opened = open_model(state_dict(tmp_path / "b", arrays, **json.loads((plain / "config.json").read_text())))
    assert opened.layout == "mamba_ssm"
    assert "every name begins with 'model.'" in opened.evidence


def test_mambas_of_mistral_inference_are_not_mamba_1():
    assert from_dict({"model_type": "mamba", "dim": 64, "n_layers": 2}).architecture == "mamba2"
    with pytest.raises(ValueError, match="rms_norm=False; this version reads rms_norm=True only"):
        from_dict(PARAMS | {"rms_norm": False})
    with pytest.raises(ValueError, match="config has model_type 'transformer'; this version reads 'mamba'"):
        from_dict({"model_type": "transformer", "dim": 64})
