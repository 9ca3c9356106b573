"""Models of images on a backend: every node, gradients of all parameters, sizes, class tokens, and what is refused."""

import dataclasses
import functools
import importlib

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import tasks
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel

from . import models
from .assertions import assert_close
from .cases import cases, configs

OPTIONS = {"image_size": (8, 12), "patch_size": 4, "num_classes": 7}
BASE = cases()["vision_mamba"].VisionMambaConfig(d_model=16, n_layer=2, d_state=4, task_options=OPTIONS)


def variant(task="image_classification", options=None, **fields):
    own = {name: value for name, value in OPTIONS.items() if task == BASE.task or name != "num_classes"}
    return dataclasses.replace(BASE, task=task, task_options=own | (options or {}), **fields)


CONFIGS = {
    "base": BASE,
    "odd": variant(
        options={"class_token": "double", "channels": 1, "patch_size": (4, 3), "stride": (2, 3)},
        n_layer=1, bimamba_type="v1", divide_output=False, residual_in_fp32=False,
    ),
    "features": variant("image_features", {"class_token": "none", "stride": 3}, n_layer=1, bias=True, conv_bias=False),
}  # fmt: skip
OTHER_SIZE = (13, 9)


@functools.cache
def values(name):
    """Initial values moved off zero and one, which would hide a parameter that is not used."""
    rng = np.random.default_rng(1)
    drawn = dict(initial_values(CONFIGS[name], 1))
    return {key: (value + 0.1 * rng.standard_normal(value.shape)).astype(np.float32) for key, value in drawn.items()}


@models.by_backend
def built(backend, name, dtype="float32"):
    return backend.build(CONFIGS[name], values(name).items(), dtype=dtype)


@functools.cache
def reference(name):
    return ReferenceModel(CONFIGS[name], values(name))


def images(name, size=None, batch=2):
    task = tasks.of(CONFIGS[name])
    shape = (batch, task.channels, *(size or task.size))
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=CONFIGS, scope="session")
def name(request):
    return request.param


def call(backend, model, given, **told):
    out = model(backend.from_numpy(given, device=model.device), **told)
    return backend.to_numpy(out[0])


def test_every_node_equals_the_reference(backend, name):
    """Of images of another size than the positions are for."""
    expected, observed = {}, {}
    wanted = reference(name)(images(name, OTHER_SIZE), observe=expected.__setitem__)[0]
    seen = lambda node, value: observed.__setitem__(node, backend.to_numpy(value))  # noqa: E731
    found = call(backend, built(backend, name), images(name, OTHER_SIZE), observe=seen)
    assert list(observed) == list(expected)
    for node, value in expected.items():
        assert_close(observed[node], value, "float32", "node", node, config=name)
    assert_close(found, wanted, "float32", "value", "output")


@pytest.mark.parametrize("name", ["odd", "features"])
def test_half_precision(backend, name):
    found = call(backend, built(backend, name, "bfloat16"), images(name))
    assert_close(found, reference(name)(images(name))[0], "bfloat16", "value", "output", config=name)
    assert found.dtype.name == ("bfloat16" if CONFIGS[name].task == "image_features" else "float32")


def gradients(backend, model, given, cotangent, **positions):
    """By canonical name, of the sum of output * cotangent."""
    given, cotangent = (backend.from_numpy(value, device=model.device) for value in (given, cotangent))
    told = {name: backend.from_numpy(value, device=model.device) for name, value in positions.items()}
    if backend.name == "torch":
        torch = importlib.import_module("torch")
        named = dict(model.named_parameters())
        found = torch.autograd.grad((model(given, **told)[0] * cotangent).sum(), named.values())
        return {name: backend.to_numpy(value) for name, value in zip(named, found, strict=True)}
    if backend.name == "mlx":
        nn, utils = importlib.import_module("mlx.nn"), importlib.import_module("mlx.utils")
        weights = importlib.import_module("mamba_core.backends.mlx.weights")
        _, found = nn.value_and_grad(model, lambda: (model(given, **told)[0] * cotangent).sum())()
        return dict(weights.canonical(model, utils.tree_flatten(found, destination={})))
    nnx, weights = importlib.import_module("flax.nnx"), importlib.import_module("mamba_core.backends.jax.weights")
    graph, state = nnx.split(model)
    grad = importlib.import_module("jax").jit(
        importlib.import_module("jax").grad(lambda state: (nnx.merge(graph, state)(given, **told)[0] * cotangent).sum())
    )
    found = weights.named(model, grad(state))
    return {name: weights.canonical(model, name, value) for name, value in found.items()}


