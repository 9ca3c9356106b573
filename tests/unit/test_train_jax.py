"""JAX's trainer, which looks through the model's modules once."""

import copy

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
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


def test_variables_of_others_stay_as_they_are():
    model = mc.build(CONFIG, backend="jax")
    model.other = nnx.Param(jnp.arange(3.0))
    trainer = registry.get("jax").trainer(model, SETTINGS)
    losses = [trainer.step(TOKENS)[0] for _ in range(4)]
    assert losses == trained()[0]
    np.testing.assert_array_equal(model.other[...], [0, 1, 2])
