"""Against transformers' Jamba, mambapy's and mlx-lm's, on the float64 reference: values, gradients and files.

transformers is computed wholly in float64 here, its norms and softmaxes too. Whole sequences alone, padded at most on
the left: with a cache theirs drops Mamba's state where more than one token follows, and padding on the right enters it.
"""

import contextlib
import dataclasses
import json
from unittest import mock

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.jamba import PRESETS, JambaConfig
from mamba_core.config import from_dict, from_object
from mamba_core.spec.init import initial_values
from mamba_core.spec.ops.mixture_of_experts import balance_loss
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.names import stored_tensors
from mamba_core.weights.opening import open_model
from mamba_core.weights.tables import jamba as tables
from mamba_core.weights.writing import write_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# Layers: Mamba, Mamba with a mixture, attention, Mamba with a mixture.
BASE = JambaConfig(
    d_model=16, n_layer=4, vocab_size=61, d_state=5, initializer_range=0.3, d_intermediate=12, num_heads=4,
    num_kv_heads=2, attn_layer_period=4, attn_layer_offset=2, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip
VARIANTS = {
    "sparse": {},
    "attention with a mixture": {"attn_layer_offset": 1},
    "tied": {"tie_embeddings": True},
    "no mixture": {"num_experts": 1, "num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 4, "num_kv_heads": 1},
    "biases": {"bias": True, "conv_bias": False, "num_kv_heads": 4},
    "sizes": {"d_conv": 3, "expand": 3, "dt_rank": 7, "norm_eps": 1e-2, "expert_layer_period": 3},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(1, BASE.vocab_size, (2, 21)).astype(np.int32)


@pytest.fixture
def values(config):
    return values_of(config)


def values_of(config):
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


def without_ours(fields):
    return {name: value for name, value in fields.items() if name != "mamba_core"}


# --- transformers ----------------------------------------------------------------------------------

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@contextlib.contextmanager
def float64_alone():
    """What they do in float32 is done in float64."""
    double = torch.Tensor.double
    with (
        mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
        mock.patch.object(torch.Tensor, "float", double),
    ):
        yield


def their_model(transformers, folder, kind="JambaForCausalLM"):
    options = EAGER | {"dtype": torch.float64, "output_loading_info": True}
    model, report = getattr(transformers, kind).from_pretrained(folder, **options)
    assert not any(report.values()), report
    return model


def their_logits(model, ids, mask=None):
    mask = None if mask is None else torch.from_numpy(mask).long()
    with float64_alone():
        return model(torch.from_numpy(ids).long(), attention_mask=mask, use_cache=False)[0]


def test_reference_equals_transformers(transformers, config, values, ids, tmp_path):
    model = their_model(transformers, written(tmp_path / "ours", config, values, "hf"))
    with torch.no_grad():
        logits = their_logits(model, ids).numpy()
    assert relative_l2(ReferenceModel(config, values)(ids).logits, logits) <= 1e-12


def test_gradients_equal_transformers(transformers, config, values, ids, tmp_path):
    model = their_model(transformers, written(tmp_path / "ours", config, values, "hf"))
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))
    with float64_alone():
        (their_logits(model, ids) * torch.from_numpy(weights)).sum().backward()
    ours, _ = ReferenceModel(config, values).vjp(weights, ids)
    stacked = stored_tensors(config, tables.HF.schemes[1])
    for name in parameter_table(config):
        theirs = np.zeros_like(ours[name])
        for piece in stacked[name].pieces:
            theirs[piece.where] = model.get_parameter(piece.name).grad.numpy()
        assert relative_l2(theirs, ours[name]) <= 1e-11, name


def test_padding_on_the_left(transformers, config, ids, tmp_path):
    """Without a bias of Mamba's projections: theirs would enter the convolution from the padding."""
    config = dataclasses.replace(config, bias=False)
    values = values_of(config)
    mask = np.ones(ids.shape, bool)
    mask[1, :9] = False
    model = their_model(transformers, written(tmp_path / "ours", config, values, "hf"))
    with torch.no_grad():
        logits = their_logits(model, ids, mask).numpy()
    assert relative_l2(ReferenceModel(config, values)(ids, mask=mask).logits[mask], logits[mask]) <= 1e-12


def test_the_loss_of_the_routers_equals_transformers(transformers):
    """For layers of one batch, with padding and without."""
    function = transformers.models.jamba.modeling_jamba.load_balancing_loss_func
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(3, 2, 9, 5)), rng.random((2, 9)) < 0.7
    for given in (None, mask):
        with float64_alone():
            leaf = torch.from_numpy(logits).requires_grad_()
            their_mask = None if given is None else torch.from_numpy(given)
            theirs = function(tuple(leaf.reshape(3, 18, 5)), 5, 2, their_mask)
            theirs.backward()
        loss, gradient = balance_loss(logits, 2, given)
        assert loss == pytest.approx(theirs.item(), rel=1e-12)
        assert relative_l2(gradient, leaf.grad.numpy()) <= 1e-12


