"""Models of every task: what is theirs alone. The laws of `test_laws.py` draw them too."""

import dataclasses
import functools
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import tasks
from mamba_core.backend import State
from mamba_core.comparison import parity
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import tolerance
from mamba_core.tasks.base import EMBEDDING, EMBEDS, IDS
from mamba_core.training import TrainSettings

from . import models
from .assertions import assert_close, assert_zero
from .models import assert_states, call

BATCH, LENGTH = 2, 13
SMALL = mc.MambaConfig(d_model=12, n_layer=2, vocab_size=29, d_state=3, initializer_range=0.3)
HALF = {"bias": True, "conv_bias": False, "residual_in_fp32": False}
CONFIGS = {
    "features": dataclasses.replace(SMALL, task="features"),
    "layers": dataclasses.replace(SMALL, task="layers"),
    "layers in the compute dtype": dataclasses.replace(SMALL, task="layers", **HALF),
    "minimamba": mc.MiniMambaConfig(d_model=12, n_layer=2, vocab_size=29, d_state=3, initializer_range=0.3),
    "minimamba layers": mc.MiniMambaConfig(d_model=12, n_layer=2, d_state=3, task="layers", **HALF),
}
HEADLESS = [name for name, config in CONFIGS.items() if config.task != "lm"]
MASK = np.array([[True] * LENGTH, [False] * 2 + [True] * 8 + [False] * (LENGTH - 10)])


@functools.cache
def values(name):
    """Initial values with steps that are not small, so that the bias and the gate decide the result."""
    drawn = dict(initial_values(CONFIGS[name], 1))
    return {key: value + np.float32(2.0) if key.endswith("dt_proj.bias") else value for key, value in drawn.items()}


@models.by_backend
def built(backend, name, dtype="float32"):
    return backend.build(CONFIGS[name], values(name).items(), dtype=dtype)


@functools.cache
def reference(name):
    return ReferenceModel(CONFIGS[name], values(name))


def inputs(name, length=LENGTH, seed=0):
    return models.inputs(CONFIGS[name], BATCH, length, seed)


@pytest.fixture(params=CONFIGS, scope="session")
def name(request):
    return request.param


@pytest.mark.parametrize("masked", [False, True])
def test_every_node_equals_the_reference(backend, name, masked):
    positions = {"mask": MASK} if masked else {}
    expected, observed = {}, {}
    wanted = reference(name)(inputs(name), observe=expected.__setitem__, **positions)
    model = built(backend, name)
    found, state = call(
        backend,
        model,
        inputs(name),
        observe=lambda node, value: observed.__setitem__(node, backend.to_numpy(value)),
        **positions,
    )
    assert list(observed) == list(expected)
    last = list(expected)[-1]
    for node, value in expected.items():
        assert_close(observed[node], value, "float32", "value" if node == last else "node", node, config=name)
    np.testing.assert_array_equal(found, observed[last])
    assert_states(backend, CONFIGS[name], state, wanted.state, "after the last position")
    if masked:
        assert_zero(found[~MASK], "what is masked")


def test_the_kind_of_result(backend, name):
    model = built(backend, name)
    out = model(backend.from_numpy(inputs(name), device=model.device))
    assert type(out) is tasks.of(CONFIGS[name]).output is type(reference(name)(inputs(name)))
    assert isinstance(out.state, State)


FROM_IDS = [name for name, config in CONFIGS.items() if tasks.of(config).inputs == IDS]


