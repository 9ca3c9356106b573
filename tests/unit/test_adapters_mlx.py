"""Adapters on an MLX model: they act on every path, are trained alone, and are merged into what is saved."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.spec.params import parameter_table
from mamba_core.spec.tolerances import relative_l2
from mamba_core.training import TrainSettings, train

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_flatten  # noqa: E402 (after the package that it needs)

from mamba_core.backends.mlx import decoding  # noqa: E402

from . import mlx_paths  # noqa: E402

BACKEND = registry.get("mlx")
CONFIG = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=32, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 32, (2, 21)).astype(np.int32)
DATA = np.random.default_rng(1).integers(0, 32, 300)
SETTINGS = TrainSettings(steps=3, batch_size=2, length=8, warmup_steps=0, learning_rate=1e-2)
LINEAR = ("in_proj", "x_proj", "dt_proj", "out_proj")


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with mx.stream(mx.cpu):
        yield


class ConvLoRA(nn.Module):
    """A convolution beside another. It has no attribute that a convolution has."""

    def __init__(self, inner):
        super().__init__()
        self.base = inner
        channels, taps, _ = inner.weight.shape
        self.added = nn.Conv1d(channels, channels, taps, groups=channels, padding=taps - 1, bias=False)
        self.added.weight = mx.random.normal(inner.weight.shape, scale=0.1)

    def __call__(self, x):
        return self.base(x) + self.added(x)


def built(kind=mc.MambaConfig, tied=True, dtype="float32", **options):
    shared = {name: value for name, value in vars(CONFIG).items() if name in kind.__dataclass_fields__}
    config = kind(**shared | {"tie_embeddings": tied})
    return mc.build(config, backend="mlx", device="cpu", seed=2, dtype=dtype, **options)


def adapted(model, dropout=0.0, dora=False, convolutions=True):
    """Adapters, none of which is zero, on every layer, as mlx-lm's own function adds them; only they are trained."""
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    mx.random.seed(3)
    model.freeze()
    keys = [*(f"mixer.{name}" for name in LINEAR), "backbone.embeddings", "lm_head"]
    tuner.linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": dropout, "keys": keys}, use_dora=dora)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, scale=0.05)
    if convolutions:
        for block in model.layers:
            block.mixer.conv1d = ConvLoRA(block.mixer.conv1d.freeze())
    mx.eval(model.parameters())
    return model


def of_merged_weights(model, dora=False):
    """A model as built with the weights that the adapters amount to: by mlx-lm's own `fuse`, and by hand."""
    values = {}
    for path, module in model.named_modules():
        if hasattr(module, "fuse"):
            fused = module.fuse()
            values |= {f"{path}.{name}": np.array(value) for name, value in fused.parameters().items()}
        elif isinstance(module, ConvLoRA):
            values[f"{path}.weight"] = np.array(module.base.weight + module.added.weight).swapaxes(1, 2)
            values[f"{path}.bias"] = np.array(module.base.bias)
        elif "fuse" not in path:
            for name, value in module.items():
                if isinstance(value, mx.array) and f"{path}.{name}" in parameter_table(model.config):
                    values.setdefault(f"{path}.{name}", np.array(value))
    return BACKEND.build(model.config, values.items(), device="cpu")


def on_every_path(model):
    """And a prefill."""
    prefilled = tree_flatten(BACKEND.prefill(model, IDS, np.ones(IDS.shape, bool)))
    return [*mlx_paths.on_every_path(model, IDS), *(np.array(value) for _, value in prefilled)]


