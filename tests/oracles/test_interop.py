"""The real consumer of every layout loads what we write, strictly, and gives our results; and we read what it saves.

The reference is float64 and theirs float32, so the limits are those of float32; a wrong tensor is off by far more.
"""

import copy
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.mamba import MambaConfig
from mamba_core.architectures.mamba2 import Mamba2Config
from mamba_core.config import from_object
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model
from tests.unit.layout_files import of_architecture

torch = pytest.importorskip("torch")

BASE = MambaConfig(d_model=24, n_layer=2, vocab_size=61, initializer_range=0.1)
VARIANTS = {
    "tied": {},
    "untied": {"tie_embeddings": False, "bias": True, "conv_bias": False},
    "sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7},
    "square": {"expand": 1, "d_state": 8, "dt_rank": 8, "d_conv": 4},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def ids():
    # Without 0: mambapy takes it for padding.
    return np.random.default_rng(0).integers(1, BASE.vocab_size, (2, 37)).astype(np.int32)


def written(folder, config, layout):
    """A checkpoint of initial values moved off zero and one, which would hide a parameter that is not used."""
    rng = np.random.default_rng(7)
    moved = {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}
    folder.mkdir()
    values = {name: value.astype(np.float32) for name, value in moved.items()}
    write_model(folder, config, values, layout=layout, dtype="float32")
    return folder


def ours(folder, inputs, **options):
    opened = open_model(folder, **options)
    return ReferenceModel(opened.config, dict(opened.tensors()))(inputs)[0]


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs).numpy()


def assert_same(found, expected):
    assert relative_l2(found, expected) <= tolerance("float32")


# --- transformers ----------------------------------------------------------------------------------


def their_hidden(transformers, folder, ids):
    model, report = transformers.MambaModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    with torch.no_grad():
        return model, model(torch.from_numpy(ids).long(), use_cache=False).last_hidden_state.numpy()


def test_transformers_mamba_model_both_ways(transformers, config, ids, tmp_path):
    config = dataclasses.replace(config, task="features")
    folder = written(tmp_path / "ours", config, "hf")
    model, hidden = their_hidden(transformers, folder, ids)
    assert_same(hidden, ours(folder, ids))
    model.save_pretrained(tmp_path / "theirs")
    opened = open_model(tmp_path / "theirs")
    assert opened.layout == "hf"
    assert opened.config.task == "features"
    assert_same(hidden, ours(tmp_path / "theirs", ids))


def test_transformers_takes_whole_numbers_of_either_type(transformers, tmp_path, ids):
    config = dataclasses.replace(BASE, task="features", expand=2.0, dt_scale=1, dt_init_floor=0, dt_max=1)
    folder = written(tmp_path / "ours", config, "hf")
    assert_same(their_hidden(transformers, folder, ids)[1], ours(folder, ids))


def test_a_vocabulary_that_transformers_resized(transformers, tmp_path, ids):
    folder = written(tmp_path / "ours", BASE, "hf")
    model = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "theirs")
    assert open_model(tmp_path / "theirs").config.vocab_size == 70
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    assert logits.shape[-1] == 70
    assert_same(logits, ours(tmp_path / "theirs", ids))


def test_transformers_refuses_the_arithmetic_of_minimamba(transformers, tmp_path):
    folder = written(tmp_path / "ours", of_architecture(BASE, "minimamba"), "hf")
    with pytest.raises(ValueError, match="mamba_core_minimamba"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


# --- mambapy ---------------------------------------------------------------------------------------


def mambapy_config(lm, fields):
    known = {field.name for field in dataclasses.fields(lm.MambaConfig)}
    return lm.MambaConfig(**{name: value for name, value in fields.items() if name in known})


def read(folder):
    state = torch.load(folder / "model.pt", weights_only=True)
    return state, json.loads((folder / "config.json").read_text())


def test_mambapy_lm_both_ways(lm, config, ids, tmp_path):
    folder = written(tmp_path / "ours", config, "mambapy")
    state, fields = read(folder)
    model = lm.LM(mambapy_config(lm, fields), fields["vocab_size"], fields["pad_vocab_size_multiple"])
    model.load_state_dict(state, strict=True)
    logits = run(model, torch.from_numpy(ids).long())
    assert_same(logits, ours(folder, ids))
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    opened = open_model(tmp_path / "theirs.pt")
    assert opened.layout == "mambapy"
    assert_same(logits, ours(tmp_path / "theirs.pt", ids))
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "nested.pt")
    assert_same(logits, ours(tmp_path / "nested.pt", ids))


