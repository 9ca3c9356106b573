"""What JAX's models are given, and what becomes of them: arrays of others, copies, wider dtypes, state that changes."""

import copy
import pickle

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.sampling import Sampling
from mamba_core.spec.tolerances import relative_l2
from mamba_core.training import TrainSettings

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
jnp = jax.numpy

from mamba_core.backends.jax import training  # noqa: E402 (after the packages that they need)

CONFIG = mc.MambaConfig(d_model=8, n_layer=2, vocab_size=16, d_state=4, initializer_range=0.5)
IDS = np.random.default_rng(0).integers(0, 16, (2, 9)).astype(np.int32)
SETTINGS = TrainSettings(steps=3, warmup_steps=0, learning_rate=0.01)
BACKEND = registry.get("jax")


@pytest.fixture
def built():
    return mc.build(CONFIG, backend="jax", device="cpu")


# --- what it is given ------------------------------------------------------------------------------


def test_numpy_is_taken_and_other_values_are_refused_by_name(built):
    wanted = built(jnp.asarray(IDS), mask=jnp.asarray(IDS > 2), segment_ids=jnp.asarray(IDS > 2).astype(int)).logits
    found = built(IDS.astype(np.int64), mask=IDS > 2, segment_ids=(IDS > 2).astype(np.int64)).logits
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(TypeError, match=r"input_ids is list; expected a jax\.Array or a NumPy array"):
        built(IDS.tolist())
    with pytest.raises(TypeError, match="mask is list"):
        built(IDS, mask=[[True] * 9] * 2)
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"input_ids is torch\.Tensor"):
        built(torch.from_numpy(IDS))
    with pytest.raises(TypeError, match=r"inputs_embeds is torch\.Tensor"):
        built(inputs_embeds=torch.zeros(2, 3, 8))


def test_ids_that_do_not_fit_32_bits_give_nan(built):
    ids = np.array([[1, 2**32 + 1, 2]])
    logits = built(ids).logits
    assert jnp.isfinite(logits[:, 0]).all()
    assert jnp.isnan(logits[:, 1]).all()


def test_a_prefill_takes_embeddings(built):
    embeds = np.asarray(built.backbone.embeddings(jnp.asarray(IDS)))
    mask = np.arange(9) >= np.array([[0], [3]])
    wanted, found = (BACKEND.prefill(built, given, mask) for given in (IDS, embeds))
    assert relative_l2(found.logits, wanted.logits) < 1e-6
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found.state, wanted.state)


# --- copies ----------------------------------------------------------------------------------------

COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "deepcopy": copy.deepcopy, "clone": nnx.clone}
COPIES |= {"split and merged": lambda model: nnx.merge(*nnx.split(model))}


def restored(model):
    """As a checkpoint of arrays by name does it."""
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    other = mc.build(CONFIG, backend="jax", device="cpu", seed=3)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(other, state)
    return other


COPIES |= {"restored": restored}


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_the_model(way, kernels):
    built = mc.build(CONFIG, backend="jax", device="cpu", kernels=kernels)
    out = built(IDS)
    other = COPIES[way](built)
    if way != "restored":
        assert BACKEND.explain(other, 2, 1) == BACKEND.explain(built, 2, 1)
    np.testing.assert_array_equal(other(IDS).logits, out.logits) if way != "restored" or kernels == "auto" else None
    assert other.is_built
    assert BACKEND.foreign(other) == ((), {}, {})
    state = pickle.loads(pickle.dumps(out.state))
    np.testing.assert_array_equal(other(IDS, copy.deepcopy(state)).logits, other(IDS, out.state).logits)


# --- float64 ---------------------------------------------------------------------------------------


def test_float64_is_refused(built):
    with pytest.raises(ValueError, match="dtype is 'float64'"):
        mc.build(CONFIG, backend="jax", dtype="float64")
    with jax.enable_x64(True):
        graph, state = nnx.split(built)
        wide = nnx.merge(graph, jax.tree.map(lambda value: value.astype(jnp.float64), state))
        for call in (
            lambda: wide(IDS),
            lambda: BACKEND.prefill(wide, IDS, np.ones(IDS.shape, bool)),
            lambda: training.loss(wide, jnp.asarray(IDS)),
        ):
            with pytest.raises(TypeError, match=r"backbone\.\S+ is float64, and the model computes in float32"):
                call()