KINDS = [mc.MambaConfig, mc.MiniMambaConfig, mc.FalconMambaConfig]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_model_computes_what_the_merged_weights_compute(kind, dora):
    model = adapted(built(kind, tied=dora), dora=dora)
    other = of_merged_weights(model)
    for value, wanted in zip(on_every_path(model), on_every_path(other), strict=True):
        assert relative_l2(value, wanted) < 1e-5
    assert relative_l2(on_every_path(built(kind, tied=dora))[0], on_every_path(other)[0]) > 1e-2
    wanted = mc.generate(other, [[1, 2, 3], [4]], max_new_tokens=5)
    found = mc.generate(model, [[1, 2, 3], [4]], max_new_tokens=5)
    assert found.tokens == wanted.tokens
    assert np.allclose(found.logprobs, wanted.logprobs, atol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_reach_every_adapter_and_are_those_of_the_merged_weights(remat):
    """By the chain rule from the gradients of the merged weights W + scale (a b)^T."""
    model = adapted(built())
    model.remat = remat
    _, wanted = BACKEND.loss_and_gradients(of_merged_weights(model), IDS)
    found = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    assert len(found) == 2 * (2 * len(LINEAR) + 1) + 2
    for name, gradient in found.items():
        path, _, leaf = name.rpartition(".")
        if path.endswith(".added"):
            expected = wanted[f"{path.removesuffix('.added')}.weight"].swapaxes(1, 2)
        else:
            lora, weight = dict(model.named_modules())[path], wanted[f"{path}.weight"]
            weight = weight if path.endswith("embeddings") else weight.T
            a, b = np.array(lora.lora_a), np.array(lora.lora_b)
            expected = 2.0 * (weight @ b.T if leaf == "lora_a" else a.T @ weight)
        assert relative_l2(np.array(gradient), expected) < 1e-4, name


def loss(model):
    logits = model(mx.array(IDS[:, :-1])).logits
    return nn.losses.cross_entropy(logits, mx.array(IDS[:, 1:]), reduction="mean")


def test_a_compiled_step_is_the_step():
    """Everything in one graph: there the kernels are MLX's own."""
    model = adapted(built())

    def step():
        return nn.value_and_grad(model, loss)(model)

    wanted, found = step(), mx.compile(step, inputs=model.state)()
    for (name, value), (_, other) in zip(tree_flatten(found), tree_flatten(wanted), strict=True):
        assert relative_l2(np.array(value), np.array(other)) < 1e-4, name


# --- random numbers and blocks that are computed again -------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_dropout_draws_the_same_mask_where_blocks_are_computed_again(kernels):
    model = adapted(built(kernels=kernels), dropout=0.5)
    found = []
    for remat in (False, True):
        model.remat = remat
        mx.random.seed(7)
        value, gradients = nn.value_and_grad(model, loss)(model)
        found.append([value, *(gradient for _, gradient in sorted(tree_flatten(gradients))), mx.random.uniform()])
        mx.eval(found)
    for value, wanted in zip(*found, strict=True):
        assert relative_l2(np.array(value), np.array(wanted)) < 1e-5


def test_dropout_that_cannot_draw_the_same_mask_is_refused_by_name():
    model = adapted(built(kernels="plain"), dropout=0.5)
    model.remat = True
    state = [model.state, mx.random.state]
    step = mx.compile(lambda: nn.value_and_grad(model, loss)(model)[0], inputs=state, outputs=state)
    with pytest.raises(TypeError, match=r"dropout is mlx\.nn.*Dropout.*remat = False"):
        step()
    model = adapted(built(kernels="plain"), dropout=0.5).eval()
    model.remat = True
    state = [model.state, mx.random.state]
    assert mx.compile(lambda: nn.value_and_grad(model, loss)(model)[0], inputs=state, outputs=state)().item() > 0


def test_compiled_decoding_draws_a_mask_for_each_step(monkeypatch):
    """As steps that are not compiled do. Of a small model, because what is compiled for a CPU takes seconds."""
    config = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16, initializer_range=0.3)
    model, found = mc.build(config, backend="mlx", device="cpu", kernels="plain"), []
    model.backbone.norm_f = nn.Sequential(model.backbone.norm_f, nn.Dropout(0.5))
    for compiled in (False, True):
        monkeypatch.setattr(decoding.numpy_linear, "NUMPY_IS_FASTER", not compiled)
        mx.random.seed(7)
        found.append(mc.generate(model, [[1, 2, 3]], max_new_tokens=4))
    assert found[1].tokens == found[0].tokens
    assert np.allclose(found[1].logprobs, found[0].logprobs, atol=1e-5)


# --- training ------------------------------------------------------------------------------------------


def parameters(model):
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


@pytest.mark.parametrize("dora", [False, True])
def test_training_trains_the_adapters_alone(dora):
    model = adapted(built(), dora=dora, dropout=0.1)
    before, trained = parameters(model), {name for name, _ in tree_flatten(model.trainable_parameters())}
    log = train(model, DATA, SETTINGS)
    after = parameters(model)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == trained
    assert all(entry["gradient_norm"] > 0 for entry in log)


def test_a_trainer_s_state_has_what_is_trained_by_its_own_name():
    model = adapted(built())
    model.layers[0].mixer.conv1d = model.layers[0].mixer.conv1d.base.unfreeze()
    model.layers[1].norm.unfreeze()
    trainer = BACKEND.trainer(model, SETTINGS)
    shapes = trainer.shapes()
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == (32, 1, 4)
    assert shapes["backbone.layers.1.norm.weight"] == (16,)
    assert shapes["backbone.layers.1.mixer.conv1d.added.weight"] == (32, 4, 1)
    assert shapes["backbone.layers.1.mixer.in_proj.lora_a"] == (16, 4)
    assert not any("linear.weight" in name for name in shapes)
    batches = [np.random.default_rng(seed).integers(0, 32, (2, 9)) for seed in range(3)]
    trainer.step(batches[0])
    state = trainer.state()
    assert {name: value.shape for name, value in state.items() if name != "step"} == {
        f"{moment}.{name}": shape for moment in "mv" for name, shape in shapes.items()
    }
    # Another trainer of the same model goes on from there.
    kept = dict(tree_flatten(model.parameters()))
    trainer.step(batches[1])
    wanted = parameters(model)
    model.load_weights(list(kept.items()))
    again = BACKEND.trainer(model, SETTINGS)
    again.load_state(state)
    again.step(batches[1])
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(value, wanted[name], name)


