"""Against MiniMamba's own models, with our weights under their names: architecture "minimamba" is their arithmetic."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.mamba import MambaConfig
from mamba_core.architectures.minimamba import MiniMambaConfig
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance

torch = pytest.importorskip("torch")
minimamba = pytest.importorskip("minimamba")

BASE = MiniMambaConfig(d_model=24, n_layer=2, vocab_size=61, initializer_range=0.1)
VARIANTS = {
    "base": {},
    "untied": {"tie_embeddings": False, "conv_bias": False, "norm_eps": 1e-2},
    "sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "pad_vocab_size_multiple": 1},
    "features": {"task": "features", "bias": True},
}
# Theirs is a loop up to 32 positions, then chunks; a length of each.
LENGTHS = (19, 75)
RENAMED = {
    "backbone.embeddings.weight": "embedding.token_embedding.weight",
    "backbone.norm_f.weight": "backbone.norm.weight",
    "lm_head.weight": "lm_head.lm_head.weight",
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def values(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used; in float32 exactly."""
    rng = np.random.default_rng(7)
    moved = {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}
    return {name: value.astype(np.float32) for name, value in moved.items()}


@pytest.fixture(params=LENGTHS)
def ids(config, request):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, request.param)).astype(np.int32)


def their_model(config, values):
    fields = {item.name for item in dataclasses.fields(minimamba.MambaLMConfig)}
    same = {name: value for name, value in dataclasses.asdict(config).items() if name in fields}
    their_config = minimamba.MambaLMConfig(
        **same | {"dt_rank": config.dt_rank_size, "norm_epsilon": config.norm_eps, "device": "cpu"}
    )
    kind = minimamba.MambaForCausalLM if config.task == "lm" else minimamba.MambaForFeatureExtraction
    model = kind(their_config).double()
    theirs = {RENAMED.get(name, name): torch.from_numpy(value).double() for name, value in values.items()}
    if config.task == "lm" and config.tie_embeddings:
        theirs["lm_head.lm_head.weight"] = theirs["embedding.token_embedding.weight"]
    model.load_state_dict(theirs, strict=True)
    return model


def run(model, ids):
    """Their mixer calls .float() inside; their algorithm in float64 is what is wanted."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return model(torch.from_numpy(ids).long())


def test_reference_equals_their_model(config, values, ids):
    expected = run(their_model(config, values), ids).detach().numpy()
    found = ReferenceModel(config, values)(ids)[0]
    assert relative_l2(found, expected) <= tolerance("float64")


def test_gradients_equal_their_model(config, values, ids):
    model = their_model(config, values)
    output = run(model, ids)
    weights = np.random.default_rng(1).normal(size=output.shape)
    (output * torch.from_numpy(weights)).sum().backward()
    ours, _ = ReferenceModel(config, values).vjp(weights, ids)
    for name, gradient in ours.items():
        assert relative_l2(gradient, model.get_parameter(RENAMED.get(name, name)).grad.numpy()) <= 1e-11, name


def test_it_is_not_mamba(config, values, ids):
    """Why it is an architecture of its own: with the same weights Mamba computes something else."""
    mamba = ReferenceModel(MambaConfig(**vars(config)), values)(ids)[0]
    assert relative_l2(mamba, run(their_model(config, values), ids).detach().numpy()) > 0.1


def test_backend_equals_their_model(backend, config, values, ids):
    model = backend.build(config, values.items())
    found = backend.to_numpy(model(backend.from_numpy(ids, device=model.device))[0])
    expected = run(their_model(config, values), ids).detach().numpy()
    assert relative_l2(found, expected) <= tolerance("float32")


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForCausalLM", "MambaModel", "MambaForCausalLM"])
def test_transformers_refuses_what_it_would_compute_otherwise(transformers, kind, config, tmp_path):
    mc.save(mc.build(config, backend="torch"), tmp_path / "saved")
    with pytest.raises((ValueError, KeyError), match="minimamba"):
        getattr(transformers, kind).from_pretrained(tmp_path / "saved")
