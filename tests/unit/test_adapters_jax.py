"""Layers of JAX's models that were adapted, wrapped or patched act on every path, and are saved or refused by name."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import architectures, registry
from mamba_core.sampling import Sampling
from mamba_core.spec.tolerances import relative_l2
from mamba_core.training import TrainSettings

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
jnp = jax.numpy

from mamba_core.backends.jax import decoding, model, training, weights  # noqa: E402 (after the packages that they need)
from mamba_core.backends.jax.blocks import Block, RMSNorm  # noqa: E402
from mamba_core.backends.jax.heads.lm import LanguageModel  # noqa: E402
from mamba_core.backends.jax.mixers.mamba import MambaMixer  # noqa: E402

SIZES = {"d_model": 8, "n_layer": 2, "vocab_size": 16, "d_state": 4, "initializer_range": 0.5}
CONFIG = mc.MambaConfig(**SIZES)
UNTIED = mc.MambaConfig(**SIZES, tie_embeddings=False)
SHALLOW = mc.MambaConfig(**SIZES | {"n_layer": 1})
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 9)).astype(np.int32))
MASK = jnp.asarray(np.random.default_rng(1).random((2, 9)) < 0.7).at[:, -1].set(True)
SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(2).integers(0, 3, (2, 9))).astype(np.int32))
TOKENS = np.asarray(IDS)
SETTINGS = TrainSettings(steps=3, warmup_steps=0, learning_rate=0.1)
BACKEND = registry.get("jax")


def built(config=CONFIG):
    """A model in which every layer matters: as it is initialised, dt_proj hardly does."""
    found, rng = mc.build(config, backend="jax", device="cpu"), np.random.default_rng(0)
    for layer in found.backbone.layers:
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            kernel = getattr(layer.mixer, name).kernel
            kernel[...] = jnp.asarray(rng.normal(size=kernel.shape) / np.sqrt(kernel.shape[0]), "float32")
        layer.mixer.dt_proj.bias[...] *= 0.1
    return found


def called(found) -> dict:
    """What a model computes, by the way that it is called."""
    whole, before = found(IDS), found(IDS[:, :4])
    values = {"whole": whole.logits, "masked": found(IDS, mask=MASK).logits}
    packed = found(IDS, mask=MASK, segment_ids=SEGMENTS)
    values |= {"packed": packed.logits, "state": packed.state.layers[1].conv}
    values["in chunks"] = jnp.concatenate([before.logits, found(IDS[:, 4:], before.state).logits], axis=1)
    rest, state = [before.logits], before.state
    for at in range(4, 9):
        logits, state = found(IDS[:, at : at + 1], state)
        rest.append(logits)
    return values | {"in steps": jnp.concatenate(rest, axis=1), "loss": training.loss(found, IDS)}


def compiled(found) -> dict:
    """What a prefill and decoding give."""
    prefilled = BACKEND.prefill(found, TOKENS, np.ones((2, 9), bool))
    chosen = BACKEND.decode(found, prefilled, Sampling(), limit=4)
    return {"prefilled": prefilled.logits, "decoded": np.stack([choice.logprobs for choice in chosen])}


def assert_same(found: dict, wanted: dict, limit=1e-5) -> None:
    for name, value in wanted.items():
        assert relative_l2(found[name], value) < limit, name


def assert_consistent(found: dict) -> None:
    """The routes that are to give the same logits do."""
    for name in ("in chunks", "in steps"):
        assert relative_l2(found[name], found["whole"]) < 1e-5, name
    if "prefilled" in found:
        assert relative_l2(found["prefilled"], found["whole"][:, -1]) < 1e-5


# --- adapters, against the same weights merged -----------------------------------------------------


def low_rank(shape, rank=2):
    rng = np.random.default_rng(3)
    return (jnp.asarray(0.3 * rng.normal(size=size), "float32") for size in ((shape[0], rank), (rank, shape[1])))


class Taps(nnx.Module):
    """A convolution and another one beside it."""

    def __init__(self, inside, padding, **options):
        channels = inside.kernel.shape[-1]
        options = {"feature_group_count": channels, "use_bias": False, "padding": padding} | options
        self.inside, self.other = inside, nnx.Conv(channels, channels, 4, **options, rngs=nnx.Rngs(1))
        self.other.kernel = nnx.LoRAParam(self.other.kernel[...])
        inside.padding = padding

    def __call__(self, x):
        return self.inside(x) + self.other(x)


class Rows(nnx.Module):
    """An embedding and a table of low rank beside it."""

    def __init__(self, inside):
        self.inside = inside
        self.a, self.b = map(nnx.LoRAParam, low_rank((16, 8)))

    def __call__(self, ids):
        return self.inside(ids) + self.a[...][ids] @ self.b[...]


def lora(name):
    def adapt(found):
        mixer = found.backbone.layers[1].mixer
        inside = getattr(mixer, name)
        adapter = nnx.LoRA(inside.in_features, 2, inside.out_features, base_module=inside, rngs=nnx.Rngs(0))
        adapter.lora_a[...], adapter.lora_b[...] = low_rank(inside.kernel.shape)
        setattr(mixer, name, adapter)
        return ("backbone", "layers", 1, "mixer", name, "kernel"), adapter.lora_a[...] @ adapter.lora_b[...]

    return adapt


def lora_linear(found):
    mixer = found.backbone.layers[1].mixer
    inside = mixer.in_proj
    options = {"lora_rank": 2, "use_bias": False, "precision": inside.precision}
    mixer.in_proj = nnx.LoRALinear(inside.in_features, inside.out_features, **options, rngs=nnx.Rngs(0))
    adapter = mixer.in_proj
    adapter.kernel[...] = inside.kernel[...]
    adapter.lora.lora_a[...], adapter.lora.lora_b[...] = low_rank(inside.kernel.shape)
    return ("backbone", "layers", 1, "mixer", "in_proj", "kernel"), adapter.lora.lora_a[...] @ adapter.lora.lora_b[...]


def taps(padding):
    def adapt(found):
        mixer = found.backbone.layers[1].mixer
        inside = mixer.conv1d
        mixer.conv1d = Taps(inside, padding)
        return ("backbone", "layers", 1, "mixer", "conv1d", "kernel"), mixer.conv1d.other.kernel[...]

    return adapt


def rows(found):
    inside = found.backbone.embeddings
    found.backbone.embeddings = adapter = Rows(inside)
    return ("backbone", "embeddings", "embedding"), adapter.a[...] @ adapter.b[...]


LORAS = {name: lora(name) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
ADAPTERS = {**LORAS, "LoRALinear": lora_linear, "embeddings": rows}
ADAPTERS |= {"conv1d": taps("CAUSAL"), "conv1d, not padded": taps("VALID"), "conv1d, padded twice": taps(3)}
OTHERS = [architectures.find(name).Config(**SIZES) for name in ("minimamba", "falcon_mamba")]
CASES = [(CONFIG, name) for name in ADAPTERS] + [(config, "dt_proj") for config in OTHERS] + [(UNTIED, "embeddings")]


@pytest.mark.parametrize(("config", "name"), CASES, ids=[f"{config.architecture} {name}" for config, name in CASES])
def test_an_adapter_equals_the_merged_weights(config, name):
    found, merged = built(config), built(config)
    before = found(IDS).logits
    path, change = ADAPTERS[name](found)
    values = called(found)
    assert_consistent(values)
    assert relative_l2(values["whole"], before) > 1e-4
    weights.at(merged, path)[...] += change
    assert_same(values, called(merged))
    gradients = nnx.grad(training.loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(found, IDS)
    for path, gradient in nnx.to_flat_state(gradients):
        assert jnp.abs(gradient[...]).max() > 1e-6, path


@pytest.mark.parametrize("config", [CONFIG, *OTHERS], ids=lambda config: config.architecture)
def test_adapters_of_all_layers_are_saved_merged(config, tmp_path):
    found = built(config)
    for adapt in (*LORAS.values(), rows, taps("CAUSAL")):
        adapt(found)
    values = called(found) | compiled(found)
    assert_consistent(values)
    with pytest.raises(ValueError, match=r"the model has backbone\.embeddings \(Rows\), .* and \d more.*merge"):
        mc.save(found, tmp_path / "refused")
    mc.save(found, tmp_path / "merged", merge=True)
    merged = mc.load(tmp_path / "merged", backend="jax", device="cpu")
    assert_same(values, called(merged) | compiled(merged))


# --- wrappers that have nothing but a call ---------------------------------------------------------


class Bare(nnx.Module):
    """What it wraps, called."""

    calls = 0

    def __init__(self, inside):
        self.inside = inside

    def __call__(self, *arguments):
        Bare.calls += 1
        return self.inside(*arguments)


def wrap_everything(found):
    for block in found.backbone.layers:
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
            setattr(block.mixer, name, Bare(getattr(block.mixer, name)))
        block.norm, block.mixer = Bare(block.norm), Bare(block.mixer)
    found.backbone.layers = nnx.List([Bare(block) for block in found.backbone.layers])
    found.backbone.embeddings, found.backbone.norm_f = Bare(found.backbone.embeddings), Bare(found.backbone.norm_f)
    found.backbone = Bare(found.backbone)
    found.lm_head = Bare(found.lm_head)


def test_wrappers_without_attributes_compute_the_same():
    found = built(UNTIED)
    wanted = called(found) | compiled(found)
    wrap_everything(found)
    Bare.calls = 0
    assert_same(called(found) | compiled(found), wanted, 1e-6)
    assert Bare.calls > 100
    assert BACKEND.foreign(found).changed == {"backbone": "Bare", "lm_head": "Bare"}
    with pytest.raises(TypeError, match=r"the backbone is Bare"):
        found.remat = True
    trainer = BACKEND.trainer(found, SETTINGS)
    losses = [trainer.step(TOKENS)[0] for _ in range(2)]
    assert losses[1] < losses[0]
    tied = built()
    tied.backbone = Bare(tied.backbone)
    with pytest.raises(TypeError, match=r"the backbone is Bare without `embeddings`.*lm_head"):
        tied(IDS)


def test_norms_of_the_framework_in_half_precision():
    """They give float32 in a model in bfloat16, as adapters do; the state keeps its dtype."""
    found = mc.build(CONFIG, backend="jax", device="cpu", dtype="bfloat16")
    block = found.backbone.layers[0]
    block.norm, found.backbone.norm_f = nnx.RMSNorm(8, rngs=nnx.Rngs(0)), nnx.LayerNorm(8, rngs=nnx.Rngs(0))
    lora("in_proj")(found)
    state = found(IDS).state
    assert {value.dtype.name for layer in state.layers for value in layer} == {"bfloat16", "float32"}
    assert state.layers[1].conv.dtype == jnp.bfloat16
    assert len(mc.generate(found, [[1, 2]], max_new_tokens=3).tokens[0]) == 3


# --- the convolution's contract --------------------------------------------------------------------


class Stacked(nnx.Module):
    def __init__(self, inside, **options):
        self.inside, self.more = inside, nnx.Conv(16, 16, **options, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.more(self.inside(x))


REFUSED = {"kernel_dilation=2": {"kernel_size": 2, "padding": "CAUSAL", "kernel_dilation": 2}}
REFUSED |= {"strides=2": {"kernel_size": 1, "strides": 2}, "padding='SAME'": {"kernel_size": 2}}
REFUSED |= {r"kernel_size=\(5,\)": {"kernel_size": 5, "padding": "CAUSAL"}}
REFUSED |= {r"padding=\[\(0, 1\)\]": {"kernel_size": 2, "padding": [(0, 1)]}}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_convolution_that_looks_elsewhere_is_refused_by_name(fault):
    found = built()
    mixer = found.backbone.layers[1].mixer
    mixer.conv1d = Stacked(mixer.conv1d, **REFUSED[fault])
    for length in (1, 5):
        with pytest.raises(TypeError, match=rf"mixer\.conv1d\.more has {fault}; expected a convolution of at most 4"):
            found(IDS[:, :length])


def test_a_convolution_of_another_number_of_positions_is_refused_by_name():
    found = built()
    mixer = found.backbone.layers[1].mixer
    mixer.conv1d = nnx.Sequential(mixer.conv1d, lambda x: x[:, 1:])
    with pytest.raises(TypeError, match=r"mixer\.conv1d, Sequential, gave .*; expected \(b, l, e\) with as many"):
        found(IDS)


@pytest.mark.parametrize("setting", ["padding", "kernel_dilation", "strides", "feature_group_count"])
def test_another_setting_of_the_convolution_itself(setting):
    """A dense one is called, and the others are refused."""
    found = built()
    mixer = found.backbone.layers[1].mixer
    if setting == "feature_group_count":
        inside = mixer.conv1d
        mixer.conv1d = nnx.Conv(16, 16, 4, padding="CAUSAL", rngs=nnx.Rngs(0))
        dense = jnp.zeros((4, 16, 16)).at[:, jnp.arange(16), jnp.arange(16)].set(inside.kernel[:, 0])
        mixer.conv1d.kernel[...], mixer.conv1d.bias = dense, inside.bias
        assert_same(called(found), called(built()))
        return
    setattr(mixer.conv1d, setting, {"padding": "SAME"}.get(setting, 2))
    for length in (1, 5):
        with pytest.raises(TypeError, match=rf"mixer\.conv1d has {setting}="):
            found(IDS[:, :length])


# --- classes that were patched, and models that were replaced --------------------------------------


def tilted(original):
    """Not the same factor everywhere, which the next norm would undo."""

    def tilt(value):
        return value * jnp.linspace(0.5, 1.5, value.shape[-1])

    def call(self, *arguments, **options):
        out = original(self, *arguments, **options)
        if hasattr(out, "logits"):
            return out._replace(logits=tilt(out.logits))
        return (tilt(out[0]), out[1]) if isinstance(out, tuple) else tilt(out)

    return call


PATCHED = {kind.__name__: kind for kind in (MambaMixer, Block, RMSNorm, nnx.Linear, nnx.Conv, nnx.Embed)}
PATCHED |= {kind.__name__: kind for kind in (model.Backbone, LanguageModel)}


@pytest.mark.parametrize("name", PATCHED)
def test_a_class_that_is_patched_acts_on_what_was_compiled_before(name, monkeypatch):
    found, ones = built(SHALLOW), np.ones((2, 9), bool)

    def ways():
        whole, before = found(IDS).logits, found(IDS[:, :8])
        prefilled = BACKEND.prefill(found, TOKENS, ones)
        first = next(iter(BACKEND.decode(found, prefilled, Sampling(), limit=1))).logprobs
        last = {"whole": whole[:, -1], "step": found(IDS[:, 8:], before.state).logits[:, 0]}
        return last | {"prefilled": prefilled.logits}, {"loss": training.loss(found, IDS), "first": first}

    (last, others), original = ways(), PATCHED[name].__call__
    monkeypatch.setattr(PATCHED[name], "__call__", tilted(original))
    patched, others_patched = ways()
    for way, value in patched.items():
        assert relative_l2(value, last[way]) > 1e-4, way
        assert relative_l2(value, patched["whole"]) < 1e-5, way
    for way, value in others_patched.items():
        assert relative_l2(value, others[way]) > 1e-5, way
    monkeypatch.undo()
    assert_same(ways()[0], last, 1e-7)


@pytest.mark.parametrize("name", ["_mix", "last_position"])
def test_other_methods_that_are_patched_act(name, monkeypatch):
    found = built()
    before = BACKEND.prefill(found, TOKENS, np.ones((2, 9), bool)).logits
    original = getattr(MambaMixer, name)

    def patched(self, *arguments):
        out = original(self, *arguments)
        return out and (2 * out[0], out[1])

    monkeypatch.setattr(MambaMixer, name, patched)
    assert BACKEND.explain(found, 2, 1)[0][2] == "plain"
    if name == "_mix":
        assert relative_l2(BACKEND.prefill(found, TOKENS, np.ones((2, 9), bool)).logits, before) > 1e-3


class Favours(LanguageModel):
    """A model whose own call makes one token the likeliest."""

    def __call__(self, input_ids=None, state=None, **options):
        out = super().__call__(input_ids, state, **options)
        return out._replace(logits=out.logits.at[..., 5].add(100.0))


@pytest.mark.parametrize("way", ["subclass", "patched", "head"])
def test_the_models_own_call_is_what_generates_and_trains(way, monkeypatch):
    found = built()
    wanted = mc.generate(found, [[1, 2], [3]], max_new_tokens=6).tokens
    before, trainer = training.loss(found, IDS), BACKEND.trainer(built(), SETTINGS)
    assert wanted != [[5] * 6] * 2
    if way == "subclass":
        found.__class__ = Favours
    elif way == "patched":
        monkeypatch.setattr(LanguageModel, "__call__", favouring(LanguageModel.__call__))
    else:
        monkeypatch.setattr(LanguageModel, "head", favouring_head(LanguageModel.head))
    assert mc.generate(found, [[1, 2], [3]], max_new_tokens=6).tokens == [[5] * 6] * 2
    assert training.loss(found, IDS) > before + 10
    assert BACKEND.trainer(found, SETTINGS).step(TOKENS)[0] > before + 10
    assert BACKEND.loss_and_gradients(found, TOKENS)[0] > before + 10
    if way != "subclass":
        assert trainer.step(TOKENS)[0] > before + 10


def favouring(original):
    def call(self, *arguments, **options):
        out = original(self, *arguments, **options)
        return out._replace(logits=out.logits.at[..., 5].add(100.0))

    return call


def favouring_head(original):
    return lambda self, hidden: original(self, hidden).at[..., 5].add(100.0)


class Intercepting(LanguageModel):
    """Adapters from outside: the variables lie in the layers, and the model's call applies them while it runs."""

    def __call__(self, *arguments, **options):
        original = nnx.Linear.__call__

        def call(layer, x, **given):
            y = original(layer, x, **given)
            return y + x @ layer.kernel_lora_a[...] @ layer.kernel_lora_b[...] if hasattr(layer, "kernel_lora_a") else y

        nnx.Linear.__call__ = call
        try:
            return super().__call__(*arguments, **options)
        finally:
            nnx.Linear.__call__ = original