@pytest.mark.parametrize("kind", ["JambaForCausalLM", "JambaModel"])
@pytest.mark.parametrize("stacked", [False, True])
def test_we_read_what_transformers_saves(transformers, config, ids, tmp_path, kind, stacked):
    """As it saves it, and as torch saves the state dict of its model, whose experts are stacked."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.JambaConfig(**without_ours(config.to_hf()), **EAGER)).double()
    with torch.no_grad():  # their initial biases are zero, which would hide a bias that is not used
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        result = their_logits(model, ids).numpy()
    model.save_pretrained(tmp_path / "theirs")
    if stacked:
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    opened = open_model(tmp_path / "theirs")
    task = "lm" if kind.endswith("LM") else "features"
    assert (opened.layout, opened.config.architecture, opened.config.task) == ("hf", "jamba", task)
    assert relative_l2(reference(tmp_path / "theirs")(ids)[0], result) <= 1e-12


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_tensors_of_transformers(transformers, name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = transformers.JambaForCausalLM(transformers.JambaConfig(**without_ours(config.to_hf())))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del theirs["lm_head.weight"]
    stored = stored_tensors(config, tables.HF.schemes[1])
    assert {piece.name: piece.shape for tensor in stored.values() for piece in tensor.pieces} == theirs
    billions = {"jamba-v0.1": 51.57, "jamba-1.5-mini": 51.57, "jamba-1.5-large": 398.56, "jamba-reasoning-3b": 3.03}
    count = sum(parameter.size for parameter in parameter_table(config).values())
    assert count == sum(tensor.numel() for tensor in model.parameters())
    assert round(count / 1e9, 2) == billions[name]


# --- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "mamba_dt_rank": 7},
        {"num_experts": 1, "tie_word_embeddings": True, "eos_token_id": [2, 519]},
        {"output_router_logits": True, "router_aux_loss_coef": 0.01, "mamba_proj_bias": True},
        {"attn_layer_period": 14, "attn_layer_offset": 7, "router_aux_loss_coef": 0.5, "rms_norm_eps": 1e-5},
    ],
)
def test_a_config_of_theirs_and_back(transformers, fields):
    theirs = transformers.JambaConfig(**fields)
    ours = from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    again = transformers.JambaConfig.from_dict(without_ours(ours.to_hf()))
    differing = {"transformers_version", "architectures"} | (
        {"num_experts_per_tok"} if ours.num_experts == 1 else set()
    )
    assert {key for key, value in theirs.to_dict().items() if again.to_dict()[key] != value} <= differing
    assert from_dict(json.loads(again.to_json_string())) == ours
    lists = {"layers_block_type": theirs.layers_block_type, "layer_types": theirs.layer_types}
    assert from_dict(theirs.to_dict() | lists) == ours
    kinds = [block.mixer for block in mc.architectures.jamba.blocks(ours)]
    assert ["attention" if kind == "attention" else "mamba" for kind in kinds] == theirs.layers_block_type
    experts = [ours.feed_forward(layer).experts or 1 for layer in range(ours.n_layer)]
    assert experts == theirs.layers_num_experts


def test_the_defaults_are_theirs(transformers):
    assert from_dict({"model_type": "jamba"}) == from_dict(transformers.JambaConfig().to_dict())
    assert dataclasses.replace(from_dict({"model_type": "jamba"}), dt_rank="auto") == PRESETS["jamba-v0.1"]


# --- mambapy ---------------------------------------------------------------------------------------


def mambapy_model(jamba, folder):
    fields = json.loads((folder / "config.json").read_text())
    names = {item.name for item in dataclasses.fields(jamba.JambaLMConfig)}
    model = jamba.JambaLM(jamba.JambaLMConfig(**{name: fields[name] for name in names & set(fields)}))
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return model.double()


@pytest.fixture(scope="module")
def jamba():
    return pytest.importorskip("mambapy.jamba")


def test_mambapy_both_ways(jamba, config, values, ids, tmp_path):
    """Values and gradients of the router and of a part of attention tell that it routes and maps as we do."""
    folder = written(tmp_path / "ours", config, values, "mambapy")
    model = mambapy_model(jamba, folder)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))
    with float64_alone():
        out = model(torch.from_numpy(ids).long())
        logits = out if config.num_experts == 1 else out[0]
        (logits * torch.from_numpy(weights)).sum().backward()
    ours = ReferenceModel(config, values)
    assert relative_l2(ours(ids).logits, logits.detach().numpy()) <= 1e-12
    expected, _ = ours.vjp(weights, ids)
    stored = open_model(folder).stored
    for name in parameter_table(config):
        theirs = np.zeros_like(expected[name])
        for piece in stored[name].pieces:
            gradient = model.get_parameter(piece.name).grad
            theirs[piece.where] = 0 if gradient is None else gradient.numpy()  # of an expert that nothing chose
        assert relative_l2(theirs, expected[name]) <= 1e-11, name
    (tmp_path / "theirs").mkdir()
    torch.save(model.state_dict(), tmp_path / "theirs" / "model.pt")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    opened = open_model(tmp_path / "theirs")
    assert (opened.layout, opened.config.identity()) == ("mambapy", config.identity())
    assert opened.stored == stored
    assert opened.config.tie_embeddings == config.tie_embeddings
    core = opened.checkpoint
    layers = {name.removeprefix("jamba."): np.array(core[name]) for name in core if name.startswith("jamba.")}
    (tmp_path / "layers").mkdir()
    torch.save({n: torch.from_numpy(array) for n, array in layers.items()}, tmp_path / "layers" / "model.pt")
    (tmp_path / "layers" / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    assert open_model(tmp_path / "layers").config.task == "layers"


def test_their_config_objects(transformers, jamba):
    """mc.build takes them."""
    assert from_object(transformers.JambaConfig(hidden_size=64)) == from_dict(
        {"model_type": "jamba", "hidden_size": 64}
    )
    theirs = jamba.JambaLMConfig(d_model=64, n_layers=2, mlp_size=48, num_attention_heads=4, num_key_value_heads=2)
    ours = from_object(theirs)
    assert (ours.architecture, ours.d_intermediate, ours.norm_eps, ours.tie_embeddings) == ("jamba", 48, 1e-5, True)


# --- mlx-lm ----------------------------------------------------------------------------------------


@pytest.fixture
def utils():
    pytest.importorskip("mlx.core")
    return pytest.importorskip("mlx_lm.utils")


def of_mlx_lm(name):
    """The variant as mlx-lm computes it: with all experts."""
    config = dataclasses.replace(BASE, **VARIANTS[name])
    return dataclasses.replace(config, num_experts_per_tok=config.num_experts)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"sizes"}))
def test_mlx_lm_both_ways(utils, name, ids, tmp_path):
    import mlx.core as mx

    config = of_mlx_lm(name)
    values = values_of(config)
    model, fields = utils.load_model(written(tmp_path / "ours", config, values, "mlx_lm"), strict=True)
    logits = np.array(model(mx.array(ids)))
    assert relative_l2(ReferenceModel(config, values)(ids).logits, logits) <= tolerance("float32")
    utils.save_model(tmp_path / "theirs", model)
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    opened = open_model(tmp_path / "theirs")
    assert (opened.layout, opened.config) == ("mlx_lm", config)
    assert relative_l2(reference(tmp_path / "theirs")(ids).logits, logits) <= tolerance("float32")


def test_mlx_lm_makes_the_chosen_experts_sum_to_one(utils, ids, tmp_path):
    """Why a model that leaves experts out is not written for it. When this fails, it may be."""
    import mlx.core as mx

    folder = written(tmp_path / "ours", of_mlx_lm("sparse"), values_of(BASE), "mlx_lm")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": 2}))
    logits = np.array(utils.load_model(folder, strict=True)[0](mx.array(ids)))
    assert open_model(folder).config == BASE
    assert relative_l2(reference(folder)(ids).logits, logits) > 1e-2


def test_a_quantised_file_of_mlx_lm_is_read_as_its_values(utils, ids, tmp_path):
    """Its stacks of experts and joined projections too."""
    import mlx.core as mx
    import mlx.nn as nn

    config = dataclasses.replace(of_mlx_lm("sparse"), d_model=64, d_intermediate=32)
    values = values_of(config)
    model, fields = utils.load_model(written(tmp_path / "ours", config, values, "mlx_lm"), strict=True)
    nn.quantize(model, 32, 8, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0)
    logits = np.array(model(mx.array(ids)))
    utils.save_model(tmp_path / "theirs", model)
    fields["quantization"] = {"group_size": 32, "bits": 8}
    utils.save_config(fields, tmp_path / "theirs" / "config.json")
    opened = open_model(tmp_path / "theirs")
    assert opened.checkpoint.tensors["model.layers.1.feed_forward.switch_mlp.up_proj.weight"].dtype == "uint32"
    assert relative_l2(reference(tmp_path / "theirs")(ids).logits, logits) <= 1e-5
    assert relative_l2(ReferenceModel(config, values)(ids).logits, logits) > 1e-4


# --- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparse", "tied"])
def test_backends_equal_transformers(backend, transformers, name, ids, tmp_path):
    """From the checkpoint that transformers loads; whole, padded on the left, and of what each backend saves again."""
    config = dataclasses.replace(BASE, **VARIANTS[name])
    folder = written(tmp_path / "ours", config, values_of(config), "hf")
    mask = np.ones(ids.shape, bool)
    mask[1, :9] = False
    model = mc.load(folder, backend=backend.name)
    mc.save(model, tmp_path / "saved")
    theirs = their_model(transformers, tmp_path / "saved")
    inputs, given = (backend.from_numpy(value, device=model.device) for value in (ids, mask))
    for counted, kept in ((None, np.ones_like(mask)), (mask, mask)):
        out = model(inputs, mask=None if counted is None else given).logits
        with torch.no_grad():
            logits = their_logits(theirs, ids, counted).numpy()
        assert relative_l2(backend.to_numpy(out)[kept], logits[kept]) <= tolerance("float32")


def test_generation_equals_transformers(backend, transformers, tmp_path):
    """Greedy tokens of a prompt and its continuation: their cache takes one token after the other."""
    folder = written(tmp_path / "ours", BASE, values_of(BASE), "hf")
    prompt = [5, 17, 3, 60, 21]
    model = their_model(transformers, folder)
    with torch.no_grad(), float64_alone():
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    result = mc.generate(mc.load(folder, backend=backend.name), [prompt], max_new_tokens=12, stop=[])
    assert list(result.tokens[0]) == tokens[0, len(prompt) :].tolist()
