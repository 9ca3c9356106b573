"""The training step of a backend against AdamW written out in float64."""

import functools

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import architectures, registry
from mamba_core.evaluation import HeldOut
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2
from mamba_core.tasks.lm import cross_entropy
from mamba_core.training import TrainSettings, batch

from .cases import bases

CONFIG = bases()["mamba"]
SETTINGS = TrainSettings(steps=20, batch_size=2, length=16, learning_rate=1e-2, warmup_steps=4, clip_norm=0.5)
DATA = np.random.default_rng(0).integers(0, 6, 500) ** 2


@pytest.fixture(params=[name for name, own in bases().items() if architectures.traits(own).causal], scope="module")
def config(request):
    return bases()[request.param]


@functools.cache
def reference_run(config):
    """(losses, gradient norms, parameters, first and second moments) of all the steps."""
    table, s = parameter_table(config), SETTINGS
    values = {name: value.astype(np.float64) for name, value in initial_values(config, 1)}
    m = {name: np.zeros_like(value) for name, value in values.items()}
    v = {name: np.zeros_like(value) for name, value in values.items()}
    losses, norms = [], []
    for step in range(s.steps):
        tokens = batch(DATA % config.vocab_size, s, step)
        model = ReferenceModel(config, values)
        loss, dlogits = cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:])
        gradients, _ = model.vjp(dlogits, tokens[:, :-1])
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        losses.append(loss)
        norms.append(norm)
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, s.clip_norm / norm)
            m[name] = s.beta1 * m[name] + (1 - s.beta1) * gradient
            v[name] = s.beta2 * v[name] + (1 - s.beta2) * gradient**2
            update = m[name] / (1 - s.beta1 ** (step + 1))
            update /= np.sqrt(v[name] / (1 - s.beta2 ** (step + 1))) + s.eps
            decay = s.weight_decay * values[name] if table[name].decay else 0.0
            values[name] = values[name] - s.rate(step) * (update + decay)
    return losses, norms, values, m, v


def test_twenty_steps_equal_the_reference(backend, config):
    """Within 1e-4 of the float64 run, so that the backends are within that of each other."""
    losses, norms, values, m, v = reference_run(config)
    model = mc.build(config, backend=backend.name, seed=1)
    trainer = backend.trainer(model, SETTINGS)
    found = [trainer.step(batch(DATA % config.vocab_size, SETTINGS, step)) for step in range(SETTINGS.steps)]
    np.testing.assert_allclose([loss for loss, _ in found], losses, atol=5e-5)
    np.testing.assert_allclose([norm for _, norm in found], norms, rtol=1e-3)
    assert losses[-1] < losses[0] - 0.5
    state = trainer.state()
    assert int(state["step"]) == SETTINGS.steps
    shapes = trainer.shapes()
    assert set(state) == {"step", *(f"{moment}.{name}" for name in shapes for moment in "mv")}
    assert all(state[f"{moment}.{name}"].shape == shape for name, shape in shapes.items() for moment in "mv")
    for name, value in backend.parameters(model).items():
        assert np.abs(value - values[name]).max() < 1e-3, name
        np.testing.assert_allclose(state[f"m.{name}"], m[name], atol=2e-4 * max(1e-3, np.abs(m[name]).max()) + 1e-6)
        np.testing.assert_allclose(state[f"v.{name}"], v[name], atol=2e-3 * np.abs(v[name]).max())
        assert state[f"m.{name}"].dtype == np.float32


def test_the_optimizer_moves_between_backends(backend, config):
    """Ten steps of the reference's state, loaded: the next step's loss and norm are the reference's."""
    model = mc.build(config, backend=backend.name, seed=1)
    first = backend.trainer(model, SETTINGS)
    for step in range(10):
        first.step(batch(DATA % config.vocab_size, SETTINGS, step))
    state = {name: np.asarray(value) for name, value in first.state().items()}
    losses, *_ = reference_run(config)
    for other in registry.PACKAGES:
        if registry.missing_packages(other):
            continue
        there = registry.get(other)
        copy = there.build(config, backend.parameters(model).items())
        trainer = there.trainer(copy, SETTINGS)
        trainer.load_state(state)
        for step in range(10, 14):
            loss, _ = trainer.step(batch(DATA % config.vocab_size, SETTINGS, step))
            assert loss == pytest.approx(losses[step], abs=1e-4), (other, step)


def test_half_precision_trains(backend):
    model = mc.build(CONFIG, backend=backend.name, dtype="bfloat16", seed=1)
    history = mc.train(model, DATA, SETTINGS)
    assert history[-1]["loss"] < history[0]["loss"] - 0.4
    for name, value in backend.parameters(model).items():
        assert value.dtype.name == parameter_table(CONFIG)[name].dtype("bfloat16")


def test_the_loss_on_held_out_data_is_the_reference_s(backend, config):
    """Of 59 tokens in four windows and two batches; the last window counts 11, and fills the last batch alone."""
    data, total = DATA[:60] % config.vocab_size, 0.0
    reference = ReferenceModel(config, dict(initial_values(config, 1)))
    for start, first in ((0, 0), (16, 0), (32, 0), (43, 5)):
        tokens = data[start : start + 17][None]
        loss, _ = cross_entropy(reference(tokens[:, :-1]).logits[:, first:], tokens[:, 1 + first :])
        total += loss * (16 - first)
    trainer = backend.trainer(mc.build(config, backend=backend.name, seed=1), SETTINGS)
    found = HeldOut(data, length=16, batch_size=3, steps=20, every=0).loss(trainer, lambda: False)
    assert found == pytest.approx(total / 59, abs=5e-6)


@pytest.mark.parametrize("length", [0, 1])
def test_tokens_with_nothing_to_predict_are_refused(backend, length):
    model = mc.build(CONFIG, backend=backend.name)
    tokens = np.zeros((2, length), np.int32)
    uses = [backend.loss_and_gradients, lambda model, tokens: backend.trainer(model, SETTINGS).step(tokens)]
    counts = np.ones((2, max(0, length - 1)), bool)
    uses += [lambda model, tokens: backend.trainer(model, SETTINGS).evaluate(tokens, counts)]
    for use in uses:
        with pytest.raises(ValueError, match=r"tokens has shape \(2, \d\); expected .*two positions"):
            use(model, tokens)


def test_tokens_outside_the_vocabulary_are_refused(backend):
    model = mc.build(CONFIG, backend=backend.name)
    for tokens in (np.full(100, CONFIG.vocab_size), np.full(100, -1)):
        with pytest.raises(ValueError, match=f"vocab_size is {CONFIG.vocab_size}"):
            mc.train(model, tokens, SETTINGS)
    with pytest.raises(ValueError, match="16"):
        mc.train(model, DATA[:10], SETTINGS)


@pytest.mark.parametrize("kernels", ["auto", "sequential"])
def test_recomputed_blocks_have_the_same_gradients(backend, kernels):
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 21)).astype(np.int32)
    mask = np.arange(21) >= np.array([[0], [6]])
    model = mc.build(CONFIG, backend=backend.name, kernels=kernels)
    loss, wanted = backend.loss_and_gradients(model, tokens, mask)
    model.remat = True
    assert model.remat
    again, gradients = backend.loss_and_gradients(model, tokens, mask)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, value in wanted.items():
        assert relative_l2(gradients[name], value) < 1e-6, name