def test_mambapy_layers_both_ways(lm, config, tmp_path):
    config = dataclasses.replace(config, task="layers")
    folder = written(tmp_path / "ours", config, "mambapy")
    state, fields = read(folder)
    model = lm.Mamba(mambapy_config(lm, fields))
    model.load_state_dict(state, strict=True)
    x = np.random.default_rng(1).normal(size=(2, 19, config.d_model)).astype(np.float32)
    hidden = run(model, torch.from_numpy(x))
    assert_same(hidden, ours(folder, x))
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    assert_same(hidden, ours(tmp_path / "theirs.pt", x))


def test_mambapys_port_to_mlx_is_a_dense_convolution(config, tmp_path):
    """Its package does not hold the port, so MLX's own convolution is what runs the tensor that we write."""
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    config = dataclasses.replace(config, conv_bias=True)
    folder = written(tmp_path / "ours", config, "mambapy_mlx")
    tensors = mx.load(str(folder / "weights.npz"))
    name = "mamba.layers.1.mixer.conv1d.conv1d."
    e, k = config.d_inner, config.d_conv
    conv = nn.Conv1d(e, e, k, padding=k - 1)
    conv.load_weights([(key, tensors[name + key]) for key in ("weight", "bias")], strict=True)
    x = np.random.default_rng(1).normal(size=(2, 9, e)).astype(np.float32)
    depthwise = torch.nn.Conv1d(e, e, k, padding=k - 1, groups=e)
    canonical = dict(open_model(folder).tensors())
    prefix = "backbone.layers.1.mixer.conv1d."
    state = {key: torch.tensor(np.array(canonical[prefix + key])) for key in ("weight", "bias")}
    depthwise.load_state_dict(state, strict=True)
    expected = run(depthwise, torch.from_numpy(x).mT).swapaxes(1, 2)
    assert_same(np.array(conv(mx.array(x))), expected)
    mx.savez(str(tmp_path / "theirs.npz"), **tensors)
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (2, 9)).astype(np.int32)
    assert_same(ours(tmp_path / "theirs.npz", ids), ours(folder, ids))


# --- mlx-lm ----------------------------------------------------------------------------------------


