"""Bad input to the public functions: an error that says what was given and what was expected, and never a number."""

import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.config import from_dict

CONFIG = mc.MambaConfig(d_model=8, n_layer=2, vocab_size=256, d_state=2)


@pytest.fixture(scope="module")
def model(backend):
    return mc.build(CONFIG, backend=backend.name)


@pytest.mark.parametrize("config", [None, {"d_model": 8}, 5])
def test_build_wants_a_config(config):
    with pytest.raises(TypeError, match="expected a preset's name or a config"):
        mc.build(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"device": "cpu:7"}, "device is 'cpu:7'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"kernels": "abacus"}, "no kernel 'abacus'"),
    ],
)
def test_build_names_what_it_cannot_have(backend, options, message):
    with pytest.raises(ValueError, match=message):
        mc.build(CONFIG, backend=backend.name, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": [1.5]}, "stop is 1.5"),
        ({"stop": [b"a"]}, "stop is b'a'"),
        ({"stop": None}, "stop is None"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": 1e-45}, "temperature is 1e-45"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"repetition_penalty": 1e39}, "repetition_penalty is 1e"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_generate_settings(model, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mc.generate(model, "x", **({"max_new_tokens": 2} | settings))


@pytest.mark.parametrize("prompts", [None, 3, [1.7, 2.2], [True, False], [], [[]], [[256]], [-1]])
def test_generate_prompts(model, prompts):
    with pytest.raises((TypeError, ValueError)):
        mc.generate(model, prompts, max_new_tokens=2)


def test_a_stop_token_of_numpy_counts(model):
    plain = mc.generate(model, "x", max_new_tokens=4).tokens[0]
    assert (
        mc.generate(model, "x", max_new_tokens=4, stop=np.int64(plain[1])).tokens[0]
        == plain[: plain.index(plain[1]) + 1]
    )


def test_stream_refuses_before_it_is_asked_for_a_piece(model):
    for settings in ({"temperature": -1.0}, {"stop": ""}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match=r"expected|empty"):
            mc.stream(model, "x", **settings)


@pytest.mark.parametrize("temperature", [1e-19, 1e-12, 1e-5, 1e3, 1e19])
def test_extreme_temperatures_give_tokens_of_the_distribution(model, temperature):
    greedy = mc.generate(model, "x", max_new_tokens=6).tokens
    found = mc.generate(model, "x", max_new_tokens=6, temperature=temperature).tokens
    assert temperature > 1 or found == greedy
    assert len(set(found[0])) > 1 or temperature < 1


def test_states_of_another_batch_or_model(backend, model):
    ids = backend.from_numpy(np.ones((2, 3), np.int32), device=model.device)
    with pytest.raises(TypeError, match="state is int; expected a State of 2 layers"):
        model(ids, 3)
    with pytest.raises(ValueError, match="state has 1 layers; expected 2"):
        model(ids, model.init_state(2)._replace(layers=model.init_state(2).layers[:1]))
    for state in (model.init_state(1), model.init_state(2)._replace(segment=model.init_state(1).segment)):
        with pytest.raises(ValueError, match="another batch"):
            model(ids, state)


@pytest.mark.parametrize(
    "fields",
    [[1, 2], None, {"ssm_cfg": 5}, {"hidden_size": "a"}, {"architecture": []}, {"d_model": 8, "eos_token_id": "x"},
     {"hidden_size": 8, "mamba_core": {"d_model": 4}}],
)  # fmt: skip
def test_configs(fields, tmp_path):
    with pytest.raises((TypeError, ValueError)):
        from_dict(fields)


def test_several_ends_of_text(backend, model):
    plain = mc.generate(model, "x", max_new_tokens=8).tokens[0]
    config = from_dict(json.loads(json.dumps(CONFIG.to_dict() | {"eos_token_id": [999, plain[2]]})))
    ending = backend.build(config, backend.parameters(model).items())
    result = mc.generate(ending, "x", max_new_tokens=8)
    assert result.tokens[0] == plain[: plain.index(plain[2]) + 1]
    assert result.finish_reasons == ["eos"]


def test_conversion_onto_itself_and_saved_dtype(backend, tmp_path):
    mc.save(mc.build(CONFIG, backend=backend.name, dtype="bfloat16"), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="is or holds the source"):
        mc.convert(tmp_path / "a", tmp_path / "a", to="hf", overwrite=True)
    assert mc.load(tmp_path / "a", backend=backend.name).dtype == "bfloat16"


def test_load_takes_the_layout_that_cannot_be_told(backend, model, tmp_path):
    mc.save(model, tmp_path / "out", layout="mambapy")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot tell the layout"):
        mc.load(tmp_path / "out", backend=backend.name)
    with pytest.raises(ValueError, match="layout is 'abacus'"):
        mc.load(tmp_path / "out", backend=backend.name, layout="abacus")
    loaded = backend.parameters(mc.load(tmp_path / "out", backend=backend.name, layout="mambapy"))
    for name, value in backend.parameters(model).items():
        np.testing.assert_array_equal(loaded[name], value)


def test_ops_look_for_their_backend_once(backend, monkeypatch):
    values = [backend.from_numpy(np.ones(shape)) for shape in ((1, 2), (1, 2), (2, 3), (1, 3), (1, 3))]
    state = backend.from_numpy(np.zeros((1, 2, 3)))
    mc.selective_step(*values, state=state)
    monkeypatch.setattr("mamba_core.registry.entry_points", None)
    mc.selective_step(*values, state=state)


def test_ops_on_numpy_take_a_kernel_by_name():
    x = np.ones((1, 2, 3))
    arguments = (x, x, -np.ones((3, 2)), np.ones((1, 2, 2)), np.ones((1, 2, 2)))
    np.testing.assert_array_equal(mc.selective_scan(*arguments, kernel="sequential"), mc.selective_scan(*arguments))
    with pytest.raises(ValueError, match="no kernel 'chunked' for NumPy"):
        mc.selective_scan(*arguments, kernel="chunked")
    with pytest.raises(TypeError, match="expected an array of numpy"):
        mc.selective_scan([[1.0]], *arguments[1:])
    with pytest.raises(ValueError, match="at least one of each"):
        mc.selective_scan(x[..., :0], x[..., :0], -np.ones((0, 2)), np.ones((1, 2, 2)), np.ones((1, 2, 2)))


def test_a_policy_of_kernels_that_is_none(backend):
    for kernels in (3, {"selective_scan": ["plain"]}, {1: "plain"}):
        with pytest.raises(TypeError, match=r"kernels is .*; expected"):
            mc.build(CONFIG, backend=backend.name, kernels=kernels)


def test_explaining_what_is_no_model_or_no_size(model):
    with pytest.raises(TypeError, match="model is NoneType; explaining needs a model of this library"):
        mc.explain(None)
    for sizes in ((0, 1), (1, 1.5), ("x", 1)):
        with pytest.raises(ValueError, match="expected integers from 1"):
            mc.explain(model, *sizes)
