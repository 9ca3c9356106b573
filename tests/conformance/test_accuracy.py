"""What the project promises of a model of real proportions, with initial values as published."""

import functools

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2
from mamba_core.tasks.lm import cross_entropy

CONFIG = mc.MambaConfig(d_model=256, n_layer=4, vocab_size=1000)
TOKENS = np.random.default_rng(0).integers(0, 1000, (1, 513)).astype(np.int32)


@functools.cache
def reference():
    model = ReferenceModel(CONFIG, dict(initial_values(CONFIG)))
    logits = model(TOKENS[:, :-1]).logits
    loss, dlogits = cross_entropy(logits, TOKENS[:, 1:])
    gradients, _ = model.vjp(dlogits, TOKENS[:, :-1])
    return logits, loss, gradients


def logits(backend, dtype):
    model = mc.build(CONFIG, backend=backend.name, dtype=dtype)
    return backend.to_numpy(model(backend.from_numpy(TOKENS[:, :-1], device=model.device)).logits)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 4e-3)])
def test_logits(backend, dtype, limit):
    assert relative_l2(logits(backend, dtype), reference()[0]) <= limit


def test_gradients_of_every_parameter(backend):
    _, loss, expected = reference()
    found, gradients = backend.loss_and_gradients(mc.build(CONFIG, backend=backend.name), TOKENS)
    assert found == pytest.approx(loss, rel=1e-6)
    errors = {name: relative_l2(gradients[name], value) for name, value in expected.items()}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)
