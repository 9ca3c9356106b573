"""Models that somebody changed, on every backend: what acts, what is refused, and what a save says of it."""

import warnings

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.registry import installed
from mamba_core.spec.tolerances import relative_l2

SIZES = {"d_model": 16, "n_layer": 2, "vocab_size": 64, "initializer_range": 0.3}
KINDS = (mc.MambaConfig, mc.MiniMambaConfig, mc.FalconMambaConfig)
IDS = np.arange(18).reshape(2, 9).astype(np.int32)
CALL = {"torch": "forward", "mlx": "__call__", "jax": "__call__"}


@pytest.fixture(params=installed())
def name(request):
    return request.param


def built(name, kind=mc.MambaConfig, **settings):
    return mc.build(kind(**SIZES), backend=name, **settings)


def logits(model):
    backend = registry.get(model.backend)
    found = model(backend.from_numpy(IDS, device=model.device)).logits
    return backend.to_numpy(found.detach() if model.backend == "torch" else found)


def saved(model, path, **settings):
    """The distance of what is loaded again, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mc.save(model, path, **settings)
    told = [str(warning.message) for warning in caught if "what is saved is the parameters alone" in str(warning)]
    return relative_l2(logits(mc.load(path, backend=model.backend)), logits(model)), told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["dt_proj.bias", "D"])
def test_a_part_that_was_removed_is_left_out_on_every_path(name, kind, part):
    """As zeros in its place: whole sequences, and step by step by the fastest way and by plain operations."""
    model, other = built(name, kind), built(name, kind, kernels="plain")
    for each in (model, other):
        mixer = each.backbone.layers[0].mixer
        owner, _, leaf = part.rpartition(".")
        setattr(getattr(mixer, owner) if owner else mixer, leaf, None)
    zeros = built(name, kind)
    backend = registry.get(name)
    values = dict(backend.parameters(zeros))
    values[f"backbone.layers.0.mixer.{part}"] = np.zeros_like(values[f"backbone.layers.0.mixer.{part}"])
    zeros = backend.build(zeros.config, values.items())
    assert relative_l2(logits(model), logits(zeros)) < 1e-5
    for each in (model, other):
        found, wanted = (mc.generate(which, [[1, 2, 3]], max_new_tokens=4) for which in (each, zeros))
        np.testing.assert_allclose(found.logprobs[0], wanted.logprobs[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"backbone\.layers\.0\.mixer"):
        registry.get(name).parameters(model)


def test_a_call_with_other_arguments_is_given_the_state_by_name(name):
    model = built(name)
    wanted = mc.generate(model, [[1, 2, 3]], max_new_tokens=5)
    kind = type(model)

    def call(self, input_ids, labels=None, state=None, **positions):
        return getattr(kind, CALL[name])(self, input_ids, state, **positions)

    model.__class__ = type("Labelled", (kind,), {CALL[name]: call})
    found = mc.generate(model, [[1, 2, 3]], max_new_tokens=5)
    assert found.tokens == wanted.tokens
    np.testing.assert_allclose(found.logprobs[0], wanted.logprobs[0], rtol=1e-4, atol=1e-5)


def test_a_call_that_gives_something_else_is_named(name):
    model = built(name)
    kind = type(model)

    def call(self, *arguments, **named):
        return getattr(kind, CALL[name])(self, *arguments, **named).logits

    model.__class__ = type("Bare", (kind,), {CALL[name]: call})
    with pytest.raises(TypeError, match=r"a call of Bare gives .*; expected logits and state"):
        mc.generate(model, [[1, 2, 3]], max_new_tokens=2)
    with pytest.raises(TypeError, match=r"a call of Bare gives .*; expected logits and state"):
        mc.train(model, IDS.ravel(), mc.TrainSettings(steps=1, batch_size=1, length=4))


@pytest.mark.parametrize("part", ["", "backbone", "backbone.layers.0", "backbone.layers.0.mixer"])
def test_a_save_says_what_acts_above_the_layers(name, part, tmp_path):
    """A class of its own for the model and its backbone; a patched class for the others, put back afterwards."""
    model = built(name)
    module = model
    for step in part.split(".") if part else []:
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    kind, real = type(module), getattr(type(module), CALL[name])

    def call(self, *arguments, **named):
        return real(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        if part.count("."):
            patch.setattr(kind, CALL[name], call)
        else:
            module.__class__ = type("Mine", (kind,), {CALL[name]: call})
        distance, told = saved(model, tmp_path / "model")
        assert distance < 1e-5
        assert len(told) == 1
        assert (part or "the model") in told[0]
        with pytest.raises(ValueError, match="cannot be merged"):
            mc.save(model, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


def test_a_save_of_a_model_as_built_says_nothing(name, tmp_path):
    assert saved(built(name), tmp_path / "a") == (0.0, [])
    assert saved(built(name), tmp_path / "b", merge=True) == (0.0, [])


def test_a_subclass_that_only_adds_methods_is_as_built(name, tmp_path):
    model = built(name)
    kind = type(model)

    class Mine(kind):
        def training_step(self):
            return 0

    model.__class__ = Mine
    assert saved(model, tmp_path / "a") == (0.0, [])


def test_a_wrapper_that_nobody_knows_is_refused(name):
    class Negated:
        def __init__(self, module):
            self.module = module

    with pytest.raises(TypeError, match="Negated; generating needs a model of this library"):
        mc.generate(Negated(built(name)), [[1]], max_new_tokens=1)