def test_a_parameter_that_somebody_added_decays_if_it_has_two_axes():
    """A rate so large that the decay is all there is to see: nothing depends on the parameters."""
    model = built()
    model.freeze()
    model.table, model.vector = mx.ones((2, 3)), mx.ones((3,))
    BACKEND.trainer(model, SETTINGS).step(IDS)
    assert np.allclose(np.array(model.table), 1 - SETTINGS.learning_rate * SETTINGS.weight_decay)
    assert np.array_equal(np.array(model.vector), np.ones(3))


def test_a_model_without_anything_trainable_is_refused():
    model = built()
    model.freeze()
    with pytest.raises(ValueError, match="nothing of the model is trainable"):
        train(model, DATA, SETTINGS)


def test_a_checkpoint_that_could_not_hold_the_adapters_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"in_proj .*LoRALinear"):
        train(adapted(built()), DATA, SETTINGS, checkpoint=tmp_path / "run")


def test_gradients_by_name_are_of_all_parameters_whatever_is_frozen():
    model = built()
    _, wanted = BACKEND.loss_and_gradients(model, IDS)
    for remat in (False, True):
        model.remat = remat
        model.layers[1].freeze()
        _, found = BACKEND.loss_and_gradients(model, IDS)
        for name, gradient in wanted.items():
            assert relative_l2(found[name], gradient) < 1e-5, name
        assert not tree_flatten(model.layers[1].trainable_parameters())
        assert tree_flatten(model.layers[0].trainable_parameters())
    with pytest.raises(ValueError, match="merge=True"):
        BACKEND.loss_and_gradients(adapted(built()), IDS)


# --- what is saved -------------------------------------------------------------------------------------


def logits(model):
    return np.array(model(mx.array(IDS)).logits)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig])
def test_adapters_are_merged_into_what_is_saved(kind, dora, tmp_path):
    model = adapted(built(kind, tied=False), dora=dora, dropout=0.5)
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=r"backbone\.embeddings \(mlx_lm.*RAEmbedding\).*merge=True"):
        mc.save(model, tmp_path / "refused")
    mc.save(model, tmp_path / "merged", merge=True)
    assert [module.training for module in model.modules()] == modes
    found = logits(mc.load(tmp_path / "merged", backend="mlx", device="cpu"))
    assert relative_l2(found, logits(model.eval())) < 1e-5
    assert relative_l2(found, logits(built(kind, tied=False))) > 1e-2


def test_layers_that_mlx_lm_has_fused_are_saved_as_they_are(tmp_path):
    model = adapted(built(tied=False), convolutions=False)
    wanted = logits(model)
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    from mlx.utils import tree_unflatten

    model.update_modules(tree_unflatten(fused))
    assert BACKEND.foreign(model) == mc.backend.Foreign()
    mc.save(model, tmp_path / "model")
    assert relative_l2(logits(mc.load(tmp_path / "model", backend="mlx", device="cpu")), wanted) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_model_is_refused_or_dequantised(tied, tmp_path):
    config = mc.MambaConfig(d_model=32, n_layer=2, vocab_size=32, tie_embeddings=tied, initializer_range=0.3)
    model = mc.build(config, backend="mlx", device="cpu", seed=2)
    nn.quantize(model, group_size=32, bits=8)
    assert isinstance(model.backbone.embeddings, nn.QuantizedEmbedding)
    with pytest.raises(ValueError, match=r"QuantizedEmbedding.*QuantizedLinear"):
        mc.save(model, tmp_path / "refused")
    mc.save(model, tmp_path / "merged", merge=True)
    wanted, found = logits(model), logits(mc.load(tmp_path / "merged", backend="mlx", device="cpu"))
    assert relative_l2(found, wanted) < 1e-5
    generated = mc.generate(model, [[1, 2, 3]], max_new_tokens=4).tokens
    assert generated == mc.generate(mc.load(tmp_path / "merged", backend="mlx"), [[1, 2, 3]], max_new_tokens=4).tokens


