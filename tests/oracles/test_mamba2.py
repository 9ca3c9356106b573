"""Against transformers' Mamba-2 and mlx-lm's, which load our checkpoints, as we load theirs: values, gradients, config.

Each is used where it is right. transformers: whole sequences, of any number of groups; left padding, but where in_proj
has a bias, which it lets into the convolution; decoding without a limit of the steps, which it forgets there; not the
state behind right padding. mlx-lm: one group and an eps of 1e-5. Both compute some of it in float32 whatever the dtype
of the model, so that the limits are those of float32.
"""

import dataclasses
import importlib.util
import json
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.mamba2 import PRESETS, Mamba2Config
from mamba_core.config import from_dict, from_object
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BASE = Mamba2Config(d_model=32, n_layer=2, vocab_size=61, d_state=5, headdim=8, initializer_range=0.1)
VARIANTS = {
    "base": {},
    "groups": {"ngroups": 4, "tie_embeddings": False},
    "biases": {"bias": True, "conv_bias": False, "ngroups": 2},
    "sizes": {"d_state": 16, "d_conv": 3, "expand": 3, "headdim": 12, "chunk_size": 16},
    "limit": {"dt_limit": (0.02, 0.05)},
    "eps": {"norm_eps": 1e-2, "ngroups": 2},
}
OF_MLX_LM = {name: VARIANTS[name] for name in ("base", "sizes", "limit")}
OF_MLX_LM |= {"untied": {"tie_embeddings": False}, "biases": {"bias": True, "conv_bias": False}}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, BASE.vocab_size, (2, 37)).astype(np.int32)


