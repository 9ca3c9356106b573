"""Modules of JAX that somebody put in the place of ours: they are called, or refused by name."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
jnp = jax.numpy

from mamba_core.backend import LayerState  # noqa: E402 (after the packages that they need)
from mamba_core.backends.jax import weights  # noqa: E402
from mamba_core.backends.jax.blocks import RMSNorm  # noqa: E402
from mamba_core.backends.jax.mixers import Options, s6  # noqa: E402
from mamba_core.backends.jax.ops.rms_norm import rms_norm as normalised  # noqa: E402

CONFIG = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=24, initializer_range=0.3)
UNTIED = mc.MambaConfig(d_model=16, n_layer=1, vocab_size=24, initializer_range=0.3, tie_embeddings=False)
IDS = jnp.arange(10).reshape(2, 5)


def logits(model):
    """Of a call, and of its last position by a prefill and a step."""
    whole = model(IDS).logits
    before = registry.get("jax").prefill(model, np.asarray(IDS[:, :4]), np.ones((2, 4), bool))
    assert relative_l2(before.logits, whole[:, 3, :24]) < 1e-5
    assert relative_l2(model(IDS[:, 4:], before.state).logits, whole[:, 4:]) < 1e-5
    return whole


class Wrapped(nnx.Module):
    """Twice what the wrapped mixer gives."""

    def __init__(self, mixer):
        self.inside = mixer

    def __call__(self, hidden, state, call):
        hidden, state = self.inside(hidden, state, call)
        return 2 * hidden, state


class Lookup(nnx.Module):
    """An embedding that has nothing of `nnx.Embed` but its call and `attend`."""

    def __init__(self, embed):
        self.table = embed

    def __call__(self, ids):
        return 2 * self.table(ids)

    def attend(self, hidden):
        return 3 * self.table.attend(hidden)


def rms_norm(model):
    model.backbone.layers[1].norm = nnx.RMSNorm(16, rngs=nnx.Rngs(0), scale_init=nnx.initializers.constant(2.0))


def layer_norm(model):
    model.backbone.layers[1].norm = nnx.LayerNorm(16, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))


def final_norm(model):
    model.backbone.norm_f = nnx.LayerNorm(16, rngs=nnx.Rngs(0))


def wrapped_mixer(model):
    model.backbone.layers[1].mixer = Wrapped(model.backbone.layers[1].mixer)


def adapter(name, size):
    def change(model):
        mixer = model.backbone.layers[1].mixer
        layer = getattr(mixer, name)
        lora = nnx.LoRA(layer.in_features, 4, size, base_module=layer, rngs=nnx.Rngs(0))
        lora.lora_b[...] += 1.0
        setattr(mixer, name, lora)

    return change


def embedding(model):
    model.backbone.embeddings = Lookup(model.backbone.embeddings)


CHANGES = {"RMSNorm": rms_norm, "LayerNorm": layer_norm, "final norm": final_norm, "wrapped mixer": wrapped_mixer}
CHANGES |= {"LoRA of in_proj": adapter("in_proj", 64), "LoRA of x_proj": adapter("x_proj", 33)}
CHANGES |= {"LoRA of out_proj": adapter("out_proj", 16), "embedding": embedding}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_replaced_is_called(change):
    model = mc.build(CONFIG, backend="jax", device="cpu")
    before = logits(model)
    change(model)
    assert relative_l2(logits(model), before) > 1e-2


def test_a_head_that_is_replaced_is_called():
    model = mc.build(UNTIED, backend="jax", device="cpu")
    inside, before = model.lm_head, logits(model)
    model.lm_head = nnx.Sequential(inside, lambda value: 2 * value)
    assert model.head_weight() is None
    assert relative_l2(logits(model), 2 * before) < 1e-5


# --- a layer of flax with another setting --------------------------------------------------------------


def doubling(arrays, dtype=None, inexact=True):
    """A `promote_dtype` that doubles a layer's first operand, its input."""
    first, *rest = arrays
    return (2 * first, *rest)


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "out_proj"])
@pytest.mark.parametrize("length", [1, 5])
def test_a_layer_that_is_called_computes_with_its_settings(name, length):
    model = mc.build(CONFIG, backend="jax", device="cpu")
    whole = model(IDS[:, :length]).logits
    layer = getattr(model.backbone.layers[1].mixer, name)
    layer.promote_dtype = doubling
    changed = logits(model)[:, :length]
    assert relative_l2(changed, whole) > 1e-4
    assert relative_l2(model(IDS[:, :length]).logits, changed) < 1e-5
    scaled = mc.build(CONFIG, backend="jax", device="cpu")
    getattr(scaled.backbone.layers[1].mixer, name).kernel[...] *= 2
    assert relative_l2(logits(scaled)[:, :length], changed) < 1e-5


@pytest.mark.parametrize("settings", [{"dtype": jnp.bfloat16}, {"precision": None}, {"preferred_element_type": "f2"}])
def test_no_way_reads_the_weights_of_a_layer_with_another_setting(settings):
    model = mc.build(CONFIG, backend="jax", device="cpu")
    for name, value in settings.items():
        setattr(model.backbone.layers[0].mixer.in_proj, name, value)
    assert registry.get("jax").explain(model, 2, 1)[0][:3] == (0, 0, "plain")


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_another_setting_is_called(tied):
    model = mc.build(CONFIG if tied else UNTIED, backend="jax", device="cpu")
    before = model.head(jnp.ones((1, 16)))
    (model.backbone.embeddings if tied else model.lm_head).promote_dtype = doubling
    assert relative_l2(model.head(jnp.ones((1, 16))), 2 * before) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modes_and_jit_of_flax_change_no_way(dtype):
    model = mc.build(CONFIG, backend="jax", device="cpu", dtype=dtype)
    ways = registry.get("jax").explain(model, 2, 1)
    for change in (model.eval, model.train):
        change()
        assert registry.get("jax").explain(model, 2, 1) == ways
    wanted = model(IDS[:, :1]).logits
    assert relative_l2(nnx.jit(lambda model: model(IDS[:, :1]).logits)(model), wanted) < 2e-2
    if not library.missing():
        assert [way[:3] for way in ways] == [(0, 1, "native_step")]


