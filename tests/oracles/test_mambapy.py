"""Against mambapy, run in float64: its scan, its block, its model and its step, with our weights under its names."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.config import MambaConfig
from mamba_core.spec.init import initial_values
from mamba_core.spec.ops import selective_scan as scan_spec
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance

torch = pytest.importorskip("torch")
pytest.importorskip("einops")
mamba = pytest.importorskip("mambapy.mamba")

# Untied, because its model has a head of its own always.
BASE = MambaConfig(d_model=24, n_layer=2, vocab_size=61, tie_embeddings=False, initializer_range=0.1)
VARIANTS = {
    "base": {},
    "biases": {"bias": True, "conv_bias": False},
    "sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7},
    "small": {"d_state": 1, "d_conv": 2, "expand": 1, "dt_rank": 1, "norm_eps": 1e-2},
}


def in_float64(function, *args):
    """Its block calls .float() inside; its algorithm in float64 is what is wanted."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return function(*args)


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(BASE, **VARIANTS[request.param])


@pytest.fixture
def values(config):
    """Initial values moved off zero and one, which would hide a parameter that is not used."""
    rng = np.random.default_rng(7)
    return {name: value + 0.05 * rng.normal(size=value.shape) for name, value in initial_values(config, 3)}


@pytest.fixture
def ids(config):
    # Without 0: theirs takes it for padding, which has a test of its own below.
    return np.random.default_rng(0).integers(1, config.vocab_size, (2, 37)).astype(np.int32)


def their_name(name):
    name = name.replace("backbone.embeddings.", "embedding.").replace("backbone.norm_f.", "norm_f.")
    return name.replace("backbone.layers.", "mamba.layers.")


def their_config(config, pscan=True):
    return mamba.MambaConfig(
        d_model=config.d_model,
        n_layers=config.n_layer,
        dt_rank=config.dt_rank,
        d_state=config.d_state,
        expand_factor=config.expand,
        d_conv=config.d_conv,
        rms_norm_eps=config.norm_eps,
        bias=config.bias,
        conv_bias=config.conv_bias,
        pscan=pscan,
    )


def their_model(lm, config, values, pscan=True):
    model = lm.LM(their_config(config, pscan), config.vocab_size, config.pad_vocab_size_multiple).double()
    model.load_state_dict({their_name(name): torch.from_numpy(value) for name, value in values.items()}, strict=True)
    return model


def run(model, ids):
    return in_float64(model, torch.from_numpy(ids).long())


@pytest.mark.parametrize("pscan", [True, False])
def test_reference_equals_their_model(lm, config, values, ids, pscan):
    expected = run(their_model(lm, config, values, pscan), ids).detach().numpy()
    assert relative_l2(ReferenceModel(config, values)(ids).logits, expected) <= 1e-12


def test_gradients_equal_their_model(lm, config, values, ids):
    model = their_model(lm, config, values)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))
    (run(model, ids) * torch.from_numpy(weights)).sum().backward()
    ours, _ = ReferenceModel(config, values).vjp(weights, ids)
    for name, gradient in ours.items():
        assert relative_l2(gradient, model.get_parameter(their_name(name)).grad.numpy()) <= 1e-11, name


def test_token_0_has_a_gradient(lm, ids):
    """Theirs drops it (padding_idx=0). Their own forward, moved to either side, says that ours is right."""
    values, ids = dict(initial_values(BASE, 3)), ids.copy()
    ids[:, 5] = 0
    values = {name: value.astype(np.float64) for name, value in values.items()}
    weights = np.random.default_rng(1).normal(size=(*ids.shape, BASE.padded_vocab_size))
    model = their_model(lm, BASE, values)
    (run(model, ids) * torch.from_numpy(weights)).sum().backward()
    assert not model.embedding.weight.grad[0].any()

    ours, _ = ReferenceModel(BASE, values).vjp(weights, ids)
    step = 1e-5
    with torch.no_grad():
        model.embedding.weight[0, 0] += step
        above = (run(model, ids).numpy() * weights).sum()
        model.embedding.weight[0, 0] -= 2 * step
        below = (run(model, ids).numpy() * weights).sum()
    measured = (above - below) / (2 * step)
    assert abs(ours["backbone.embeddings.weight"][0, 0] - measured) <= 1e-6 * abs(measured)


