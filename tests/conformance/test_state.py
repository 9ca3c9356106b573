"""The decode state as a file: what one backend writes, every backend goes on from."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.parity import installed
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.weights.io import CheckpointError

from .assertions import assert_close
from .strategies import CONFIGS, tokens

CONFIG = CONFIGS["odd"]


def logits(backend, model, ids, state=None, **positions):
    native = {name: backend.from_numpy(value, device=model.device) for name, value in positions.items()}
    out = model(backend.from_numpy(ids, device=model.device), state, **native)
    return backend.to_numpy(out.logits), out.state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_here_go_on_anywhere(backend, dtype, tmp_path):
    ids, more = tokens(CONFIG, 2, 13), tokens(CONFIG, 2, 6, seed=1)
    segment_ids = np.repeat([3, 5], [7, 6])[None].repeat(2, 0).astype(np.int32)
    model = mc.build(CONFIG, backend=backend.name, dtype=dtype)
    _, state = logits(backend, model, ids, segment_ids=segment_ids)
    mc.save_state(state, tmp_path / "state.safetensors", model)
    reference = ReferenceModel(CONFIG, {key: np.asarray(value) for key, value in backend.parameters(model).items()})
    wanted = reference(more, reference(ids, segment_ids=segment_ids).state).logits
    for name in installed():
        there = registry.get(name)
        other = there.build(CONFIG, initial_values(CONFIG), dtype=dtype)
        loaded = mc.load_state(tmp_path / "state.safetensors", other)
        found, _ = logits(there, other, more, loaded)
        assert_close(found, wanted, dtype, "value", f"{backend.name} to {name}")
        for layer, original in zip(loaded.layers, state.layers, strict=True):
            for field in layer._fields:
                stored, value = backend.to_numpy(getattr(original, field)), there.to_numpy(getattr(layer, field))
                np.testing.assert_array_equal(value, stored)
        assert there.to_numpy(loaded.segment).tolist() == [5, 5]


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
