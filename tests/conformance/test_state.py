"""The decode state as a file: what one backend writes, every backend goes on from."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mamba_core as mc
from mamba_core import architectures, registry
from mamba_core.backend import State
from mamba_core.registry import installed
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.weights.formats import CheckpointError

from .assertions import assert_close
from .cases import configs
from .strategies import tokens

CONFIG = configs()["mamba odd"]
STEPPING = {name: config for name, config in configs().items() if architectures.traits(config).steps}


def logits(backend, model, ids, state=None, **positions):
    native = {name: backend.from_numpy(value, device=model.device) for name, value in positions.items()}
    out = model(backend.from_numpy(ids, device=model.device), state, **native)
    return backend.to_numpy(out.logits), out.state


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in STEPPING), ("mamba odd", "bfloat16")])
def test_prefill_here_go_on_anywhere(backend, name, dtype, tmp_path):
    config = STEPPING[name]
    ids, more = tokens(config, 2, 13), tokens(config, 2, 6, seed=1)
    packs = architectures.traits(config).packs
    positions = {"segment_ids": np.repeat([3, 5], [7, 6])[None].repeat(2, 0).astype(np.int32)} if packs else {}
    model = mc.build(config, backend=backend.name, dtype=dtype)
    _, state = logits(backend, model, ids, **positions)
    mc.save_state(state, tmp_path / "state.safetensors", model)
    reference = ReferenceModel(config, {key: np.asarray(value) for key, value in backend.parameters(model).items()})
    wanted = reference(more, reference(ids, **positions).state).logits
    for other_name in installed():
        there = registry.get(other_name)
        other = there.build(config, initial_values(config), dtype=dtype)
        loaded = mc.load_state(tmp_path / "state.safetensors", other)
        found, _ = logits(there, other, more, loaded)
        assert_close(found, wanted, dtype, "value", f"{name}: {backend.name} to {other_name}")
        for layer, original in zip(loaded.layers, state.layers, strict=True):
            for field in layer._fields:
                stored, value = backend.to_numpy(getattr(original, field)), there.to_numpy(getattr(layer, field))
                np.testing.assert_array_equal(value, stored)
        assert there.to_numpy(loaded.segment).tolist() == ([5, 5] if packs else [0, 0])


def test_a_state_of_another_config_is_refused(backend, tmp_path):
    model = mc.build(CONFIG, backend=backend.name)
    mc.save_state(model.init_state(1), tmp_path / "state.safetensors", model)
    for change in ({"d_state": 7}, {"norm_eps": 1e-6}, {"n_layer": 1}):
        other = mc.build(dataclasses.replace(CONFIG, **change), backend=backend.name)
        with pytest.raises(CheckpointError, match="not the state of a model with this config"):
            mc.load_state(tmp_path / "state.safetensors", other)
    mc.save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="not the state"):
        mc.load_state(tmp_path / "model" / "model.safetensors", model)
    with pytest.raises(CheckpointError, match="no such file"):
        mc.load_state(tmp_path / "nowhere.safetensors", model)


def test_what_is_no_state_of_the_model_is_not_written(backend, tmp_path):
    model, path = mc.build(CONFIG, backend=backend.name), tmp_path / "state.safetensors"
    empty = model.init_state(2)
    for state in (None, 3, empty.layers):
        with pytest.raises(TypeError, match=f"state is {type(state).__name__}; expected a State"):
            mc.save_state(state, path, model)
    others = [mc.build(CONFIG, backend=name).init_state(2) for name in installed()]
    foreign = [other for other in others if type(other.segment) is not type(empty.segment)]
    for state in (*foreign, ReferenceModel(CONFIG, dict(initial_values(CONFIG))).init_state(2)):
        with pytest.raises(TypeError, match=rf"state has \S+ for segment; expected arrays of .* {model.backend!r}"):
            mc.save_state(state, path, model)
    wide = mc.build(dataclasses.replace(CONFIG, d_state=CONFIG.d_state + 1), backend=backend.name)
    for state in (
        State(empty.layers[:1], empty.segment),
        State(empty.layers, model.init_state(1).segment),
        wide.init_state(2),
    ):
        with pytest.raises(ValueError, match="state is not one of a model with this config"):
            mc.save_state(state, path, model)
    with pytest.raises(ValueError, match=r"give a name that ends in \.safetensors"):
        mc.save_state(empty, tmp_path / "state", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("segment", lambda array: array.astype(np.uint32), "segment is uint32"),
        ("segment", lambda array: array.astype(np.int64), "segment is int64"),
        ("segment", lambda array: array[0], "segment has shape"),
        ("segment", lambda array: array[:1], "layers.0.conv has shape"),
        ("layers.0.ssm", lambda array: array.astype(np.int32), "layers.0.ssm is int32"),
        ("layers.0.ssm", lambda array: array[..., :-1], "layers.0.ssm has shape"),
    ],
)
def test_a_file_that_does_not_fit_is_not_read(backend, name, change, message, tmp_path):
    model, path = mc.build(CONFIG, backend=backend.name), tmp_path / "state.safetensors"
    mc.save_state(model.init_state(2), path, model)
    arrays = load_file(path)
    marks = {"mamba_core_state": CONFIG.fingerprint}
    save_file(arrays | {name: np.array(change(arrays[name]), order="C")}, path, metadata=marks)
    with pytest.raises(CheckpointError, match=message):
        mc.load_state(path, model)
    save_file({key: arrays[key] for key in arrays if key != name}, path, metadata=marks)
    with pytest.raises(CheckpointError, match=f"missing or unexpected: {name}"):
        mc.load_state(path, model)