def test_mlx_lm_both_ways(config, ids, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    folder = written(tmp_path / "ours", config, "mlx_lm")
    model, fields = utils.load_model(folder, strict=True)
    logits = np.array(model(mx.array(ids)))
    assert_same(logits, ours(folder, ids))
    utils.save_model(tmp_path / "theirs", model)
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    opened = open_model(tmp_path / "theirs")
    assert opened.layout == "mlx_lm"
    assert_same(logits, ours(tmp_path / "theirs", ids))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_lms_quantised_model(ids, tmp_path, bits):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    config = dataclasses.replace(BASE, d_model=32, vocab_size=64, tie_embeddings=bits != 4, d_state=8, dt_rank=16)
    model, fields = utils.load_model(written(tmp_path / "ours", config, "mlx_lm"), strict=True)
    quantised, fields = utils.quantize_model(model, fields, 32, bits)
    utils.save_model(tmp_path / "theirs", quantised)
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    expected = np.array(utils.dequantize_model(quantised)(mx.array(ids)))
    stored = open_checkpoint(tmp_path / "theirs")
    names = {name for name in stored if name.endswith(".scales")}
    assert "backbone.embeddings.scales" in names
    assert sum("mixer" in name for name in names) == 2 * 3, "those with whole groups of columns"
    assert open_model(tmp_path / "theirs").layout == "mlx_lm"
    assert_same(ours(tmp_path / "theirs", ids), expected)


def test_mlx_lms_other_modes_are_refused(tmp_path):
    utils = pytest.importorskip("mlx_lm.utils")
    config = dataclasses.replace(BASE, d_model=32, vocab_size=64)
    model, fields = utils.load_model(written(tmp_path / "ours", config, "mlx_lm"), strict=True)
    quantised, fields = utils.quantize_model(model, fields, 32, 4, mode="mxfp4")
    utils.save_model(tmp_path / "theirs", quantised)
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    with pytest.raises(CheckpointError, match=r"mode 'mxfp4'.*mlx_lm\.convert .*--dequantize"):
        open_model(tmp_path / "theirs")


def test_mlx_lms_model_saved_by_mlx_itself(ids, tmp_path):
    mx = pytest.importorskip("mlx.core")
    tree_flatten = pytest.importorskip("mlx.utils").tree_flatten
    utils = pytest.importorskip("mlx_lm.utils")
    folder = written(tmp_path / "ours", BASE, "mlx_lm")
    model, _ = utils.load_model(folder, strict=True)
    mx.eval(model.parameters())
    mx.save_safetensors(str(folder / "other.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "other.safetensors").replace(folder / "model.safetensors")
    assert open_model(folder).layout == "mlx_lm"
    assert_same(np.array(model(mx.array(ids))), ours(folder, ids))


# --- wrappers, adapters and state dicts ------------------------------------------------------------


def test_peft_is_refused_until_it_is_merged(transformers, tmp_path, ids):
    peft = pytest.importorskip("peft")
    folder = written(tmp_path / "base", BASE, "hf")
    model = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(target_modules=["in_proj"], modules_to_save=["x_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, settings)
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=f"is an adapter of {folder}; merge it into its base first"):
        open_model(tmp_path / "adapter")
    fields = (folder / "config.json").read_text()
    for name, state in {"whole": tuned.state_dict(), "inner": model.state_dict()}.items():
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "model.pt")
        (tmp_path / name / "config.json").write_text(fields)
        with pytest.raises(CheckpointError, match=r"has a tensor '.*': it is or holds an adapter"):
            open_model(tmp_path / name)
    with torch.no_grad():
        expected = tuned.eval()(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same(expected, ours(tmp_path / "merged", ids))


def wrapped(model):
    """The model as frameworks wrap it, with the names that its state dict has then."""
    checkpointing = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    yield torch.compile(model)
    yield torch.nn.DataParallel(model)
    yield torch.optim.swa_utils.AveragedModel(model)
    yield torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"mamba": model})})
    inner = copy.deepcopy(model)
    for index, layer in enumerate(inner.backbone.layers):
        inner.backbone.layers[index] = torch.compile(layer)
    yield torch.nn.DataParallel(inner)
    yield checkpointing.checkpoint_wrapper(inner)


def test_wrapped_models_state_dicts(transformers, tmp_path, ids):
    folder = written(tmp_path / "plain", BASE, "hf")
    model = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = ours(folder, ids)
    for number, wrapper in enumerate(wrapped(model)):
        path = tmp_path / str(number)
        path.mkdir()
        torch.save({"state_dict": wrapper.state_dict(), "epoch": 3}, path / "last.ckpt")
        (path / "config.json").write_text((folder / "config.json").read_text())
        assert_same(expected, ours(path, ids))


@pytest.mark.parametrize("prefix", ["", "inner."])
def test_transformers_tied_state_dict_is_loaded_into_our_torch_model(transformers, ids, prefix):
    """It has the head twice, ours once."""
    config = transformers.MambaConfig(hidden_size=24, num_hidden_layers=2, vocab_size=61)
    theirs = transformers.MambaForCausalLM(config).eval()
    model = mc.build(config, backend="torch", device="cpu", seed=1)
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    assert prefix + "lm_head.weight" in state
    whole = torch.nn.ModuleDict({"inner": model}) if prefix else model
    before = set(state)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    for assign in (False, True):
        assert not any(whole.load_state_dict(state, strict=True, assign=assign))
        assert set(state) == before, "the caller's own is not changed"
        assert_same(run(lambda x: model(x).logits, torch.from_numpy(ids)), expected)
    head = state[prefix + "lm_head.weight"]
    for other in (head + 1, head[:-1], head.double()):
        with pytest.raises(RuntimeError, match=r"lm_head\.weight differs from .*, but the config ties them"):
            whole.load_state_dict(state | {prefix + "lm_head.weight": other}, strict=False)
    del state[prefix + "backbone.embeddings.weight"]
    assert not any(whole.load_state_dict(state, strict=True)), "the head stands for the embedding"


