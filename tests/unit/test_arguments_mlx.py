"""What an MLX model is called with, and models and states that are copied, pickled and cast."""

import copy
import pickle

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402 (after the package that it needs)

BACKEND = registry.get("mlx")
CONFIG = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=29, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 29, (2, 9)).astype(np.int32)


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with mx.stream(mx.cpu):
        yield


def built(task="lm", **options):
    return mc.build(mc.MambaConfig(**vars(CONFIG) | {"task": task}), backend="mlx", device="cpu", seed=2, **options)


# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [IDS, IDS.tolist(), 3])
def test_ids_of_another_kind_are_refused_by_their_type(ids):
    with pytest.raises(TypeError, match=rf"input_ids is .*{type(ids).__name__}; .* pass mx\.array\(input_ids\)"):
        built()(ids)


def test_ids_of_another_framework_are_refused_by_their_type():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"input_ids is torch\.Tensor"):
        built()(torch.from_numpy(IDS))


@pytest.mark.parametrize("name", ["mask", "segment_ids", "inputs_embeds"])
def test_other_arguments_of_another_kind_are_refused_by_their_type(name):
    given = {"mask": IDS > 3, "segment_ids": IDS, "inputs_embeds": np.zeros((2, 9, 16), np.float32)}[name]
    ids = None if name == "inputs_embeds" else mx.array(IDS)
    with pytest.raises(TypeError, match=rf"{name} is numpy\.ndarray"):
        built()(ids, **{name: given})


def test_a_state_of_another_framework_is_refused():
    model = built()
    state = model.init_state(2)
    with pytest.raises(TypeError, match=r"state\.segment is numpy\.ndarray"):
        model(mx.array(IDS), state._replace(segment=np.zeros(2, np.int32)))


def test_the_inputs_of_layers_alone_are_refused_under_their_name():
    with pytest.raises(TypeError, match=r"inputs_embeds is numpy\.ndarray"):
        built("layers")(np.zeros((2, 9, 16), np.float32))


# --- embeddings in the place of ids ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["lm", "features"])
def test_embeddings_compute_the_bits_of_their_ids(task, dtype):
    model = built(task, dtype=dtype)
    embeds, state = model.backbone.embeddings(mx.array(IDS)), model.init_state(2)
    for given, wanted in zip(model(None, state, inputs_embeds=embeds), model(mx.array(IDS), state), strict=True):
        assert all(
            mx.array_equal(a, b) for (_, a), (_, b) in zip(tree_flatten([given]), tree_flatten([wanted]), strict=True)
        )


def test_embeddings_are_prefilled():
    model, mask = built(), np.arange(9) >= np.array([[0], [4]])
    embeds = np.array(model.backbone.embeddings(mx.array(IDS)))
    first = BACKEND.prefill(model, IDS[:, :3], np.ones((2, 3), bool)).state
    found, wanted = (BACKEND.prefill(model, tokens, mask, first) for tokens in (embeds, IDS))
    assert mx.array_equal(found.logits, wanted.logits)
    tokens = [
        np.stack([choice.tokens for choice in BACKEND.decode(model, after, mc.Sampling(), limit=3)])
        for after in (found, wanted)
    ]
    np.testing.assert_array_equal(*tokens)


# --- copies ------------------------------------------------------------------------------------------


def again(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, again])
@pytest.mark.parametrize("kernels", ["auto", {"selective_scan": "chunked"}])
@pytest.mark.parametrize("called", [False, True])
def test_a_copy_computes_the_same_and_shares_nothing(copied, kernels, called):
    model = built(kernels=kernels)
    wanted = model(mx.array(IDS)) if called else None
    made = copied(model)
    wanted = wanted or model(mx.array(IDS))
    model.update(tree_unflatten([(name, 0 * value) for name, value in tree_flatten(model.parameters())]))
    found = made(mx.array(IDS))
    assert mx.array_equal(found.logits, wanted.logits)
    assert (made.kernels, made.policy, made.dtype, made.device) == (model.kernels, model.policy, "float32", "cpu")
    assert (
        mc.generate(made, [[1, 2]], max_new_tokens=3).tokens == mc.generate(built(), [[1, 2]], max_new_tokens=3).tokens
    )
    assert BACKEND.foreign(made) == mc.backend.Foreign()


@pytest.mark.parametrize("copied", [copy.deepcopy, again])
def test_a_copied_state_goes_on(copied):
    model = built()
    state = model(mx.array(IDS)).state
    wanted, found = model(mx.array(IDS), state).logits, model(mx.array(IDS), copied(state)).logits
    assert mx.array_equal(found, wanted)


# --- float64 -----------------------------------------------------------------------------------------


def test_float64_is_refused():
    """A CPU has it and no GPU: the recurrence would be computed in float32 without a word."""
    model = built()
    with pytest.raises(ValueError, match="float64"):
        model.set_dtype(mx.float64)
    assert model.dtype == "float32"
    model.apply(lambda value: value.astype(mx.float64))
    with pytest.raises(ValueError, match="float64"):
        model(mx.array(IDS))
    with pytest.raises(ValueError, match="float64"):
        built(dtype="float64")