@pytest.mark.parametrize("name", FROM_IDS)
@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_take_the_place_of_ids(backend, name, masked):
    """The same output, state and nodes as of the ids whose rows they are; and the reference's gradient in them."""
    model, ids = built(backend, name), inputs(name)
    embeds = values(name)[EMBEDDING][ids]
    positions = {"mask": MASK} if masked else {}
    told = {key: backend.from_numpy(value, device=model.device) for key, value in positions.items()}
    native, seen = backend.from_numpy(embeds, device=model.device), {}

    def run(given):
        return model(inputs_embeds=given, observe=lambda node, value: seen.update({node: value}), **told)

    wanted, state = call(backend, model, ids, **positions)
    out = run(native)
    assert_close(backend.to_numpy(out[0]), wanted, "float32", "value", "of embeddings")
    for key, value in models.leaves(CONFIGS[name], state, backend.to_numpy).items():
        found = models.leaves(CONFIGS[name], out.state, backend.to_numpy)[key]
        assert_close(found, value, "float32", "value", f"state {key}")
    np.testing.assert_array_equal(backend.to_numpy(seen["embedding"]), embeds)
    expected = reference(name)(inputs_embeds=embeds, **positions)[0]
    assert_close(backend.to_numpy(out[0]), expected, "float32", "value", "of embeddings, against the reference")
    cotangent = np.random.default_rng(2).standard_normal(expected.shape).astype(np.float32)
    gradients, _ = reference(name).vjp(cotangent, inputs_embeds=embeds, **positions)
    given = backend.from_numpy(cotangent, device=model.device)
    _, (found,) = backend.vjp(lambda value: (model(inputs_embeds=value, **told)[0],), [native], [given])
    assert_close(found, gradients[EMBEDS], "float32", "gradient", "gradient in the embeddings")


@pytest.mark.parametrize("name", FROM_IDS)
def test_ids_or_embeddings_are_given(backend, name):
    model = built(backend, name)
    ids, embeds = (backend.from_numpy(value, device=model.device) for value in (inputs(name), inputs("layers")))
    with pytest.raises(TypeError, match="expected input_ids or inputs_embeds; both given"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(TypeError, match="expected input_ids or inputs_embeds; neither given"):
        model()
    with pytest.raises(ValueError, match=r"inputs_embeds has shape .* expected \(b, l, d\) = \(2, 13, 12\)"):
        model(inputs_embeds=embeds[..., :-1])
    with pytest.raises(TypeError, match=r"inputs_embeds is .*expected real floating-point"):
        model(inputs_embeds=backend.from_numpy(np.zeros((2, LENGTH, 12), np.int32), device=model.device))


def test_a_prompt_of_embeddings_is_prefilled(backend):
    """As the ids whose rows they are, in chunks, padded, and from a state."""
    model, ids = built(backend, "minimamba"), inputs("minimamba")
    embeds, mask = values("minimamba")[EMBEDDING][ids], np.arange(LENGTH) >= np.array([[0], [3]])
    wanted, found = None, None
    for part in (slice(0, 8), slice(8, 12), slice(12, 13)):
        wanted = backend.prefill(model, ids[:, part], mask[:, part], wanted and wanted.state)
        found = backend.prefill(model, embeds[:, part], mask[:, part], found and found.state)
        assert_close(backend.to_numpy(found.logits), backend.to_numpy(wanted.logits), "float32", "value", str(part))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(backend, name, dtype):
    """Hidden states come in the compute dtype, masked or not; logits in float32."""
    model = built(backend, name, dtype)
    assert model.dtype == dtype
    for positions in ({}, {"mask": MASK}):
        found, _ = call(backend, model, inputs(name), **positions)
        assert found.dtype.name == ("float32" if CONFIGS[name].task == "lm" else dtype)
        assert_close(found, reference(name)(inputs(name), **positions)[0], dtype, "value", "output", config=name)


def test_the_residual_stream_has_its_dtype_whatever_is_given(backend, name):
    config, model, dtypes = CONFIGS[name], built(backend, name, "bfloat16"), {}
    for given in ("float32", "bfloat16", "float16") if config.task == "layers" else (None,):
        native = backend.from_numpy(inputs(name), dtype=given, device=model.device)
        model(native, observe=lambda node, value: dtypes.update({node: backend.to_numpy(value).dtype.name}))
        assert dtypes["layers.0.residual"] == ("float32" if config.residual_in_fp32 else "bfloat16")
        assert dtypes["layers.0.norm"] == dtypes["layers.0.scan"] == dtypes["layers.1.out_proj"] == "bfloat16"


@pytest.mark.parametrize("name", HEADLESS)
def test_what_needs_a_head_is_refused(backend, name):
    model = built(backend, name)
    message = f"task '{CONFIGS[name].task}', without a (head|loss); .* needs one of task .*'lm'"
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match=message):
        backend.loss_and_gradients(model, tokens)
    with pytest.raises(ValueError, match=message):
        backend.trainer(model, TrainSettings())
    with pytest.raises(ValueError, match=message):
        mc.train(model, np.zeros(400, np.int32), TrainSettings())
    with pytest.raises(ValueError, match=message):
        mc.generate(model, [1, 2])
    with pytest.raises(ValueError, match=message):
        mc.stream(model, "text")