def test_an_own_head_is_loaded_as_before():
    config = dataclasses.replace(BASE, tie_embeddings=False)
    first, second = (mc.build(config, backend="torch", device="cpu", seed=seed) for seed in (0, 1))
    assert not any(first.load_state_dict(second.state_dict(), strict=True))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    state = {name: tensor for name, tensor in second.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
        first.load_state_dict(state)


# --- configs of other libraries --------------------------------------------------------------------


def test_a_config_of_transformers_is_converted(transformers):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61}
    theirs = transformers.MambaConfig(**sizes, state_size=5, layer_norm_epsilon=1e-3, eos_token_id=[3, 4])
    model = mc.build(theirs, backend="torch", device="cpu")
    assert (model.config.d_state, model.config.norm_eps, model.config.eos_token_id) == (5, 1e-3, (3, 4))
    assert model.config == MambaConfig.from_hf(theirs.to_dict())
    falcon = mc.build(transformers.FalconMambaConfig(**sizes), backend="torch", device="cpu")
    assert falcon.config.architecture == "falcon_mamba"
    with pytest.raises(ValueError, match=r"config is transformers\..*BambaConfig: config has model_type 'bamba'"):
        mc.build(transformers.BambaConfig(), backend="torch")
    with pytest.raises(TypeError, match=r"config is builtins\.type; expected a preset's name or a config such as"):
        mc.build(transformers.MambaConfig, backend="torch")


def test_a_config_of_mamba_ssm_is_converted():
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mamba_ssm is not installed")
    # Its package cannot be imported without a GPU; the file of its configs can.
    path = Path(spec.submodule_search_locations[0]) / "models" / "config_mamba.py"
    found = importlib.util.spec_from_file_location("mamba_ssm.models.config_mamba", path)
    module = importlib.util.module_from_spec(found)
    with mock.patch.dict(sys.modules, {found.name: module}):
        found.loader.exec_module(module)
        config = from_object(module.MambaConfig(d_model=24, n_layer=2, vocab_size=61, ssm_cfg={"d_state": 5}))
        with pytest.raises(ValueError, match=r"config is mamba_ssm\..*MambaConfig: config has ssm_cfg layer 'Mamba3'"):
            from_object(module.MambaConfig(ssm_cfg={"layer": "Mamba3"}))
        second = from_object(module.MambaConfig(d_model=32, n_layer=2, ssm_cfg={"layer": "Mamba2", "headdim": 8}))
    assert second == Mamba2Config(d_model=32, n_layer=2, headdim=8, pad_vocab_size_multiple=8)
    assert config == MambaConfig(d_model=24, n_layer=2, vocab_size=61, d_state=5)


def test_a_config_of_mambapy_is_that_of_its_layers():
    mamba = pytest.importorskip("mambapy.mamba")
    config = from_object(mamba.MambaConfig(d_model=24, n_layers=2, rms_norm_eps=1e-3))
    assert config == MambaConfig(d_model=24, n_layer=2, norm_eps=1e-3, task="layers")
    with pytest.raises(ValueError, match=r"config is mambapy\.mamba\.MambaConfig: config has mup=True"):
        from_object(mamba.MambaConfig(d_model=24, n_layers=2, mup=True))


def test_a_config_of_minimamba_is_not_taken_for_mamba():
    minimamba = pytest.importorskip("minimamba")
    with pytest.raises(ValueError, match=r"config is minimamba\..*bias twice.*a MiniMambaConfig of mamba_core"):
        from_object(minimamba.MambaLMConfig(d_model=24, n_layer=2))


