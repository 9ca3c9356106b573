"""Against transformers' MambaForCausalLM, both ways: it loads what we save, we load what it saves."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.config import MambaConfig
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2
from mamba_core.weights.opening import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("transformers")

BASE = MambaConfig(d_model=32, n_layer=3, vocab_size=61, initializer_range=0.1)
VARIANTS = {
    "base": {},
    "untied": {"tie_embeddings": False},
    "biases": {"bias": True, "conv_bias": False},
    "sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7},
    "eps": {"norm_eps": 1e-2, "residual_in_fp32": False},
    "square": {"expand": 1, "d_state": 8, "dt_rank": 16},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, BASE.vocab_size, (2, 37)).astype(np.int32)


def their_logits(folder, ids):
    model = transformers.MambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()


def our_logits(backend, folder, ids):
    model = mc.load(folder, backend=backend.name)
    return backend.to_numpy(model(backend.from_numpy(ids, device=model.device)).logits)


@pytest.fixture
def saved_by_them(config, tmp_path):
    """A randomly initialised model of theirs, saved by their `save_pretrained`."""
    torch.manual_seed(0)
    their_config = transformers.MambaConfig(**{k: v for k, v in config.to_hf().items() if k != "mamba_core"})
    model = transformers.MambaForCausalLM(their_config)
    with torch.no_grad():  # their initial biases are zero, which would hide a bias that is not used
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_backend_equals_transformers_on_its_checkpoint(backend, saved_by_them, ids):
    assert relative_l2(our_logits(backend, saved_by_them, ids), their_logits(saved_by_them, ids)) <= 1e-6


def test_transformers_equals_backend_on_our_checkpoint(backend, config, ids, tmp_path):
    mc.save(mc.build(config, backend=backend.name, seed=3), tmp_path / "ours")
    assert relative_l2(their_logits(tmp_path / "ours", ids), our_logits(backend, tmp_path / "ours", ids)) <= 1e-6


def test_reference_equals_transformers(saved_by_them, ids):
    opened = open_model(saved_by_them)
    model = ReferenceModel(opened.config, dict(opened.tensors()))
    assert relative_l2(their_logits(saved_by_them, ids), model(ids).logits) <= 1e-6


def test_transformers_finds_every_parameter_and_no_other(config, tmp_path):
    mc.save(mc.build(config, backend="torch"), tmp_path / "ours")
    _, report = transformers.MambaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report


def test_config_is_theirs_field_by_field(config, saved_by_them):
    assert open_model(saved_by_them).config == dataclasses.replace(
        config,
        vocab_size=config.padded_vocab_size,
        pad_vocab_size_multiple=1,
        rescale_prenorm_residual=False,
        **token_ids(saved_by_them),
    )


def token_ids(folder):
    theirs = transformers.AutoConfig.from_pretrained(folder)
    return {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def test_gradients_equal_transformers(saved_by_them, ids):
    opened = open_model(saved_by_them)
    theirs = transformers.MambaForCausalLM.from_pretrained(saved_by_them, dtype=torch.float64)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, opened.config.padded_vocab_size))
    logits = theirs(torch.from_numpy(ids).long(), use_cache=False).logits
    (logits.double() * torch.from_numpy(weights)).sum().backward()
    ours, _ = ReferenceModel(opened.config, dict(opened.tensors())).vjp(weights, ids)
    for name in parameter_table(opened.config):
        assert relative_l2(theirs.get_parameter(name).grad.numpy(), ours[name]) <= 2e-5, name