def values_of(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used; in float32 exactly."""
    rng = np.random.default_rng(7)
    moved = {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}
    return {name: value.astype(np.float32) for name, value in moved.items()}


def written(folder, config, layout):
    folder.mkdir()
    write_model(folder, config, values_of(config), layout=layout, dtype="float32")
    return folder


def reference(folder):
    opened = open_model(folder)
    return ReferenceModel(opened.config, dict(opened.tensors()))


# --- transformers ----------------------------------------------------------------------------------


def their_model(transformers, folder, kind="Mamba2ForCausalLM", dtype=torch.float64):
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(report.values()), report
    return model.eval()


def run(model, ids, **options):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), **options)


def test_reference_equals_transformers(transformers, config, ids, tmp_path):
    model = their_model(transformers, written(tmp_path / "ours", config, "hf"))
    logits = run(model, ids, use_cache=False).logits.numpy()
    assert relative_l2(ReferenceModel(config, values_of(config))(ids).logits, logits) <= 1e-6


def test_gradients_equal_transformers(transformers, config, ids, tmp_path):
    model = their_model(transformers, written(tmp_path / "ours", config, "hf"))
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))
    logits = model(torch.from_numpy(ids).long(), use_cache=False).logits
    (logits.double() * torch.from_numpy(weights)).sum().backward()
    ours, _ = ReferenceModel(config, values_of(config)).vjp(weights, ids)
    for name in parameter_table(config):
        assert relative_l2(model.get_parameter(name).grad.numpy(), ours[name]) <= 2e-5, name


@pytest.mark.parametrize("name", [name for name, changes in VARIANTS.items() if "bias" not in changes])
def test_left_padding_equals_transformers(transformers, ids, tmp_path, name):
    config = dataclasses.replace(BASE, **VARIANTS[name])
    model = their_model(transformers, written(tmp_path / "ours", config, "hf"))
    mask = np.ones(ids.shape, bool)
    mask[0, :9], mask[1, :1] = False, False
    logits = run(model, ids, attention_mask=torch.from_numpy(mask).long(), use_cache=False).logits.numpy()
    ours = ReferenceModel(config, values_of(config))(ids, mask=mask).logits
    assert relative_l2(ours[mask], logits[mask]) <= 1e-6
    unpadded = ReferenceModel(config, values_of(config))(ids).logits
    assert relative_l2(unpadded[mask], logits[mask]) > 1e-3, "the padding counts where nobody tells"


@pytest.mark.parametrize("name", [name for name, changes in VARIANTS.items() if "dt_limit" not in changes])
def test_decoding_equals_transformers(transformers, ids, tmp_path, name):
    config = dataclasses.replace(BASE, **VARIANTS[name])
    theirs = their_model(transformers, written(tmp_path / "ours", config, "hf"))
    ours = ReferenceModel(config, values_of(config))
    result, state = run(theirs, ids[:, :30], use_cache=True), ours(ids[:, :30]).state
    for position in range(30, 37):
        token = ids[:, position : position + 1]
        result = run(theirs, token, use_cache=True, cache_params=result.cache_params)
        logits, state = ours(token, state)
        assert relative_l2(logits, result.logits.numpy()) <= 1e-6


def test_transformers_forgets_the_limit_when_it_decodes(transformers, ids, tmp_path):
    """Where the reference sides with its whole sequences. This fails when a release of theirs mends it."""
    config = dataclasses.replace(BASE, **VARIANTS["limit"])
    theirs = their_model(transformers, written(tmp_path / "ours", config, "hf"))
    cache = run(theirs, ids[:, :-1], use_cache=True).cache_params
    step = run(theirs, ids[:, -1:], use_cache=True, cache_params=cache).logits[:, 0].numpy()
    whole = run(theirs, ids, use_cache=False).logits[:, -1].numpy()
    assert relative_l2(ReferenceModel(config, values_of(config))(ids).logits[:, -1], whole) <= 1e-6
    assert relative_l2(step, whole) > 1e-4


@pytest.mark.parametrize("kind", ["Mamba2ForCausalLM", "Mamba2Model"])
def test_we_load_what_transformers_saves(transformers, backend, ids, tmp_path, kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 5, "head_dim": 8}
    settings = {"num_heads": 8, "n_groups": 2, "use_bias": True, "time_step_limit": (0.01, 0.3)}
    model = getattr(transformers, kind)(transformers.Mamba2Config(**sizes, **settings)).eval()
    with torch.no_grad():  # their initial biases are zero, which would hide a bias that is not used
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    result = run(model, ids, use_cache=False)[0].numpy()
    model.save_pretrained(tmp_path / "theirs")
    ours = mc.load(tmp_path / "theirs", backend=backend.name)
    task = "lm" if kind.endswith("LM") else "features"
    assert (ours.config.architecture, ours.config.task) == ("mamba2", task)
    assert (ours.config.ngroups, ours.config.dt_limit) == (2, (0.01, 0.3))
    found = ours(backend.from_numpy(ids))[0]
    assert relative_l2(backend.to_numpy(found), result) <= tolerance("float32")
    assert relative_l2(reference(tmp_path / "theirs")(ids)[0], result) <= tolerance("float32")


def test_transformers_loads_what_we_save(transformers, ids, tmp_path):
    config = dataclasses.replace(BASE, ngroups=4)
    model = mc.build(config, backend="torch", device="cpu", seed=3)
    mc.save(model, tmp_path / "ours")
    theirs = their_model(transformers, tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    assert relative_l2(run(theirs, ids, use_cache=False).logits.numpy(), expected) <= tolerance("float32")


def test_transformers_refuses_what_it_would_compute_otherwise(transformers, tmp_path):
    folder = written(tmp_path / "ours", dataclasses.replace(BASE, norm_before_gate=True), "hf")
    with pytest.raises(ValueError, match="mamba_core_mamba2"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(KeyError, match="mamba_core_mamba2"):
        transformers.Mamba2ForCausalLM.from_pretrained(folder)


# --- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "n_groups": 2},
        {"hidden_size": 64, "num_heads": 12, "head_dim": 16, "expand": 3, "n_groups": 1, "state_size": 7},
        {"time_step_limit": (0.01, 0.5), "time_step_min": 0.002, "time_step_floor": 1e-3, "chunk_size": 128},
        {"layer_norm_epsilon": 1e-4, "use_bias": True, "use_conv_bias": False, "residual_in_fp32": False},
        {"eos_token_id": [3, 11], "bos_token_id": None, "tie_word_embeddings": True, "vocab_size": 65024},
    ],
)
def test_a_config_of_theirs_and_back(transformers, tmp_path, fields):
    theirs = transformers.Mamba2Config(**fields)
    theirs.save_pretrained(tmp_path)
    ours = from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert ours == from_object(theirs) == from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    assert (ours.d_model, ours.nheads, ours.headdim) == (theirs.hidden_size, theirs.num_heads, theirs.head_dim)
    assert (ours.ngroups, ours.dt_limit) == (theirs.n_groups, tuple(theirs.time_step_limit))
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    again = transformers.Mamba2Config.from_pretrained(tmp_path)
    before, after = theirs.to_dict(), again.to_dict()
    differing = {"architectures", "transformers_version", "time_step_limit"}
    assert {name for name, value in before.items() if after[name] != value} <= differing
    assert tuple(again.time_step_limit) == tuple(theirs.time_step_limit)


def test_the_defaults_are_theirs(transformers):
    assert from_object(transformers.Mamba2Config()) == PRESETS["mamba-codestral-7b"]


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.attn_layer_idx])
def test_a_preset_is_a_config_of_theirs(transformers, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name].to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == "mamba2"
    assert from_object(theirs) == PRESETS[name]


def test_a_preset_with_attention_is_none_of_theirs(transformers, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["mamba2attn-2.7b"].to_hf()))
    with pytest.raises(ValueError, match="mamba_core_mamba2"):
        transformers.AutoConfig.from_pretrained(tmp_path)


# --- mlx-lm ----------------------------------------------------------------------------------------


@pytest.fixture(params=OF_MLX_LM)
def mlx_config(request):
    return dataclasses.replace(BASE, **OF_MLX_LM[request.param])


def test_mlx_lm_both_ways(mlx_config, ids, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, fields = utils.load_model(written(tmp_path / "ours", mlx_config, "mlx_lm"), strict=True)
    logits = np.array(model(mx.array(ids)))
    assert relative_l2(reference(tmp_path / "ours")(ids).logits, logits) <= tolerance("float32")
    utils.save_model(tmp_path / "theirs", model)
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    opened = open_model(tmp_path / "theirs")
    assert (opened.layout, opened.config) == ("mlx_lm", mlx_config)
    assert relative_l2(reference(tmp_path / "theirs")(ids).logits, logits) <= tolerance("float32")


def test_gradients_equal_mlx_lm(mlx_config, ids, tmp_path):
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(written(tmp_path / "ours", mlx_config, "mlx_lm"), strict=True)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, mlx_config.padded_vocab_size)).astype(np.float32)
    _, gradients = nn.value_and_grad(model, lambda model: (model(mx.array(ids)) * mx.array(weights)).sum())(model)
    gradients = dict(nn.utils.tree_flatten(gradients))
    expected, _ = ReferenceModel(mlx_config, values_of(mlx_config)).vjp(weights, ids)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        # Their convolution keeps its taps before its one input channel.
        value = np.array(gradient).swapaxes(1, 2) if name.endswith("conv1d.weight") else np.array(gradient)
        assert relative_l2(value, expected[name]) <= tolerance("float32", "gradient"), name


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_lms_quantised_model(ids, tmp_path, bits):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    config = dataclasses.replace(BASE, vocab_size=64, d_state=8)
    model, fields = utils.load_model(written(tmp_path / "ours", config, "mlx_lm"), strict=True)
    quantised, fields = utils.quantize_model(model, fields, 32, bits)
    utils.save_model(tmp_path / "theirs", quantised)
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    assert "backbone.layers.0.mixer.in_proj.scales" in open_checkpoint(tmp_path / "theirs")
    expected = np.array(utils.dequantize_model(quantised)(mx.array(ids)))
    assert relative_l2(reference(tmp_path / "theirs")(ids).logits, expected) <= tolerance("float32")


@pytest.mark.parametrize("changes", [{"n_groups": 2}, {"layer_norm_epsilon": 1e-2}])
def test_what_is_not_written_for_mlx_lm_it_computes_otherwise(ids, tmp_path, changes):
    """Where the reference sides with transformers. This fails when a release of theirs mends it."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    config = dataclasses.replace(
        BASE, ngroups=changes.get("n_groups", 1), norm_eps=changes.get("layer_norm_epsilon", 1e-5)
    )
    folder = written(tmp_path / "hf", config, "hf")
    fields = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 64, "time_step_rank": "auto"}
    (folder / "config.json").write_text(json.dumps(fields | {"time_step_limit": [0.0, float("inf")]}))
    model, _ = utils.load_model(folder, strict=True)
    expected = ReferenceModel(config, values_of(config))(ids).logits
    assert relative_l2(np.array(model(mx.array(ids))), expected) > 1e-2