class Owner(nnx.Module):
    """One module of each kind that has a rule for its weight, and one that brings its own."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (5, 7), feature_group_count=2, rngs=rngs)
        self.signal = nnx.Conv(6, 6, 4, feature_group_count=6, rngs=rngs)
        self.own = type("Own", (nnx.Module,), {"weight_leaf": "taps"})()
        self.own.taps = nnx.Param(jnp.zeros((2, 5)))


def test_weights_have_the_axes_of_their_module():
    """A 2-D convolution's kernel is (*k, in / groups, out), where the table has (out, in / groups, *k)."""
    model = Owner()
    shapes = {"linear": (3, 2), "conv": (6, 2, 5, 7), "signal": (6, 1, 4), "own": (2, 5)}
    for name, shape in shapes.items():
        table = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        module, leaf = weights.place(model, f"{name}.weight")
        stored = weights.entering(model, f"{name}.weight", table)
        assert stored.shape == getattr(module, leaf).shape, name
        np.testing.assert_array_equal(weights.canonical(model, f"{name}.weight", stored), table)
    table = np.arange(6 * 2 * 5 * 7).reshape(6, 2, 5, 7)
    assert weights.entering(model, "conv.weight", table)[3, 4, 1, 2] == table[2, 1, 3, 4]


def test_positions_are_computed_once_a_call():
    """Of a masked and packed batch: one cumulative maximum and two sorts, however many layers there are."""
    config = mc.MambaConfig(d_model=8, n_layer=6, vocab_size=24)
    model = mc.build(config, backend="jax", device="cpu", kernels="chunked")
    graph, parameters = nnx.split(model)

    def forward(parameters, ids, mask, segment_ids):
        return nnx.merge(graph, parameters)(ids, mask=mask, segment_ids=segment_ids).logits

    text = jax.jit(forward).lower(parameters, IDS, IDS > 2, IDS // 3).as_text(dialect="stablehlo")
    assert text.count("call @_restarts") == 1
    assert text.count("call @compaction") == 1


def test_explain_names_each_run_of_layers():
    model = mc.build(mc.MambaConfig(d_model=16, n_layer=5, vocab_size=24), backend="jax", device="cpu")
    wrapped = model.backbone.layers[2]
    wrapped.mixer = Wrapped(wrapped.mixer)
    explain = registry.get("jax").explain
    if library.missing():
        pytest.skip(f"no native kernels: {library.missing()}")
    (first, last, way, reasons), *_ = explain(model, 2, 9)
    assert (first, last, way, list(reasons)) == (0, 4, "plain", ["native_step"])
    runs = explain(model, 2, 1)
    assert (2, 2, "plain", {"native_step": "it was not written for Wrapped"}) in runs
    subclassed = model.backbone.layers[0].mixer
    subclassed.__class__ = type("Changed", (type(subclassed),), {})
    assert explain(model, 2, 1)[0][:3] == (0, 0, "plain")


class Falcon(nnx.Module):
    """A mixer made of the functions of `s6`, with norms between x_proj and dt_proj."""

    width = s6.width

    def __init__(self, config, options):
        s6.add_parameters(self, config, options)

    def __call__(self, hidden, state, call):
        x, z = s6.project_in(self, hidden, call)
        y, state = self._mix(x, z, state, call)
        return s6.project_out(self, y, call), state

    def last_position(self, hidden, state, call):
        if (projected := s6.project_for_last(self, hidden)) is None:
            return None
        x, z = projected
        y, state = self._mix(x, None, state, call)
        return self.out_proj(y[:, -1:] * jax.nn.silu(z)), state

    def _mix(self, x, z, state, call):
        x, conv = s6.convolve(self, x, state, call)
        projected = zip(("dt", "B", "C"), s6.select(self, x, call), strict=True)
        dt, B, C = (call.observe(f"{name}_norm", normalised(v, None, 1e-6, v.dtype)) for name, v in projected)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state, call)
        return y, LayerState(conv, ssm)


def falcon(model):
    block = model.backbone.layers[1]
    mixer = Falcon(CONFIG, Options("float32", model.policy, nnx.Rngs(0)))
    nnx.update(mixer, nnx.state(block.mixer))
    block.mixer = mixer


class FeedForward(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(16, 16, rngs=nnx.Rngs(0))

    def __call__(self, hidden, call):
        return call.observe("feed_forward", self.layer(hidden))


def feed_forward(model):
    block = model.backbone.layers[1]
    block.norm2, block.feed_forward = nnx.data(RMSNorm(16, 1e-5, "float32")), nnx.data(FeedForward())


@pytest.mark.parametrize(("change", "node"), [(falcon, "dt_norm"), (feed_forward, "feed_forward")])
def test_another_architecture_shares_the_fast_paths_that_it_names(change, node):
    model = mc.build(CONFIG, backend="jax", device="cpu")
    before, seen = logits(model), {}
    change(model)
    assert relative_l2(logits(model), before) > 1e-3
    model(IDS, observe=seen.__setitem__)
    assert f"layers.1.{node}" in seen
    if not library.missing():
        ways = [run[:3] for run in registry.get("jax").explain(model, 2, 1)]
        assert ways == [(0, 0, "native_step"), (1, 1, "plain")]