def intercept(found):
    found.__class__ = Intercepting
    for block in found.backbone.layers:
        for name in ("in_proj", "dt_proj"):
            inside = getattr(block.mixer, name)
            inside.kernel_lora_a, inside.kernel_lora_b = map(nnx.LoRAParam, low_rank(inside.kernel.shape))


def test_adapters_that_intercept_act_and_are_trained_alone():
    found, merged = built(), built()
    intercept(found)
    for block in merged.backbone.layers:
        for name in ("in_proj", "dt_proj"):
            kernel = getattr(block.mixer, name).kernel
            a, b = low_rank(kernel.shape)
            kernel[...] += a @ b
    assert_same(called(found) | compiled(found), called(merged) | compiled(merged))
    assert set(BACKEND.foreign(found).changed) == {
        f"backbone.layers.{layer}.mixer.{name}" for layer in (0, 1) for name in ("in_proj", "dt_proj")
    }
    with pytest.raises(ValueError, match=r"Intercepting with another call\), which cannot be merged"):
        dict(BACKEND.parameters(found, merge=True))
    before = nnx.state(found, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    trainer = BACKEND.trainer(found, SETTINGS)
    assert all("lora" in name for name in trainer.shapes())
    losses = [trainer.step(TOKENS)[0] for _ in range(3)]
    assert losses[2] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))), before)