def test_bad_input_is_refused(backend):
    layers, features = built(backend, "layers"), built(backend, "features")
    floats = inputs("layers")
    with pytest.raises(ValueError, match=r"inputs_embeds has shape .* expected \(b, l, d\) = \(2, 13, 12\)"):
        call(backend, layers, floats[..., :-1])
    with pytest.raises(ValueError, match=r"inputs_embeds has shape .* expected \(b, l, d\)"):
        call(backend, layers, floats[0])
    with pytest.raises(TypeError, match=r"inputs_embeds is .*expected real floating-point"):
        call(backend, layers, np.zeros((1, 4, 12), np.int32))
    with pytest.raises(ValueError, match="batch 0"):
        call(backend, layers, floats[:0])
    with pytest.raises(ValueError, match=r"input_ids has shape .* expected \(b, l\)"):
        call(backend, features, floats)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_states_move(backend, name, tmp_path):
    """Out of the model bit for bit, and its state through a file."""
    model = built(backend, name)
    for key, value in backend.parameters(model).items():
        np.testing.assert_array_equal(value, values(name)[key])
    _, state = call(backend, model, inputs(name))
    mc.save_state(state, tmp_path / "state.safetensors", model)
    whole, _ = call(backend, model, inputs(name, seed=1), state)
    again, _ = call(backend, model, inputs(name, seed=1), mc.load_state(tmp_path / "state.safetensors", model))
    np.testing.assert_array_equal(again, whole)


def test_a_prefill_without_the_head_serves_the_language_model(backend):
    """The state is the layers': a task does not change it."""
    config = dataclasses.replace(SMALL, task="lm")
    model = backend.build(config, values("features").items())
    _, state = call(backend, built(backend, "features"), inputs("features", seed=1))
    _, expected = call(backend, model, inputs("features", seed=1))
    found, _ = call(backend, model, inputs("features"), state)
    wanted, _ = call(backend, model, inputs("features"), expected)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity(backend, name, monkeypatch):
    opened = SimpleNamespace(config=CONFIGS[name], folder="there", tensors=lambda: values(name).items())
    monkeypatch.setattr(import_module("mamba_core.comparison"), "open_model", lambda source, **_: opened)
    found = parity("there", backends=[backend.name], length=9, steps=3)
    assert found.passed
    assert (found.length, len(found.tokens)) == (9, 0 if CONFIGS[name].task == "layers" else 9)
    limits = found.backends[0].modes["forward"].limits
    assert limits[list(limits)[-1]] == tolerance("float32", "value") < limits["layers.0.norm"]
    if name in HEADLESS:
        with pytest.raises(ValueError, match=r"grad needs one of task .*'lm'"):
            parity("there", backends=[backend.name], grad=True)
    if CONFIGS[name].task == "layers":
        with pytest.raises(ValueError, match="takes inputs_embeds; give no tokens and no text"):
            parity("there", backends=[backend.name], tokens=[1, 2])