def test_bfloat16_is_merged_to_its_own_precision(tmp_path):
    model = adapted(built(dtype="bfloat16"))
    mc.save(model, tmp_path / "merged", merge=True)
    other = mc.load(tmp_path / "merged", backend="mlx", device="cpu")
    assert other.dtype == "bfloat16"
    assert relative_l2(logits(other), logits(model)) < 5e-2


# --- what a model holds beside its table ------------------------------------------------------------------


def norm(model, layer=0):
    return model.layers[layer].norm


def add_head(model):
    model.lm_head = nn.Linear(16, 32, bias=False)


def add_value_head(model):
    model.value_head = nn.Linear(16, 1)


def add_bias(model):
    model.layers[0].mixer.in_proj.bias = mx.ones(64)


def drop_bias(model):
    del model.layers[0].mixer.conv1d["bias"]


def another_norm(model):
    model.layers[1].norm = nn.LayerNorm(16)


def another_epsilon(model):
    norm(model).eps = 0.5


def subclass_a_mixer(model):
    mixer = model.layers[1].mixer
    mixer.__class__ = type("Mine", (type(mixer),), {})


def one_more_block(model):
    model.backbone.layers.append(model.layers[0])


def one_block_less(model):
    model.backbone.layers.pop()


def a_function(model):
    inner = norm(model)
    model.layers[0].norm = lambda x: inner(x)


def add_a_buffer(model):
    model.layers[0].mixer.mine = mx.ones(3)


FOREIGN = {
    "a head of a tied model": (add_head, r"lm_head\.weight", False),
    "a value head": (add_value_head, r"value_head\.weight", False),
    "a bias": (add_bias, r"layers\.0\.mixer\.in_proj \(Linear with bias", False),
    "a bias less": (drop_bias, r"layers\.0\.mixer\.conv1d \(Conv1d with bias", True),
    "a LayerNorm": (another_norm, r"layers\.1\.norm \(mlx\.nn\..*LayerNorm\)", False),
    "an epsilon": (another_epsilon, r"layers\.0\.norm \(RMSNorm with eps 0\.5\)", False),
    "a mixer": (subclass_a_mixer, r"layers\.1\.mixer \(.*Mine\)", False),
    "a block more": (one_more_block, r"layers\.2\.norm\.weight", False),
    "a block less": (one_block_less, r"layers\.1 \(builtins\.NoneType\)", False),
    "a function": (a_function, r"layers\.0\.norm \(builtins\.function\)", True),
    "an array": (add_a_buffer, r"layers\.0\.mixer\.mine", False),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_the_table_cannot_hold_is_refused_by_name(what, tmp_path):
    change, name, merges = FOREIGN[what]
    model = built()
    assert BACKEND.foreign(model) == mc.backend.Foreign()
    change(model)
    with pytest.raises(ValueError, match=name):
        mc.save(model, tmp_path / "refused")
    if merges:
        mc.save(model, tmp_path / "merged", merge=True)
        assert relative_l2(logits(mc.load(tmp_path / "merged", backend="mlx", device="cpu")), logits(model)) < 1e-5
    else:
        with pytest.raises(ValueError):  # noqa: PT011 (the message is that of the kind of fault)
            mc.save(model, tmp_path / "refused", merge=True)
    assert not (tmp_path / "refused").exists()


def test_subclasses_of_the_model_and_its_backbone_are_held(tmp_path):
    model = built()
    for module in (model, model.backbone):
        module.__class__ = type("Mine", (type(module),), {})
    mc.save(model, tmp_path / "model")
    np.testing.assert_array_equal(logits(mc.load(tmp_path / "model", backend="mlx", device="cpu")), logits(model))


def test_a_patched_class_of_layers_is_merged_as_it_computes(monkeypatch, tmp_path):
    model, original = built(), nn.Linear.__call__
    assert BACKEND.foreign(model).hooked == {}
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: 2 * original(self, x))
    assert "backbone.layers.1.mixer.dt_proj" in BACKEND.foreign(model).hooked
    mc.save(model, tmp_path / "plain")
    mc.save(model, tmp_path / "merged", merge=True)
    wanted = logits(model)
    monkeypatch.undo()
    assert relative_l2(logits(mc.load(tmp_path / "merged", backend="mlx", device="cpu")), wanted) < 1e-5
    np.testing.assert_array_equal(logits(mc.load(tmp_path / "plain", backend="mlx", device="cpu")), logits(model))


def test_asking_what_a_model_holds_draws_no_random_numbers():
    from mamba_core.backends.mlx import weights

    model = built()
    weights._built.cache_clear()
    mx.random.seed(5)
    wanted = mx.random.uniform().item()
    mx.random.seed(5)
    BACKEND.foreign(model)
    assert mx.random.uniform().item() == wanted