@pytest.mark.parametrize(("name", "remat"), [*((name, False) for name in CONFIGS), ("base", True)])
def test_gradients_of_every_parameter_and_of_the_images(backend, name, remat):
    model, given = built(backend, name), images(name, OTHER_SIZE)
    shape = reference(name)(given)[0].shape
    cotangent = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    expected, _ = reference(name).vjp(cotangent, given)
    of_images = expected.pop("images")
    model.remat = remat
    try:
        found = gradients(backend, model, given, cotangent)
    finally:
        model.remat = False
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert_close(found[key], value, "float32", "gradient", key, config=name)
    if not remat and name == "odd":
        arrays = [backend.from_numpy(value, device=model.device) for value in (given, cotangent)]
        _, (found,) = backend.vjp(lambda value: (model(value)[0],), arrays[:1], arrays[1:])
        assert_close(found, of_images, "float32", "gradient", "gradient in the images")


@pytest.mark.parametrize("config", ["vision_mamba base", "bidirectional mamba2"])
def test_gradients_with_masks_and_segments(backend, config):
    """Of every parameter of a model of tokens that reads them in both directions."""
    config = configs()[config]
    model, wanted = models.built(backend, config), models.reference_of(backend, config)
    rng, ids = np.random.default_rng(3), models.inputs(config, 2, 12)
    positions = {"mask": rng.random(ids.shape) < 0.7, "segment_ids": np.cumsum(rng.random(ids.shape) < 0.3, 1)}
    positions["segment_ids"] = positions["segment_ids"].astype(np.int32)
    cotangent = rng.standard_normal(wanted(ids).logits.shape).astype(np.float32)
    expected, _ = wanted.vjp(cotangent, ids, **positions)
    for key, value in gradients(backend, model, ids, cotangent, **positions).items():
        assert_close(value, expected[key], "float32", "gradient", key)


def test_images_of_the_models_own_size_and_a_row_alone(backend):
    """The table of positions as it is, and a row does not depend on its neighbours."""
    model, given = built(backend, "base"), images("base", batch=3)
    wanted = reference("base")(given).logits
    assert_close(call(backend, model, given), wanted, "float32", "value", "three")
    assert_close(call(backend, model, given[1:2]), wanted[1:2], "float32", "value", "one of them")


def test_saved_and_loaded_bit_for_bit(backend, name, tmp_path):
    mc.save(built(backend, name), tmp_path / "one")
    loaded = mc.load(tmp_path / "one", backend=backend.name)
    assert loaded.config == CONFIGS[name]
    for key, value in backend.parameters(loaded).items():
        np.testing.assert_array_equal(value, values(name)[key])


@pytest.mark.parametrize("name", ["odd"])
def test_parity(backend, name, tmp_path):
    mc.save(built(backend, name), tmp_path / "one")
    found = mc.parity(tmp_path / "one", backends=[backend.name])
    assert found.passed
    assert (found.length, found.steps, found.tokens) == (tasks.of(CONFIGS[name]).positions(images(name)), 0, [])


def test_drop_path_acts_in_training_alone(backend):
    """A mixer's output is left out of some rows, and grown in the others; the first layer's never is."""
    config = dataclasses.replace(BASE, drop_path_rate=0.5)
    model = backend.build(config, values("base").items())
    given = images("base", batch=32)
    still = call(backend, model, given)
    assert_close(still, reference("base")(given)[0], "float32", "value", "as built")
    model.train()
    seen = {}
    call(backend, model, given, observe=lambda node, value: seen.__setitem__(node, backend.to_numpy(value)))
    first = seen["layers.0.residual"] - seen["embedding"]
    np.testing.assert_allclose(first, seen["layers.0.out_proj"], atol=1e-5)
    added = seen["layers.1.residual"] - seen["layers.0.residual"]
    dropped = np.abs(added).max((1, 2)) == 0
    assert 6 < dropped.sum() < 26
    np.testing.assert_allclose(added[~dropped], 2 * seen["layers.1.out_proj"][~dropped], atol=1e-5)
    again = call(backend, model, given)
    assert (again != call(backend, model, given)).any()
    model.eval()
    np.testing.assert_array_equal(call(backend, model, given), still)


