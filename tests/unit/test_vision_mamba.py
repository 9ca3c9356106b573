"""Vision Mamba's config, initial values and decay, without a framework."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import tasks
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel

CONFIG = mc.VisionMambaConfig(d_model=128, n_layer=4)


@pytest.fixture(scope="module")
def values():
    return dict(initial_values(CONFIG, 0))


def assert_deviation(value, deviation, most=np.inf):
    """Its mean is zero, in sizes for which that is known to two parts in a hundred."""
    assert abs(value.std() / deviation - 1) < 0.02
    assert abs(value.mean()) < 0.02 * deviation
    assert np.abs(value).max() <= most


def test_initial_values_are_those_of_the_original(values):
    cut = 16**-1 * 3**-0.5
    assert_deviation(values["patch_embed.weight"], cut, most=2 * cut / 0.8796 + 1e-6)
    assert np.abs(values["patch_embed.weight"]).max() > 2 * cut
    assert_deviation(values["pos_embed"], 0.02)
    assert_deviation(values["head.weight"], 0.02)
    assert 0.01 < values["cls_token"].std() < 0.03
    for name in ("patch_embed.bias", "head.bias", "backbone.layers.0.mixer.dt_proj_b.bias"):
        assert not values[name].any(), name
    prefix = "backbone.layers.3.mixer."
    mixer = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    for name in ("A_log", "A_b_log"):
        np.testing.assert_allclose(mixer[name], np.log(np.arange(1, 17))[None].repeat(256, 0), rtol=1e-6)
    for name, bound in {"conv1d": 0.5, "conv1d_b": 0.5, "x_proj": 256**-0.5, "x_proj_b": 256**-0.5}.items():
        assert 0.9 * bound < np.abs(mixer[f"{name}.weight"]).max() <= bound
        assert mixer[f"{name}.weight"].std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (mixer["conv1d.weight"] != mixer["conv1d_b.weight"]).any()
    assert 0.9 * 8**-0.5 < np.abs(mixer["dt_proj_b.weight"]).max() <= 8**-0.5
    assert (mixer["D_b"] == 1).all()
    assert mixer["dt_proj.bias"].any()
    assert_deviation(mixer["out_proj.weight"], 256**-0.5 / 4**0.5 / 3**0.5)


def test_what_decays_is_what_decayed_in_the_original():
    """timm's rule, vectors and biases do not; and A does, whose mark timm does not read."""
    without = {name for name, parameter in parameter_table(CONFIG).items() if not parameter.decay}
    for name, parameter in parameter_table(CONFIG).items():
        vector = len(parameter.shape) == 1 or name in ("pos_embed", "cls_token")
        assert (name in without) == vector, name


def test_the_rates_of_the_dropped_paths_rise():
    config = dataclasses.replace(CONFIG, drop_path_rate=0.3)
    np.testing.assert_allclose([config.drop_rate(layer) for layer in range(4)], np.linspace(0, 0.3, 4))
    assert mc.VisionMambaConfig(d_model=8, n_layer=1, drop_path_rate=0.3).drop_rate(0) == 0


@pytest.mark.parametrize("place", ["middle", "first", "double", "none"])
def test_class_tokens_stand_where_they_are_read(place):
    """The sequence, told from a model without blocks' effect: out_proj is zero."""
    options = {"image_size": (4, 6), "patch_size": 2, "class_token": place, "channels": 1, "num_classes": 3}
    config = mc.VisionMambaConfig(d_model=4, n_layer=1, d_state=2, task_options=options)
    values = dict(initial_values(config, 0))
    values["backbone.layers.0.mixer.out_proj.weight"] *= 0
    image, nodes = np.random.default_rng(0).normal(size=(1, 1, 4, 6)), {}
    ReferenceModel(config, values)(image, observe=nodes.__setitem__)
    patches = nodes["patch_embed"][0]
    by_hand = [values["patch_embed.weight"][:, 0].reshape(4, 4) @ image[0, 0, r : r + 2, c : c + 2].ravel()
               for r in (0, 2) for c in (0, 2, 4)]  # fmt: skip
    np.testing.assert_allclose(patches, by_hand, atol=1e-7)
    tokens = [values[name][0, 0] for name in ("cls_token", "cls_token_head", "cls_token_tail") if name in values]
    at = {"middle": [3], "first": [0], "double": [0, 6], "none": []}[place]
    expected = np.insert(patches, at, np.reshape(tokens, (-1, 4)), axis=0) + values["pos_embed"][0]
    np.testing.assert_allclose(nodes["embedding"][0], expected, atol=1e-7)
    rows = {"middle": [3], "first": [0], "double": [0, 7], "none": range(6)}[place]
    np.testing.assert_allclose(nodes["classified"], nodes["norm_f"][:, list(rows)].mean(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bimamba_type": "v3"}, "bimamba_type is 'v3'; expected 'v1' or 'v2'"),
        ({"divide_output": 1}, "divide_output is 1; expected true or false"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0; expected a number >= 0 and < 1"),
        ({"task_options": {"image_size": 8}}, "image_size has 8 rows and 8 columns, fewer than a patch"),
        ({"task_options": {"image_size": (8, 8, 8)}}, "image_size is .*; expected a size, or the two"),
        ({"task_options": {"patch_size": None}}, "patch_size is None; expected a size"),
        ({"task_options": {"stride": 0}}, "stride is 0; expected a size"),
        ({"task_options": {"class_token": "last"}}, "class_token is 'last'; expected one of middle, first"),
        ({"task_options": {"num_classes": 0}}, "num_classes is 0; expected a size"),
        ({"task_options": {"channels": True}}, "channels is True; expected a size"),
        ({"task_options": {"class_first": 1}}, "class_first is 1; expected true or false"),
        ({"task_options": {"size": 8}}, "task_options do not fit task 'image_classification'"),
    ],
)
def test_what_is_no_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mc.VisionMambaConfig(**fields)


def test_a_loss_is_that_of_the_classes():
    """Its gradient is that of what is measured."""
    config = mc.VisionMambaConfig(d_model=4, n_layer=1, task_options={"num_classes": 5})
    logits, targets = np.random.default_rng(0).normal(size=(3, 5)), np.array([0, 4, 2])
    loss, gradient = tasks.of(config).loss(config, logits, targets)
    assert loss == pytest.approx(
        -np.mean([np.log(np.exp(row[t]) / np.exp(row).sum()) for row, t in zip(logits, targets, strict=True)])
    )
    for index in np.ndindex(3, 5):
        moved = logits.copy()
        moved[index] += 1e-6
        assert (tasks.of(config).loss(config, moved, targets)[0] - loss) / 1e-6 == pytest.approx(
            gradient[index], abs=1e-5
        )