def test_steps_and_their_caches_equal_the_reference(lm, config, values, ids):
    model = their_model(lm, config, values)
    caches = [(None, torch.zeros(len(ids), config.d_inner, config.d_conv - 1)) for _ in range(config.n_layer)]
    reference = ReferenceModel(config, values)
    with torch.no_grad():
        stepped = []
        for position in torch.from_numpy(ids).long().unbind(1):
            logits, caches = in_float64(model.step, position, caches)
            stepped.append(logits.numpy())
    logits, state = reference(ids)
    assert relative_l2(logits, np.stack(stepped, axis=1)) <= 1e-12
    for layer, (h, inputs) in zip(state.layers, caches, strict=True):
        assert relative_l2(layer.ssm, h.numpy()) <= 1e-12
        assert relative_l2(layer.conv, inputs.mT.numpy()) <= 1e-12


def test_backend_equals_their_model(lm, backend, config, values, ids):
    stored = {name: value.astype(np.float32) for name, value in values.items()}
    model = backend.build(config, stored.items())
    logits = backend.to_numpy(model(backend.from_numpy(ids, device=model.device)).logits)
    exact = {name: value.astype(np.float64) for name, value in stored.items()}
    expected = run(their_model(lm, config, exact), ids).detach().numpy()
    assert relative_l2(logits, expected) <= tolerance("float32")


def test_backend_blocks_equal_theirs(backend, config, values, ids):
    """Every block from the input that ours had, so that no error is passed on from the block before."""
    stored = {name: value.astype(np.float32) for name, value in values.items()}
    model, nodes = backend.build(config, stored.items()), {}
    model(
        backend.from_numpy(ids, device=model.device), observe=lambda name, v: nodes.update({name: backend.to_numpy(v)})
    )
    for layer in range(config.n_layer):
        prefix = f"backbone.layers.{layer}.mixer."
        block = mamba.MambaBlock(their_config(config)).double()
        named = {k.removeprefix(prefix): torch.from_numpy(v).double() for k, v in stored.items() if prefix in k}
        block.load_state_dict(named, strict=True)
        expected = in_float64(block, torch.tensor(nodes[f"layers.{layer}.norm"]).double())
        assert relative_l2(nodes[f"layers.{layer}.out_proj"], expected.detach().numpy()) <= tolerance(
            "float32", "node"
        ), layer


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 5), st.integers(1, 9)),
)
def test_reference_equals_pscan(seed, shape):
    """Lengths that are powers of two and not, step sizes from 1e-6 to 20."""
    batch, length, channels, states = shape
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(size=(batch, length, channels)), "A": -np.exp(rng.normal(size=(channels, states)))}
    arrays["delta"] = np.exp(rng.uniform(np.log(1e-6), np.log(20.0), (batch, length, channels)))
    arrays |= {name: rng.normal(size=(batch, length, states)) for name in ("B", "C")}
    dy, dh = rng.normal(size=(batch, length, channels)), rng.normal(size=(batch, channels, states))
    y, h = scan_spec.selective_scan(**arrays, return_final_state=True)
    ours = scan_spec.selective_scan_vjp(dy, dh, **arrays)

    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in arrays.items()}
    states_of_all = their_states(**{name: value for name, value in tensors.items() if name != "C"})
    their_y = torch.einsum("blen,bln->ble", states_of_all, tensors["C"])
    their_h = states_of_all[:, -1]
    ((their_y * torch.from_numpy(dy)).sum() + (their_h * torch.from_numpy(dh)).sum()).backward()
    assert relative_l2(y, their_y.detach().numpy()) <= 1e-12
    assert relative_l2(h, their_h.detach().numpy()) <= 1e-12
    for name, tensor in tensors.items():
        assert relative_l2(ours[name], tensor.grad.numpy()) <= 1e-11, name


def their_states(x, delta, A, B):
    """(b, l, e, n), discretised as their MambaBlock.selective_scan does."""
    return mamba.pscan(torch.exp(delta[..., None] * A), delta[..., None] * B[:, :, None] * x[..., None])