def test_what_needs_a_state_or_the_next_token_is_refused(backend):
    """With an error that says why."""
    tokens = mc.build(cases()["vision_mamba"].CONFIGS["base"], backend=backend.name)
    reason = "vision_mamba carries none: each position sees those after it"
    with pytest.raises(ValueError, match="generating goes on from a state, and " + reason):
        mc.generate(tokens, [1, 2])
    with pytest.raises(ValueError, match="generating goes on from a state, and " + reason):
        mc.stream(tokens, [1, 2])
    with pytest.raises(ValueError, match="prefill goes on from a state, and " + reason):
        backend.prefill(tokens, np.zeros((1, 4), np.int32), np.ones((1, 4), bool))
    ids = backend.from_numpy(np.zeros((1, 4), np.int32), device=tokens.device)
    with pytest.raises(ValueError, match="vision_mamba carries no state; give none: each position sees"):
        tokens(ids, tokens.init_state(1))
    for use in (
        lambda: backend.loss_and_gradients(tokens, np.zeros((1, 4), np.int32)),
        lambda: backend.trainer(tokens, mc.TrainSettings()),
        lambda: mc.train(tokens, np.zeros(400, np.int32), mc.TrainSettings()),
    ):
        with pytest.raises(ValueError, match="is of the next token, and each position of vision_mamba sees those"):
            use()


def test_bad_input_is_refused(backend):
    model, given = built(backend, "base"), images("base")
    shape = r"images has shape .*; expected \(b, channels, height, width\)"
    with pytest.raises(ValueError, match=shape):
        call(backend, model, given[0])
    with pytest.raises(ValueError, match=shape + " of 3 channels"):
        call(backend, model, given[:, :2])
    with pytest.raises(ValueError, match="images has 3 rows and 12 columns, fewer than a patch"):
        call(backend, model, given[:, :, :3])
    with pytest.raises(TypeError, match=r"images is .*uint8; expected real floating-point"):
        call(backend, model, np.zeros((1, 3, 8, 12), np.uint8))
    with pytest.raises(ValueError, match="batch 0"):
        call(backend, model, given[:0])
    mask = backend.from_numpy(np.ones((2, 7), bool), device=model.device)
    with pytest.raises(ValueError, match="give no mask and no segment_ids"):
        call(backend, model, given, mask=mask)
    with pytest.raises(TypeError, match="expected images; none given"):
        model()
    with pytest.raises(ValueError, match="vision_mamba carries no state"):
        call(backend, model, given, state=model.init_state(2))


def test_the_loss_and_its_gradients_equal_the_reference_s(backend):
    """Of images whose classes are given, one of which does not count."""
    model, wanted_model = built(backend, "base"), reference("base")
    given = tasks.of(BASE).draw(BASE, np.random.default_rng(3), 4, 0)
    targets = np.array([1, 6, -100, 1], np.int32)
    loss, gradients = backend.loss_and_gradients(model, {"inputs": given, "targets": targets})
    wanted, doutput = tasks.of(BASE).loss(BASE, wanted_model(given).logits, targets)
    expected, _ = wanted_model.vjp(doutput, given)
    assert loss == pytest.approx(wanted, abs=1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], "float32", "gradient", name)


def test_training_learns_images_by_heart(backend):
    rng = np.random.default_rng(0)
    images, classes = rng.normal(size=(6, 3, 8, 12)).astype(np.float32), rng.integers(0, 7, 6)
    model = mc.build(BASE, backend=backend.name, seed=1)
    settings = mc.TrainSettings(steps=25, batch_size=6, learning_rate=1e-2, warmup_steps=1)
    history = mc.train(model, (images, classes), settings)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    with pytest.raises(ValueError, match="targets holds 7 to 7; expected 0 to 6"):
        mc.train(model, (images, np.full(6, 7)), settings)
