"""Of a prompt, Mamba-2's last block gates, norms and projects the last position alone, on every backend."""

import importlib

import numpy as np
import pytest

from mamba_core import registry
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from tests.conformance.assertions import assert_close
from tests.conformance.cases.mamba2 import CONFIGS

IDS = np.arange(18, dtype=np.int32).reshape(2, 9) % 17


@pytest.fixture(params=["torch", "mlx", "jax"])
def framework(request):
    pytest.importorskip({"mlx": "mlx.core"}.get(request.param, request.param))
    return registry.get(request.param)


def values(config):
    """Initial values, and random ones instead of ones and zeros: a part that is left out makes a difference."""
    rng = np.random.default_rng(0)
    for name, value in initial_values(config, 0):
        drawn = name.endswith((".D", "norm.weight", "proj.bias"))
        yield name, rng.normal(size=value.shape).astype(value.dtype) if drawn else value


def built(backend, config, **settings):
    return backend.build(config, values(config), device="cpu", **settings)


def computed(backend, model) -> int:
    """Of how many positions the backbone returns the output where only the last is asked for."""
    positions = importlib.import_module(f"mamba_core.backends.{backend.name}.positions")
    call = positions.call_of(None, None, length=IDS.shape[1], last=True)
    arguments = (backend.from_numpy(IDS, device="cpu"), model.init_state(2), call)
    if backend.name != "torch":
        return model.backbone(*arguments)[0].shape[1]
    import torch

    with torch.no_grad():
        return model.backbone(*arguments)[0].shape[1]


# With the norm before the gate and channels beside the recurrence, and without a norm.
@pytest.mark.parametrize("name", ["odd", "bare"])
def test_a_prefill_is_the_reference_s_last_position(framework, name):
    model, wanted = built(framework, CONFIGS[name]), ReferenceModel(CONFIGS[name], dict(values(CONFIGS[name])))(IDS)
    assert computed(framework, model) == 1
    found = framework.prefill(model, IDS, np.ones(IDS.shape, bool))
    last = wanted.logits[:, -1, : CONFIGS[name].vocab_size]
    assert_close(framework.to_numpy(found.logits), last, "float32", "value", "logits")
    for layer, other in zip(found.state.layers, wanted.state.layers, strict=True):
        for value, state in zip(layer, other, strict=True):
            assert_close(framework.to_numpy(value), state, "float32", "value", "state")


def test_all_positions_where_a_part_of_the_mixer_is_another(framework):
    model = built(framework, CONFIGS["odd"])
    norm = model.backbone.layers[-1].mixer.norm
    norm.__class__ = type("Changed", (type(norm),), {})
    assert computed(framework, model) == IDS.shape[1]


def test_all_positions_in_bfloat16(framework):
    """Skipping the gates of the others would round before those of the last."""
    assert computed(framework, built(framework, CONFIGS["base"], dtype="bfloat16")) == IDS.shape[1]
