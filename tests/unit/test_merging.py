"""Layers that were changed become weights of the table, or are refused by name; of layers in NumPy."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backend import Foreign
from mamba_core.merging import check_held, merged, warn_of_hooks
from mamba_core.spec.init import initial_values
from mamba_core.spec.tolerances import relative_l2

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=24, initializer_range=0.3)
VALUES = dict(initial_values(CONFIG, 1))
MIXER = "backbone.layers.0.mixer"
LAYERS = {
    "embedding": "backbone.embeddings",
    "linear": f"{MIXER}.in_proj",
    "linear with bias": f"{MIXER}.dt_proj",
    "convolution": f"{MIXER}.conv1d",
    "norm": "backbone.norm_f",
}


def linear(x, weight, bias=0.0):
    return x @ weight.T + bias


def convolution(x, weight, bias):
    padded = np.pad(x, ((0, 0), (weight.shape[2] - 1, 0), (0, 0)))
    return sum(padded[:, k : k + x.shape[1]] * weight[:, 0, k] for k in range(weight.shape[2])) + bias


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight


FUNCTIONS = {
    "embedding": lambda ids, weight: weight[ids],
    "linear": linear,
    "linear with bias": linear,
    "convolution": convolution,
    "norm": norm,
}


def own(path):
    """Leaf -> value of a layer."""
    return {name.rpartition(".")[2]: value for name, value in VALUES.items() if name.rpartition(".")[0] == path}


def merged_layer(kind, layer, **found):
    """The values of a layer of that kind which computes something else."""
    path = LAYERS[kind]
    foreign = Foreign(**(found or {"changed": {path: "Wrapper"}}))

    def call(asked, inputs):
        assert asked == path
        return layer(inputs)

    values = merged(CONFIG, foreign, VALUES.__getitem__, call, "float32")
    assert set(values) == set(VALUES)
    for name, value in values.items():
        if name.rpartition(".")[0] != path:
            np.testing.assert_array_equal(value, VALUES[name])
    return {leaf: values[f"{path}.{leaf}"] for leaf in own(path)}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_changed_layer_becomes_the_weights_that_it_computes_with(kind):
    rng = np.random.default_rng(0)
    wanted = {leaf: value + rng.standard_normal(value.shape) for leaf, value in own(LAYERS[kind]).items()}
    found = merged_layer(kind, lambda inputs: FUNCTIONS[kind](inputs, **wanted))
    for leaf, value in wanted.items():
        assert found[leaf].shape == value.shape
        assert found[leaf].dtype == np.float32
        assert relative_l2(found[leaf], value) < 1e-6


def test_a_hooked_layer_is_measured_too():
    path = LAYERS["linear"]
    found = merged_layer("linear", lambda x: 2 * linear(x, **own(path)), hooked={path: "a forward hook"})
    assert relative_l2(found["weight"], 2 * own(path)["weight"]) < 1e-6


def test_a_large_bias_does_not_round_the_weights_away():
    weights = own(LAYERS["linear with bias"])
    wanted = weights | {"bias": weights["bias"] + 100}
    # As a layer in float32 computes it.
    layer = lambda x: linear(x.astype(np.float32), **wanted).astype(np.float32)  # noqa: E731
    assert relative_l2(merged_layer("linear with bias", layer)["weight"], wanted["weight"]) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "convolution", "norm"])
def test_what_no_weights_compute_is_refused_by_name(kind):
    weights = own(LAYERS[kind])
    with pytest.raises(ValueError, match=f"{LAYERS[kind]} does not compute what a weight"):
        merged_layer(kind, lambda x: np.abs(FUNCTIONS[kind](x, **weights)))


def test_a_bias_that_the_table_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"in_proj adds a bias"):
        merged_layer("linear", lambda x: linear(x, **own(LAYERS["linear"])) + 1)


def test_names_that_the_table_does_not_have_are_refused_either_way():
    foreign = Foreign(names=("value_head.weight", "value_head.bias", "a", "b"))
    with pytest.raises(ValueError, match=r"value_head.weight, value_head.bias, a and 1 more.* merge them first"):
        check_held(CONFIG, foreign)
    with pytest.raises(ValueError, match=r"value_head.weight.*cannot be merged"):
        merged(CONFIG, foreign, VALUES.__getitem__, None, "float32")
    with pytest.raises(ValueError, match=r"backbone.layers.0.mixer \(Mine\).*cannot be merged"):
        merged(CONFIG, Foreign(changed={MIXER: "Mine"}), VALUES.__getitem__, None, "float32")
    check_held(CONFIG, Foreign(hooked={LAYERS["linear"]: "a forward hook"}))


def test_another_epsilon_is_refused():
    """Inputs of unit scale hardly show it."""
    weights = own(LAYERS["norm"])
    other = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-4) * weights["weight"]  # noqa: E731
    with pytest.raises(ValueError, match=r"norm_f does not compute what a weight"):
        merged_layer("norm", other)


def test_an_embedding_that_looks_at_positions_is_refused():
    table = own(LAYERS["embedding"])["weight"]
    with pytest.raises(ValueError, match=r"embeddings does not compute what a weight"):
        merged_layer("embedding", lambda ids: table[ids] + np.arange(ids.shape[-1])[:, None])


def test_hooks_above_the_layers_are_not_merged():
    foreign = Foreign(hooked={MIXER: "patched"})
    with pytest.raises(ValueError, match=r"backbone.layers.0.mixer \(patched\).*cannot be merged"):
        merged(CONFIG, foreign, VALUES.__getitem__, None, "float32")
    with pytest.warns(UserWarning, match=r"without what acts on backbone.layers.0.mixer \(patched\)"):
        warn_of_hooks(foreign)
