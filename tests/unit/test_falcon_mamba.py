"""FalconMamba's config, graph and checkpoints; what it computes is compared with others in tests/oracles."""

import dataclasses
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.falcon_mamba import FalconMambaConfig
from mamba_core.config import from_dict, preset
from mamba_core.spec.graph import block_graph
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_count, parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.opening import open_model

from .layout_files import CONFIG as MAMBA
from .layout_files import contents, of_architecture, rewrite, write

CONFIG = of_architecture(MAMBA, "falcon_mamba")


def test_the_preset_has_the_published_sizes():
    config = preset("falcon-mamba-7b")
    assert parameter_count(config) == 7_272_665_088
    assert (config.d_inner, config.dt_rank_size, config.padded_vocab_size) == (8192, 256, 65024)
    assert from_dict(json.loads(json.dumps(config.to_hf()))) == config
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_published_config_is_the_preset():
    """Its expand would make eight times as many channels as it has."""
    fields = {
        "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "eos_token_id": 11,
        "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1, "intermediate_size": 8192,
        "layer_norm_epsilon": 1e-05, "mixer_rms_eps": 1e-06, "model_type": "falcon_mamba", "num_hidden_layers": 64,
        "pad_token_id": 11, "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 16,
        "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "time_step_scale": 1.0,
        "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 65024,
    }  # fmt: skip
    assert from_dict(fields) == preset("falcon-mamba-7b")


def test_the_graph_is_mambas_with_three_norms():
    ours, mamba = ({node.name: node for node in block_graph(config)} for config in (CONFIG, MAMBA))
    norms = {f"layers.{layer}.{name}_norm" for layer in range(2) for name in ("dt", "B", "C")}
    assert set(ours) - set(mamba) == norms
    assert set(mamba) <= set(ours)
    assert {ours[name].op for name in norms} == {"unit_rms_norm"}
    assert {ours[name].settings["eps"] for name in norms} == {1e-6}
    changed = {name for name in mamba if mamba[name] != ours[name]}
    assert changed == {f"layers.{layer}.{name}" for layer in range(2) for name in ("dt_proj", "scan")}
    assert list(parameter_table(CONFIG)) == list(parameter_table(MAMBA))


def test_the_norms_count_and_their_eps_too():
    values = dict(initial_values(CONFIG, 1))
    ids = np.arange(9, dtype=np.int32)[None]
    logits = [
        ReferenceModel(config, values)(ids).logits
        for config in (CONFIG, dataclasses.replace(CONFIG, mixer_rms_eps=1e-2), MAMBA)
    ]
    assert not np.allclose(logits[0], logits[1], rtol=1e-6)
    assert not np.allclose(logits[0], logits[2], rtol=1e-6)


def test_a_state_is_not_mambas():
    assert CONFIG.fingerprint != MAMBA.fingerprint
    assert CONFIG.fingerprint != dataclasses.replace(CONFIG, mixer_rms_eps=1e-3).fingerprint


@pytest.mark.parametrize("value", [0, -1e-6, "1e-6", float("nan"), None])
def test_an_eps_that_is_none(value):
    with pytest.raises(ValueError, match=r"mixer_rms_eps is .*expected a positive number"):
        FalconMambaConfig(mixer_rms_eps=value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", [("hf", "mlx_lm", "hf"), ("mlx_lm", "hf", "mlx_lm")])
def test_round_trips(tmp_path, dtype, way):
    config = dataclasses.replace(CONFIG, mixer_rms_eps=1e-3, expand=1.5)
    folder = write(tmp_path / "0", config, way[0], dtype)
    for step, layout in enumerate(way[1:], 1):
        folder = rewrite(folder, tmp_path / str(step), layout)
        opened = open_model(folder)
        assert (opened.layout, opened.config) == (layout, config)
    assert contents(folder) == contents(tmp_path / "0")


@pytest.mark.parametrize("layout", ["mamba_ssm", "mambapy", "mambapy_mlx", "minimamba"])
def test_other_libraries_would_compute_something_else(tmp_path, layout):
    folder = write(tmp_path / "out", CONFIG, "hf")
    with pytest.raises(ValueError, match=f"'falcon_mamba' cannot be written as {layout}.*expected layout hf or mlx_lm"):
        mc.convert(folder, tmp_path / "other", to=layout)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mixer_rms_eps": 1e-6}, "mixer_rms_eps=1e-06, which is of architecture 'falcon_mamba'; as 'mamba'"),
        ({"use_bcdt_rms": True}, "use_bcdt_rms=True; this version reads use_bcdt_rms=False only"),
        ({"architectures": ["FalconMambaForCausalLM"]}, "a class of architecture 'falcon_mamba'"),
        ({"architectures": ["FalconMambaModel"]}, "a class of architecture 'falcon_mamba'"),
        ({"model_type": "falcon_mamba"}, "'MambaForCausalLM', a class of architecture 'm"),
        ({"model_type": "falcon_mamba", "architectures": None, "use_bcdt_rms": False}, "use_bcdt_rms=False"),
    ],
)
@pytest.mark.parametrize("layout", ["hf", "mlx_lm"])
def test_a_file_that_claims_to_be_two_things_is_refused(tmp_path, layout, fields, words):
    folder = write(tmp_path / "out", MAMBA, layout)
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | fields))
    with pytest.raises(CheckpointError, match=words):
        open_model(folder)


@pytest.mark.parametrize("layout", ["mamba_ssm", "mambapy", "mambapy_mlx"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixer_rms_eps", 1e-6), ("use_bcdt_rms", True), ("architectures", ["FalconMambaForCausalLM"]),
        ("model_type", "falcon_mamba"),
    ],
)  # fmt: skip
def test_a_layout_without_such_fields_refuses_them_too(tmp_path, layout, field, value):
    folder = write(tmp_path / "out", MAMBA, layout)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(CheckpointError, match=f"{field}=.*, which is of architecture 'falcon_mamba'; as 'mamba'"):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps(fields | {field: None}))
    assert open_model(folder).config == MAMBA


def test_the_model_type_alone_tells(tmp_path):
    folder = write(tmp_path / "out", MAMBA, "hf")
    fields = json.loads((folder / "config.json").read_text()) | {"model_type": "falcon_mamba"}
    del fields["architectures"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert open_model(folder).config == CONFIG
    with pytest.raises(ValueError, match=r"compat is 'mamba', but .* is of architecture 'falcon_mamba'"):
        open_model(folder, compat="mamba")