# --- mambapy ---------------------------------------------------------------------------------------


def test_mambapys_model_takes_what_we_write(tmp_path):
    """Names and shapes alone: its layers run in mamba_ssm's kernels."""
    spec = importlib.util.find_spec("mambapy")
    if spec is None:
        pytest.skip("mambapy is not installed")
    kernels = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
    stubs = {"ssd_combined": kernels, "layernorm_gated": ("RMSNorm", "LayerNorm")}

    class Norm(torch.nn.Module):
        def __init__(self, width, **settings):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width))

    modules = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")}
    for name, contents in stubs.items():
        modules[f"mamba_ssm.ops.triton.{name}"] = module = ModuleType(name)
        vars(module).update(dict.fromkeys(contents, Norm))
    config = dataclasses.replace(BASE, ngroups=2, tie_embeddings=False, pad_vocab_size_multiple=8)
    folder = written(tmp_path / "ours", config, "mambapy")
    with mock.patch.dict(sys.modules, modules):
        for name in ("mambapy.mamba2", "mambapy.lm"):
            sys.modules.pop(name, None)
        lm, theirs = importlib.import_module("mambapy.lm"), importlib.import_module("mambapy.mamba2")
    fields = json.loads((folder / "config.json").read_text())
    known = {item.name for item in dataclasses.fields(theirs.Mamba2Config)}
    settings = {name: value for name, value in fields.items() if name in known}
    assert set(fields) - known == {"vocab_size", "pad_vocab_size_multiple", "mamba_core"}
    model = lm.LM(theirs.Mamba2Config(**settings), fields["vocab_size"], fields["pad_vocab_size_multiple"])
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
    found = from_object(model.config)
    lost = {"vocab_size": 50277, "pad_vocab_size_multiple": 16, "tie_embeddings": True, "task": "layers"}
    assert found == dataclasses.replace(config, **lost)