# --- MiniMamba -------------------------------------------------------------------------------------


@pytest.fixture(params=["MambaForCausalLM", "MambaForFeatureExtraction"])
def compat_config(request, config):
    task = "lm" if request.param == "MambaForCausalLM" else "features"
    bias = config.bias and task == "features"
    return dataclasses.replace(of_architecture(config, "minimamba"), task=task, bias=bias)


def test_minimamba_both_ways(compat_config, ids, tmp_path):
    minimamba = pytest.importorskip("minimamba")
    folder = written(tmp_path / "ours", compat_config, "minimamba")
    kind = minimamba.MambaForCausalLM if compat_config.task == "lm" else minimamba.MambaForFeatureExtraction
    model = kind(minimamba.MambaLMConfig.from_json(folder / "config.json")).eval()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
    result = run(model, torch.from_numpy(ids).long())
    assert_same(result, ours(folder, ids, compat="minimamba"))
    (tmp_path / "theirs").mkdir()
    torch.save(model.state_dict(), tmp_path / "theirs" / "model.pt")
    assert_same(result, ours(tmp_path / "theirs", ids, compat="minimamba"))
    model.config.save_to_json(tmp_path / "theirs" / "config.json")
    opened = open_model(tmp_path / "theirs", compat="minimamba")
    assert opened.config == open_model(folder, compat="minimamba").config
    assert_same(result, ours(tmp_path / "theirs", ids, compat="minimamba"))


def test_mamba_minimals_names_are_those_of_minimambas_first_class(tmp_path):
    """mamba-minimal is no package. Its names are these, and its function is Mamba's."""
    legacy = pytest.importorskip("minimamba.model")
    minimamba = pytest.importorskip("minimamba")
    folder = written(tmp_path / "ours", BASE, "mamba_minimal")
    model = legacy.Mamba(minimamba.MambaLMConfig(d_model=24, n_layer=2, vocab_size=61, dt_rank=2))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match=r"layout='mamba_minimal'.*layout='minimamba', compat='minimamba'"):
        open_model(tmp_path / "theirs.pt")


def test_minimambas_first_class(ids, tmp_path):
    legacy = pytest.importorskip("minimamba.model")
    minimamba = pytest.importorskip("minimamba")
    torch.manual_seed(0)
    model = legacy.Mamba(minimamba.MambaLMConfig(d_model=24, n_layer=2, vocab_size=61, bias=True)).eval()
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    assert_same(run(model, torch.from_numpy(ids).long()), ours(tmp_path / "theirs.pt", ids, compat="minimamba"))


def test_the_backbone_of_minimambas_classifier(ids, tmp_path):
    minimamba = pytest.importorskip("minimamba")
    torch.manual_seed(0)
    config = minimamba.MambaClassificationConfig(d_model=24, n_layer=2, num_labels=3)
    model = minimamba.MambaForSequenceClassification(config).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    config.save_to_json(tmp_path / "config.json")
    hidden = run(model.backbone, model.embedding(torch.from_numpy(ids).long()))
    opened = open_model(tmp_path, compat="minimamba")
    assert opened.left_out == ("classifier.classifier.weight", "classifier.classifier.bias")
    assert_same(hidden, ours(tmp_path, ids, compat="minimamba"))


# --- mamba_ssm -------------------------------------------------------------------------------------

# Of its MambaLMHeadModel, which needs a GPU to be built: the outer names, and those of a layer.
MAMBA_SSM = ("backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight")
MAMBA_SSM_LAYER = (
    *("norm.weight", "mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias"),
    *("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.out_proj.weight"),
)


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_ssms_keys(tmp_path, tied):
    folder = written(tmp_path / "ours", dataclasses.replace(BASE, tie_embeddings=tied), "mamba_ssm")
    layers = {f"backbone.layers.{layer}.{name}" for layer in range(2) for name in MAMBA_SSM_LAYER}
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert set(state) == set(open_checkpoint(folder)) == {*MAMBA_SSM, *layers}
    assert torch.equal(state["lm_head.weight"], state["backbone.embedding.weight"]) == tied