def test_adapters_compile_once():
    def adapted(seed):
        found = mc.build(CONFIG, backend="jax", device="cpu", seed=seed)
        lora("in_proj")(found)
        return found

    compiled(adapted(0))
    programs = decoding._prefill, decoding._advance
    sizes = [program._cache_size() for program in programs]
    for seed in range(3):
        compiled(adapted(seed))
    assert [program._cache_size() for program in programs] == sizes


# --- the framework's own transformations -----------------------------------------------------------


def test_transformations_of_the_framework_see_the_adapter():
    found = built(SHALLOW)
    mixer = found.backbone.layers[0].mixer
    mixer.dt_proj = nnx.LoRA(1, 2, 16, base_module=mixer.dt_proj, rngs=nnx.Rngs(0))
    mixer.dt_proj.lora_b[...] += 0.3
    wanted = found(IDS).logits
    assert relative_l2(nnx.jit(lambda model, ids: model(ids).logits)(found, IDS), wanted) < 1e-5
    only = nnx.DiffState(0, nnx.LoRAParam)
    gradients = nnx.grad(training.loss, argnums=only)(found, IDS)
    assert {path[-1] for path, _ in nnx.to_flat_state(gradients)} == {"lora_a", "lora_b"}
    others = [nnx.grad(nnx.remat(training.loss), argnums=only)(found, IDS)]
    graph, adapters, rest = nnx.split(found, nnx.LoRAParam, ...)

    @jax.checkpoint
    def loss(adapters):
        return training.loss(nnx.merge(graph, adapters, rest), IDS)

    others.append(jax.grad(loss)(adapters))
    found.remat = True
    others.append(nnx.value_and_grad(training.loss, argnums=only)(found, IDS)[1])
    for other in others:
        for one, another in zip(jax.tree.leaves(other), jax.tree.leaves(gradients), strict=True):
            assert relative_l2(one, another) < 1e-5


