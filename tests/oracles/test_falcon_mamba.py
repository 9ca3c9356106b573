"""Against transformers' FalconMamba and mlx-lm's, on the float64 reference: values, gradients, checkpoints and configs.

transformers computes its norms in float32 whatever the model's dtype, and mlx-lm all of it, so the limits are those of
float32. Whole sequences alone: with a cache theirs drops the state where more than one token follows.
"""

import dataclasses
import json

import numpy as np
import pytest

from mamba_core.architectures.falcon_mamba import PRESETS, FalconMambaConfig
from mamba_core.architectures.mamba import MambaConfig, SelectiveConfig
from mamba_core.config import from_dict
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BASE = FalconMambaConfig(d_model=32, n_layer=3, vocab_size=61, initializer_range=0.1)
VARIANTS = {
    "base": {},
    "untied": {"tie_embeddings": False},
    "biases": {"bias": True, "conv_bias": False},
    "sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7},
    "eps": {"mixer_rms_eps": 1e-2},
    "fractional": {"expand": 1.28125},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, BASE.vocab_size, (2, 37)).astype(np.int32)


@pytest.fixture
def values(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used; in float32 exactly."""
    rng = np.random.default_rng(7)
    moved = {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}
    return {name: value.astype(np.float32) for name, value in moved.items()}


def written(folder, config, values, layout):
    folder.mkdir()
    write_model(folder, config, values, layout=layout, dtype="float32")
    return folder


def reference(folder):
    opened = open_model(folder)
    return ReferenceModel(opened.config, dict(opened.tensors()))


# --- transformers ----------------------------------------------------------------------------------


def their_model(transformers, folder, kind="FalconMambaForCausalLM", dtype=torch.float64):
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(report.values()), report
    return model


def test_reference_equals_transformers(transformers, config, values, ids, tmp_path):
    folder = written(tmp_path / "ours", config, values, "hf")
    model = their_model(transformers, folder)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    assert relative_l2(ReferenceModel(config, values)(ids).logits, logits) <= 1e-6


def test_gradients_equal_transformers(transformers, config, values, ids, tmp_path):
    model = their_model(transformers, written(tmp_path / "ours", config, values, "hf"))
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))
    logits = model(torch.from_numpy(ids).long(), use_cache=False).logits
    (logits.double() * torch.from_numpy(weights)).sum().backward()
    ours, _ = ReferenceModel(config, values).vjp(weights, ids)
    for name in parameter_table(config):
        assert relative_l2(model.get_parameter(name).grad.numpy(), ours[name]) <= 2e-5, name


@pytest.mark.parametrize("kind", ["FalconMambaForCausalLM", "FalconMambaModel"])
def test_we_read_what_transformers_saves(transformers, config, ids, tmp_path, kind):
    torch.manual_seed(0)
    their_config = transformers.FalconMambaConfig(**without_ours(config.to_hf()))
    model = getattr(transformers, kind)(their_config)
    with torch.no_grad():  # their initial biases are zero, which would hide a bias that is not used
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        result = model(torch.from_numpy(ids).long(), use_cache=False)[0].numpy()
    model.save_pretrained(tmp_path / "theirs")
    opened = open_model(tmp_path / "theirs")
    task = "lm" if kind.endswith("LM") else "features"
    assert (opened.layout, opened.config.architecture, opened.config.task) == ("hf", "falcon_mamba", task)
    assert opened.config.mixer_rms_eps == config.mixer_rms_eps
    assert relative_l2(reference(tmp_path / "theirs")(ids)[0], result) <= 1e-6


def test_it_is_not_mamba(transformers, config, values, ids, tmp_path):
    """Why no file that claims to be one is read as the other: with the same weights Mamba computes something else."""
    fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(SelectiveConfig)}
    mamba = ReferenceModel(MambaConfig(**fields), values)(ids).logits
    model = their_model(transformers, written(tmp_path / "ours", config, values, "hf"))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    assert relative_l2(mamba, logits) > 1e-2


# --- mlx-lm ----------------------------------------------------------------------------------------


def test_mlx_lm_both_ways(config, values, ids, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    folder = written(tmp_path / "ours", config, values, "mlx_lm")
    model, fields = utils.load_model(folder, strict=True)
    assert fields["model_type"] == "falcon_mamba"
    logits = np.array(model(mx.array(ids)))
    assert relative_l2(ReferenceModel(config, values)(ids).logits, logits) <= tolerance("float32")
    utils.save_model(tmp_path / "theirs", model)
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    opened = open_model(tmp_path / "theirs")
    assert (opened.layout, opened.config) == ("mlx_lm", config)
    assert relative_l2(reference(tmp_path / "theirs")(ids).logits, logits) <= tolerance("float32")


def test_gradients_equal_mlx_lm(config, values, ids, tmp_path):
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(written(tmp_path / "ours", config, values, "mlx_lm"), strict=True)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size)).astype(np.float32)
    _, gradients = nn.value_and_grad(model, lambda model: (model(mx.array(ids)) * mx.array(weights)).sum())(model)
    gradients = dict(nn.utils.tree_flatten(gradients))
    expected, _ = ReferenceModel(config, values).vjp(weights, ids)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        # Their convolution keeps its taps before its one input channel.
        value = np.array(gradient).swapaxes(1, 2) if name.endswith("conv1d.weight") else np.array(gradient)
        assert relative_l2(value, expected[name]) <= tolerance("float32", "gradient"), name


# --- configs ---------------------------------------------------------------------------------------


def without_ours(fields):
    return {name: value for name, value in fields.items() if name != "mamba_core"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_size": 64, "expand": 16, "intermediate_size": 128},
        {"hidden_size": 64, "expand": 2, "intermediate_size": 100, "time_step_rank": 7},
        {"hidden_size": 4096, "num_hidden_layers": 64, "expand": 16, "intermediate_size": 8192, "time_step_rank": 256},
        {"mixer_rms_eps": 1e-3, "layer_norm_epsilon": 1e-4, "use_bias": True, "use_conv_bias": False},
        {"eos_token_id": [3, 11], "bos_token_id": None, "tie_word_embeddings": False, "vocab_size": 65024},
    ],
)
def test_a_config_of_theirs_and_back(transformers, fields):
    theirs = transformers.FalconMambaConfig(**fields)
    ours = from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    assert (ours.d_model, ours.d_inner) == (theirs.hidden_size, theirs.intermediate_size)
    assert (ours.dt_rank_size, ours.mixer_rms_eps) == (theirs.time_step_rank, theirs.mixer_rms_eps)
    again = transformers.FalconMambaConfig.from_dict(without_ours(ours.to_hf()))
    differing = {"expand", "transformers_version", "architectures", "hidden_act"}
    assert {key for key, value in theirs.to_dict().items() if again.to_dict()[key] != value} <= differing
    assert from_dict(json.loads(again.to_json_string())) == ours
    # Fields that have their defaults are not in the files that they save.
    assert from_dict(json.loads(theirs.to_json_string())).d_inner == theirs.intermediate_size


def test_the_defaults_are_theirs(transformers):
    theirs = transformers.FalconMambaConfig()
    assert from_dict({"model_type": "falcon_mamba"}) == from_dict(theirs.to_dict())


@pytest.mark.parametrize("config", [*PRESETS.values(), dataclasses.replace(BASE, expand=1.3)])
def test_a_config_of_ours_and_back(transformers, config):
    theirs = transformers.FalconMambaConfig.from_dict(config.to_hf())
    assert theirs.intermediate_size == config.d_inner
    assert from_dict(json.loads(theirs.to_json_string())) == config