def test_a_model_in_float32_is_the_same_where_64_bits_are_enabled(built):
    wanted = built(IDS)
    tokens = mc.generate(built, [[1, 2], [3]], max_new_tokens=3).tokens
    loss = BACKEND.trainer(copy.deepcopy(built), SETTINGS).step(IDS)[0]
    with jax.enable_x64(True):
        again = mc.build(CONFIG, backend="jax", device="cpu")
        out = again(IDS)
        assert out.logits.dtype == jnp.float32
        np.testing.assert_allclose(out.logits, wanted.logits, rtol=1e-5, atol=1e-6)
        for value, narrow in zip(jax.tree.leaves(out.state), jax.tree.leaves(wanted.state), strict=True):
            assert value.dtype == narrow.dtype
        assert mc.generate(again, [[1, 2], [3]], max_new_tokens=3).tokens == tokens
        assert BACKEND.trainer(again, SETTINGS).step(IDS)[0] == pytest.approx(loss, rel=1e-6)


# --- state of a module that a call changes ---------------------------------------------------------


class Noisy(nnx.Module):
    """A layer with dropout before it and running means behind it."""

    def __init__(self, inside, size):
        self.inside, self.dropout = inside, nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.mean = nnx.BatchStat(jnp.zeros(size))

    def __call__(self, x):
        y = self.inside(self.dropout(x))
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(y).mean((0, 1))
        return y


def noisy(built):
    mixer = built.backbone.layers[1].mixer
    mixer.in_proj = Noisy(mixer.in_proj, 32)
    return mixer.in_proj


def test_remat_draws_the_same_mask_and_keeps_what_a_call_changes():
    found = []
    for remat in (False, True):
        built = mc.build(CONFIG, backend="jax", device="cpu")
        layer = noisy(built)
        built.remat = remat
        gradient = nnx.value_and_grad(lambda model: (model(IDS).logits ** 2).mean())
        runs = [gradient(built) for _ in range(2)]
        assert runs[0][0] != runs[1][0]  # another mask
        assert layer.dropout.rngs.count[...] == 2
        found.append((runs, layer.mean[...]))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert relative_l2(one, other) < 1e-5


def test_what_a_call_changes_outlives_prefill_decoding_and_training(built):
    layer = noisy(built)
    before = layer.mean[...]
    prefilled = BACKEND.prefill(built, IDS, np.ones(IDS.shape, bool))
    assert (layer.dropout.rngs.count[...], jnp.abs(layer.mean[...] - before).max() > 0) == (1, True)
    again = BACKEND.prefill(built, IDS, np.ones(IDS.shape, bool))
    assert relative_l2(again.logits, prefilled.logits) > 1e-4
    list(BACKEND.decode(built, prefilled, Sampling(), limit=4))
    assert layer.dropout.rngs.count[...] == 2 + 3
    trainer, before = BACKEND.trainer(built, SETTINGS), layer.mean[...]
    for _ in range(2):
        trainer.step(IDS)
    assert layer.dropout.rngs.count[...] == 5 + 2
    assert jnp.abs(layer.mean[...] - before).max() > 0
    BACKEND.layer(built, "backbone.layers.1.mixer.in_proj", np.ones((1, 1, 8), np.float32))
    assert layer.dropout.rngs.count[...] == 7
    built.eval()
    quiet = [BACKEND.prefill(built, IDS, np.ones(IDS.shape, bool)).logits for _ in range(2)]
    np.testing.assert_array_equal(*quiet)


class Counting(nnx.Module):
    def __init__(self, inside):
        self.inside, self.calls = inside, 0

    def __call__(self, x):
        self.calls += 1
        return self.inside(x)


class Rescaled(nnx.Module):
    def __init__(self, inside):
        self.inside = inside

    def __call__(self, x):
        self.inside.kernel[...] = self.inside.kernel[...] * 0.9
        return self.inside(x)


@pytest.mark.parametrize(("kind", "message"), [(Counting, "attributes of its modules: calls"), (Rescaled, "nnx.Param")])
def test_what_cannot_leave_a_program_is_refused_by_name(built, kind, message):
    mixer = built.backbone.layers[1].mixer
    mixer.x_proj = kind(mixer.x_proj)
    with pytest.raises(TypeError, match=rf"a call of LanguageModel changes .*{message}"):
        BACKEND.prefill(built, IDS, np.ones(IDS.shape, bool))
    with pytest.raises(TypeError, match=rf"a call of LanguageModel changes .*{message}"):
        BACKEND.trainer(built, SETTINGS).step(IDS)
    built.remat = True
    with pytest.raises(TypeError, match=rf"a call of Block changes .*{message}"):
        built(IDS)