# --- what cannot be saved --------------------------------------------------------------------------


def value_head(found):
    found.value_head = nnx.Linear(8, 1, rngs=nnx.Rngs(0))


def lm_head(found):
    before = found(IDS).logits
    found.lm_head = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    found.lm_head.bias[...] += 1.0
    assert relative_l2(found(IDS).logits, before) > 0.1  # it acts


def feed_forward(found):
    found.backbone.layers[0].feed_forward = nnx.data(nnx.Sequential(nnx.relu))


def nonlinear(found):
    mixer = found.backbone.layers[0].mixer
    mixer.x_proj = nnx.Sequential(mixer.x_proj, nnx.relu)


class Own(nnx.Embed):
    def attend(self, query):
        return 2 * super().attend(query)


def own_attend(found):
    inside = found.backbone.embeddings
    found.backbone.embeddings = Own(16, 8, rngs=nnx.Rngs(0))
    found.backbone.embeddings.embedding = inside.embedding


def setting(found):
    found.backbone.layers[0].norm.eps = 0.1


LOST = {"value_head": (value_head, r"value_head\.bias, value_head\.kernel", "cannot be merged")}
LOST |= {"lm_head": (lm_head, r"lm_head \(Linear\)", "cannot be merged")}
LOST |= {"feed_forward": (feed_forward, r"backbone\.layers\.0\.feed_forward \(Sequential\)", "cannot be merged")}
LOST |= {"nonlinear": (nonlinear, r"layers\.0\.mixer\.x_proj \(Sequential\)", "x_proj does not compute what a weight")}
LOST |= {"own attend": (own_attend, r"backbone\.embeddings \(Own\)", "an `attend` of its own")}
LOST |= {"eps": (setting, r"layers\.0\.norm \(RMSNorm with another eps\)", "norm does not compute what a weight")}


@pytest.mark.parametrize("name", LOST)
def test_what_the_files_cannot_hold_is_refused_by_name(name, tmp_path):
    change, held, merged = LOST[name]
    found = built(SHALLOW)
    change(found)
    with pytest.raises(ValueError, match=rf"the model has .*{held}.*; where they are adapters, merge them first"):
        mc.save(found, tmp_path / "model")
    with pytest.raises(ValueError, match=merged):
        mc.save(found, tmp_path / "model", merge=True)
    with pytest.raises(ValueError, match=held):
        BACKEND.loss_and_gradients(found, TOKENS)
    with pytest.raises(ValueError, match=held):
        mc.train(found, np.zeros(400, np.int32), SETTINGS, checkpoint=tmp_path / "run")
    assert not list(tmp_path.iterdir())
