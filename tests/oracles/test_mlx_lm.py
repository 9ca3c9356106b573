"""Against mlx-lm's Mamba, which loads our checkpoints; and its two known faults, where the reference sides with us.

A test of a fault fails when a release of theirs mends it: then it says less than it should, and can be made to agree.

It runs in float32: MLX's fused norm has no float64.
"""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.config import MambaConfig
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
utils = pytest.importorskip("mlx_lm.utils")

BASE = MambaConfig(d_model=32, n_layer=3, vocab_size=61, initializer_range=0.1)
VARIANTS = {
    "base": {},
    "untied": {"tie_embeddings": False},
    "biases": {"bias": True, "conv_bias": False},
    "sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, BASE.vocab_size, (2, 37)).astype(np.int32)


@pytest.fixture(scope="module")
def mlx():
    return registry.get("mlx")


def values_of(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used."""
    rng = np.random.default_rng(7)
    moved = {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}
    return {name: value.astype(np.float32) for name, value in moved.items()}


def reference(config):
    return ReferenceModel(config, values_of(config))


def ours(backend, config):
    return backend.build(config, values_of(config).items())


def logits_of(backend, model, ids, mask=None):
    mask = None if mask is None else backend.from_numpy(mask, device=model.device)
    return backend.to_numpy(model(backend.from_numpy(ids, device=model.device), mask=mask).logits)


def theirs(backend, config, folder):
    """Their model from the checkpoint that a backend saved; it fails on a tensor too many or too few."""
    mc.save(ours(backend, config), folder)
    return utils.load_model(folder, strict=True)[0]


def test_backend_and_reference_equal_mlx_lm_on_our_checkpoint(backend, config, ids, tmp_path):
    expected = np.array(theirs(backend, config, tmp_path / "ours")(mx.array(ids)))
    assert relative_l2(expected, reference(config)(ids).logits) <= tolerance("float32")
    assert relative_l2(logits_of(backend, ours(backend, config), ids), expected) <= tolerance("float32")


def test_gradients_equal_mlx_lm(mlx, config, ids, tmp_path):
    model = theirs(mlx, config, tmp_path / "ours")
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))

    def total(model):
        return (model(mx.array(ids)) * mx.array(weights.astype(np.float32))).sum()

    _, gradients = nn.value_and_grad(model, total)(model)
    gradients = dict(nn.utils.tree_flatten(gradients))
    expected, _ = reference(config).vjp(weights.astype(np.float32), ids)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        # Their convolution keeps its taps before its one input channel.
        value = np.array(gradient).swapaxes(1, 2) if name.endswith("conv1d.weight") else np.array(gradient)
        assert relative_l2(value, expected[name]) <= tolerance("float32", "gradient"), name


def test_steps_and_their_cache_equal_the_reference(mlx, config, ids, tmp_path):
    model = theirs(mlx, config, tmp_path / "ours")
    cache = model.make_cache()
    pieces = [model(mx.array(ids[:, start:stop]), cache=cache) for start, stop in ((0, 20), (20, 36), (36, 37))]
    logits, state = reference(config)(ids)
    assert relative_l2(np.array(mx.concatenate(pieces, axis=1)), logits) <= tolerance("float32")
    for layer, entry in zip(state.layers, cache, strict=True):
        assert relative_l2(np.array(entry[0]), layer.conv) <= tolerance("float32", "node")
        assert relative_l2(np.array(entry[1]), layer.ssm) <= tolerance("float32", "node")


def test_norm_eps_counts(backend, ids, tmp_path):
    """Theirs norms with 1e-5 whatever the config says: it equals the reference of that config, not of this one."""
    config = dataclasses.replace(BASE, norm_eps=1e-2)
    expected = reference(config)(ids).logits
    logits = np.array(theirs(backend, config, tmp_path / "ours")(mx.array(ids)))
    assert relative_l2(logits, reference(BASE)(ids).logits) <= tolerance("float32")
    assert relative_l2(logits, expected) > 1e-2
    assert relative_l2(logits_of(backend, ours(backend, config), ids), expected) <= tolerance("float32")


def test_padding_does_not_count(backend, ids, tmp_path):
    """Theirs has no mask: padding on the left changes the logits of a shorter prompt. Ours are those of it alone."""
    padding, mask = 9, np.ones(ids.shape, bool)
    mask[1, :padding] = False
    padded = np.where(mask, ids, 0).astype(np.int32)
    alone = reference(BASE)(ids[1:, padding:]).logits
    model = theirs(backend, BASE, tmp_path / "ours")
    assert relative_l2(np.array(model(mx.array(ids[1:, padding:]))), alone) <= tolerance("float32")
    assert relative_l2(np.array(model(mx.array(padded)))[1:, padding:], alone) > 1e-2
    logits = logits_of(backend, ours(backend, BASE), padded, mask)[1:, padding:]
    assert relative_l2(logits, alone) <= tolerance("float32")
