"""Any architecture in both directions: what its two mixers compute, and what is refused."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel

INNER = {
    "mamba": {"d_state": 3},
    "mamba2": {"d_state": 3, "headdim": 4},
    "falcon_mamba": {"d_state": 3},
    "minimamba": {"d_state": 3},
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_it_is_two_models_of_one_layer_one_of_them_flipped(inner, merge):
    """In float64, from the reference of the architecture itself."""
    options = {"inner": inner, "inner_options": INNER[inner], "merge": merge}
    config = mc.BidirectionalConfig(d_model=8, n_layer=1, task="layers", **options)
    values = dict(initial_values(config, 1))
    own = dataclasses.replace(config.inner_config, task="layers")
    x = np.random.default_rng(0).normal(size=(2, 9, 8))

    def one(direction, x):
        named = {name.replace(f".{direction}.", "."): value for name, value in values.items()}
        alone = {name: value for name, value in named.items() if "wards" not in name}
        return ReferenceModel(own, alone)(x).hidden - x

    wanted = one("forwards", x) + one("backwards", x[:, ::-1])[:, ::-1]
    wanted = x + wanted / (2 if merge == "mean" else 1)
    np.testing.assert_allclose(ReferenceModel(config, values)(x).hidden, wanted, atol=1e-12)


def test_the_directions_begin_with_values_of_their_own():
    values = dict(initial_values(mc.BidirectionalConfig(d_model=8, n_layer=1), 0))
    prefix = "backbone.layers.0.mixer."
    assert (values[prefix + "forwards.in_proj.weight"] != values[prefix + "backwards.in_proj.weight"]).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner": "vision_mamba"}, "inner is 'vision_mamba'; expected a causal architecture that steps and packs"),
        ({"inner": "bidirectional"}, "inner is 'bidirectional'; expected a causal architecture"),
        ({"inner": "rnn"}, "no architecture 'rnn'"),
        ({"inner_options": {"heads": 3}}, "inner_options do not fit architecture 'mamba'"),
        ({"inner_options": {"d_model": 3}}, "expected none of the fields of this config"),
        ({"inner_options": {"d_state": 0}}, "d_state is 0"),
        ({"inner_options": 3}, "inner_options is 3; expected a mapping"),
        ({"merge": "concat"}, "merge is 'concat'; expected 'mean' or 'sum'"),
    ],
)
def test_what_is_no_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mc.BidirectionalConfig(**fields)


def test_it_is_saved_and_loaded(tmp_path):
    options = {"d_state": 3, "headdim": 4, "dt_limit": (0.01, 0.2)}
    config = mc.BidirectionalConfig(d_model=8, n_layer=2, vocab_size=11, inner="mamba2", inner_options=options)
    model = mc.build(config)
    mc.save(model, tmp_path / "a")
    assert mc.load(tmp_path / "a").config == config
    with pytest.raises(ValueError, match="generating goes on from a state, and bidirectional carries none"):
        mc.generate(model, [1, 2])
