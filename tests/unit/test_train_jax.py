"""JAX's trainer, which looks through the model's modules once."""

import copy

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.evaluation import HeldOut
from mamba_core.training import TrainSettings

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402 (after the package that it needs)
from flax import nnx  # noqa: E402

CONFIG = mc.MambaConfig(d_model=8, n_layer=2, vocab_size=11)
SETTINGS = TrainSettings(steps=10, warmup_steps=1, learning_rate=1e-2)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9)).astype(np.int32)


def trained(change=lambda model: None):
    """(losses of four steps, trainer, its programs before and after); the model is changed after two."""
    model = mc.build(CONFIG, backend="jax")
    trainer = registry.get("jax").trainer(model, SETTINGS)
    losses, before = [trainer.step(TOKENS)[0] for _ in range(2)], trainer.update
    change(model)
    return losses + [trainer.step(TOKENS)[0] for _ in range(2)], trainer, (before, trainer.update)


def test_recomputing_may_begin_between_two_steps():
    def recompute(model):
        model.remat = True

    losses, trainer, (before, after) = trained(recompute)
    assert after is not before
    assert trainer.model.remat
    expected, _, (before, after) = trained()
    assert after is before
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_a_value_may_change_between_two_steps():
    def double(model):
        model.backbone.norm_f.scale[...] = 2 * model.backbone.norm_f.scale[...]

    losses, *_ = trained(double)
    expected, *_ = trained()
    assert losses[:2] == expected[:2]
    assert abs(losses[2] - expected[2]) > 1e-4


def test_a_variable_may_be_replaced_between_two_steps():
    def replace(model):
        model.backbone.norm_f.scale = nnx.Param(2 * model.backbone.norm_f.scale[...])

    losses, trainer, _ = trained(replace)
    assert abs(losses[2] - trained()[0][2]) > 1e-4
    assert losses[3] != losses[2]
    after = np.array(trainer.model.backbone.norm_f.scale[...])
    trainer.step(TOKENS)
    assert (after != np.array(trainer.model.backbone.norm_f.scale[...])).any()


def test_a_copy_trains_its_own_model():
    _, trainer, _ = trained()
    other = copy.deepcopy(trainer)
    before = np.array(trainer.model.backbone.norm_f.scale[...])
    losses = [other.step(TOKENS)[0] for _ in range(2)]
    np.testing.assert_array_equal(trainer.model.backbone.norm_f.scale[...], before)
    assert losses == [trainer.step(TOKENS)[0] for _ in range(2)]


def test_parameters_that_were_added_are_trained():
    """They decay if they have two axes, and nothing else moves these, which nobody uses."""
    model = mc.build(CONFIG, backend="jax")
    model.row, model.table = nnx.Param(jnp.arange(3.0)), nnx.Param(jnp.ones((2, 2)))
    model.counts, model.fixed = nnx.Param(jnp.arange(3)), nnx.BatchStat(jnp.ones(3))
    trainer = registry.get("jax").trainer(model, SETTINGS)
    assert {name: shape for name, shape in trainer.shapes().items() if "backbone" not in name} == {
        "row": (3,),
        "table": (2, 2),
    }
    losses = [trainer.step(TOKENS)[0] for _ in range(4)]
    np.testing.assert_allclose(losses, trained()[0], rtol=1e-6)
    np.testing.assert_array_equal(model.row[...], [0, 1, 2])
    np.testing.assert_array_equal(model.fixed[...], [1, 1, 1])
    assert (model.table[...] < 1).all()


def adapted():
    """A model with two adapters; one layer is wrapped so that its table parameter has a path of its own."""
    model = mc.build(CONFIG, backend="jax")
    for layer, block in enumerate(model.backbone.layers):
        inside = block.mixer.in_proj
        block.mixer.in_proj = nnx.LoRA(8, 2, 32, base_module=inside, rngs=nnx.Rngs(layer))
    return model


def test_adapters_alone_are_trained_and_their_state_goes_on():
    model = adapted()
    before = {path: np.array(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}
    trainer = registry.get("jax").trainer(model, SETTINGS)
    names = [f"backbone.layers.{layer}.mixer.in_proj.lora_{leaf}" for layer in (0, 1) for leaf in "ab"]
    assert list(trainer.shapes()) == names
    losses = [trainer.step(TOKENS)[0] for _ in range(2)]
    state = trainer.state()
    assert set(state) == {"step", *(f"{moment}.{name}" for moment in "mv" for name in names)}
    for path, value in nnx.to_flat_state(nnx.state(model)):
        assert (np.array(value[...]) != before[path]).any() == ("lora" in path[-1]), path
        assert type(value) is (nnx.LoRAParam if "lora" in path[-1] else nnx.Param)
    other = registry.get("jax").trainer(copy.deepcopy(model), SETTINGS)
    other.load_state(state)
    rest = [trainer.step(TOKENS)[0] for _ in range(2)]
    assert [other.step(TOKENS)[0] for _ in range(2)] == rest
    assert rest[-1] < losses[0]


def test_a_model_with_nothing_trainable_is_refused():
    model = mc.build(CONFIG, backend="jax")
    frozen = jax.tree.map(
        lambda variable: nnx.BatchStat(variable[...]),
        nnx.state(model),
        is_leaf=lambda value: isinstance(value, nnx.Variable),
    )
    for path, variable in nnx.to_flat_state(frozen):
        owner = model
        for key in path[:-1]:
            owner = owner[key] if isinstance(key, int) else getattr(owner, key)
        setattr(owner, path[-1], variable)
    with pytest.raises(ValueError, match="nothing of the model is trainable"):
        registry.get("jax").trainer(model, SETTINGS)


def test_an_evaluation_is_compiled_once_and_again_for_another_method(monkeypatch):
    """The last batch has fewer windows than the others."""
    model = mc.build(CONFIG, backend="jax")
    trainer = registry.get("jax").trainer(model, SETTINGS)
    held = HeldOut(np.arange(70) % 11, length=8, batch_size=2, steps=1, every=0)
    assert len({counts.sum() for _, counts in held.batches()}) > 1
    trainer.step(TOKENS)
    losses = [held.loss(trainer, lambda: False) for _ in range(2)]
    assert losses[0] == losses[1]
    assert trainer.evaluation._cache_size() == 1
    trainer.step(TOKENS)
    assert held.loss(trainer, lambda: False) != losses[0]
    assert trainer.evaluation._cache_size() == 1
    monkeypatch.setattr(type(model.backbone.norm_f), "__call__", lambda self, x: 0 * x)
    assert held.loss(trainer, lambda: False) == pytest.approx(np.log(model.config.padded_vocab_size))


def test_an_update_is_compiled_once_for_adapters():
    first, second = (registry.get("jax").trainer(adapted(), SETTINGS) for _ in range(2))
    sizes = []
    for trainer in (first, second):
        for _ in range(2):
            trainer.step(TOKENS)
        sizes.append(trainer.update._cache_size())
    assert first.update is second.update
    assert sizes[0] == sizes[1]
