"""Initial values: the distributions of mamba_ssm, and that a seed means the same bits for ever."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from mamba_core.config import MambaConfig
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table
from tests.golden.initial_values import CONFIG, digests

GOLDEN = Path(__file__).parents[1] / "golden" / "initial_values.json"


def test_a_seed_means_the_same_bits_for_ever():
    """The digests were written by tests/golden/initial_values.py; changing them changes everyone's seeds."""
    assert digests() == json.loads(GOLDEN.read_text())


def test_a_value_depends_on_its_own_name_and_shape_only():
    values = dict(initial_values(CONFIG, 3))
    more = dict(initial_values(dataclasses.replace(CONFIG, n_layer=5, tie_embeddings=True), 3))
    shared = set(values) & set(more)
    scaled = {name for name in shared if name.endswith("out_proj.weight")}  # by sqrt(n_layer)
    for name in shared - scaled:
        np.testing.assert_array_equal(values[name], more[name])
    assert hashlib.sha256(values["lm_head.weight"].tobytes()) != hashlib.sha256(
        values["backbone.embeddings.weight"].tobytes()
    )


def test_seeds_differ():
    one, two = dict(initial_values(CONFIG, 0)), dict(initial_values(CONFIG, 1))
    random = [name for name in one if not name.endswith(("norm.weight", "norm_f.weight", "A_log", "D", "_proj.bias"))]
    for name in [*random, "backbone.layers.0.mixer.dt_proj.bias"]:
        assert not np.array_equal(one[name], two[name]), name


def test_distributions():
    config = MambaConfig(d_model=256, n_layer=4, vocab_size=1000, tie_embeddings=False)
    values = dict(initial_values(config))
    mixer = "backbone.layers.1.mixer."
    d, e, k, r = 256, 512, 4, 16
    assert abs(values["backbone.embeddings.weight"].std() - 0.02) < 2e-4
    for name, bound in {
        "lm_head.weight": d**-0.5,
        mixer + "in_proj.weight": d**-0.5,
        mixer + "x_proj.weight": e**-0.5,
        mixer + "out_proj.weight": e**-0.5 / 2,
        mixer + "conv1d.weight": k**-0.5,
        mixer + "conv1d.bias": k**-0.5,
        mixer + "dt_proj.weight": r**-0.5,
    }.items():
        value = values[name]
        assert np.abs(value).max() <= bound, name
        assert abs(value.std() - bound / np.sqrt(3)) < 0.1 * bound, name
        assert abs(value.mean()) < 0.1 * bound, name
    step = np.logaddexp(0, values[mixer + "dt_proj.bias"].astype(np.float64))
    assert step.min() * 1.0001 >= 0.001
    assert step.max() <= 0.1 * 1.0001
    assert abs(np.log(step).mean() - np.log(0.01)) < 0.2
    np.testing.assert_allclose(np.exp(values[mixer + "A_log"]), np.tile(np.arange(1, 17), (e, 1)), rtol=1e-6)


def test_no_decay_is_for_the_recurrence_biases_and_norms():
    table = parameter_table(dataclasses.replace(CONFIG, bias=True))
    decayed = {name.rpartition("mixer.")[2] for name, parameter in table.items() if parameter.decay}
    assert decayed == {
        "backbone.embeddings.weight", "lm_head.weight", "in_proj.weight", "conv1d.weight", "x_proj.weight",
        "dt_proj.weight", "out_proj.weight",
    }  # fmt: skip
    kept = {name.rpartition("mixer.")[2] for name, parameter in table.items() if parameter.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}
