"""Against the kernels of mamba_ssm and causal_conv1d and the model built on them, on an NVIDIA GPU.

They compile theirs with approximate exponentials and quotients (--use_fast_math), so in float32 THEIRS allows more than
the limits that our kernels have against the reference.
"""

import dataclasses
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.config import MambaConfig
from mamba_core.spec.params import parameter_table
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.weights.opening import open_model
from tests.oracles import test_causal_conv1d as conv1d
from tests.oracles import test_mamba_ssm as mamba_ssm
from tests.oracles.test_interop import written

torch = pytest.importorskip("torch")
TORCH = registry.get("torch")

COMPILED = all(find_spec(name) is not None for name in ("selective_scan_cuda", "causal_conv1d_cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (COMPILED and torch.cuda.is_available()),
        reason="needs an NVIDIA GPU, and mamba_ssm and causal_conv1d compiled for it",
    ),
]

THEIRS = {"value": 1e-5, "gradient": 5e-5}
DTYPES = ("float32", "bfloat16", "float16")
# A chunk of their scan is 2,048 positions.
SCANS = ((1, 16), (33, 1), (128, 8), (2048, 16), (2049, 16), (5000, 5), (300, 64), (40, 256))
BASE = MambaConfig(d_model=48, n_layer=3, vocab_size=64, initializer_range=0.1)
VARIANTS = {
    "tied": {},
    "untied": {"tie_embeddings": False, "bias": True, "conv_bias": False},
    "sizes": {"d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 7},
}


@pytest.fixture(scope="module")
def theirs():
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return SimpleNamespace(
        scan=selective_scan_fn, step=selective_state_update, conv=causal_conv1d_fn, model=MambaLMHeadModel
    )


def limit(dtype, kind="value"):
    return THEIRS[kind] if dtype == "float32" else tolerance(dtype, kind)


def on_gpu(backend, arrays):
    """The backend's arrays for PyTorch, on the GPU and to be differentiated."""
    values = {name: np.asarray(backend.to_numpy(value)) for name, value in arrays.items()}
    return {name: TORCH.from_numpy(value, device="cuda").requires_grad_() for name, value in values.items()}


def assert_same(backend, ours, theirs, arrays, dtype):
    """y of both, and its gradients with respect to every array."""
    leaves = on_gpu(backend, arrays)
    expected = theirs(leaves)
    cotangent = backend.from_numpy(np.random.default_rng(3).normal(size=expected.shape), dtype=dtype)
    expected.backward(on_gpu(backend, {"dy": cotangent})["dy"].detach())

    def function(*values):
        return (ours(dict(zip(arrays, values, strict=True))),)

    (y,), gradients = backend.vjp(function, list(arrays.values()), [cotangent])
    assert relative_l2(y, TORCH.to_numpy(expected)) <= limit(dtype)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        expected = TORCH.to_numpy(leaf.grad)
        if gradient.any():
            assert relative_l2(gradient, expected) <= limit(dtype, "gradient"), name
        else:  # that of A for one position, which theirs rounds to some 1e-7
            assert np.abs(expected).max() <= 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "states"), SCANS)
def test_scan(theirs, backend, length, states, dtype):
    drawn = mamba_ssm.draw_as_theirs(np.random.default_rng(length), 2, length, 24, states)
    arrays, _ = mamba_ssm.rounded_as_stored(backend, drawn, dtype)
    assert_same(
        backend,
        lambda named: backend.op("selective_scan").selective_scan(**named, delta_softplus=True),
        lambda leaves: theirs.scan(**mamba_ssm.turned(leaves), delta_softplus=True).mT,
        arrays,
        dtype,
    )


def test_final_state(theirs, backend):
    """Theirs has no gradient."""
    arrays, _ = mamba_ssm.rounded_as_stored(
        backend, mamba_ssm.draw_as_theirs(np.random.default_rng(0), 2, 3000, 24, 16), "float32"
    )
    _, state = backend.op("selective_scan").selective_scan(**arrays, delta_softplus=True, return_final_state=True)
    leaves = mamba_ssm.turned(on_gpu(backend, arrays))
    _, expected = theirs.scan(**leaves, delta_softplus=True, return_last_state=True)
    assert relative_l2(backend.to_numpy(state), TORCH.to_numpy(expected)) <= limit("float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [16, 64])
def test_scan_step(theirs, backend, states, dtype):
    arrays, _ = mamba_ssm.rounded_as_stored(backend, mamba_ssm.draw_step_as_theirs(states, 2064, states), dtype)
    y, state = backend.op("selective_scan").selective_step(**arrays, delta_softplus=True)
    their_names = {"delta": "dt", "delta_bias": "dt_bias"}
    leaves = {their_names.get(name, name): leaf.detach() for name, leaf in on_gpu(backend, arrays).items()}
    expected = theirs.step(**leaves, dt_softplus=True)
    assert relative_l2(backend.to_numpy(y), TORCH.to_numpy(expected)) <= limit(dtype)
    assert relative_l2(backend.to_numpy(state), TORCH.to_numpy(leaves["state"])) <= limit("float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("carried", [False, True])
def test_conv(theirs, backend, carried, width, dtype):
    drawn = conv1d.draw(width, 2, 1030, conv1d.CHANNELS, width)
    if not carried:
        del drawn["initial_state"]
    arrays = {name: backend.from_numpy(value, dtype=dtype) for name, value in drawn.items()}

    def their_conv(leaves):
        names = {"x": leaves["x"].mT, "weight": leaves["weight"], "bias": leaves["bias"]}
        if carried:
            names["initial_states"] = leaves["initial_state"].mT
        return theirs.conv(**names, activation="silu").mT

    assert_same(
        backend,
        lambda named: backend.op("causal_conv").causal_conv(**named, activation="silu"),
        their_conv,
        arrays,
        dtype,
    )


# --- the model -------------------------------------------------------------------------------------


@pytest.fixture(params=VARIANTS)
def folder(request, tmp_path):
    return written(tmp_path / "ours", dataclasses.replace(BASE, **VARIANTS[request.param]), "mamba_ssm")


@pytest.fixture
def model(theirs, folder):
    """Their model with our checkpoint, which it loads strictly."""
    model = theirs.model.from_pretrained(str(folder), device="cuda", dtype=torch.float32)
    for layer in model.backbone.layers:  # theirs in one piece has no gradient without a bias of the convolution
        layer.mixer.use_fast_path = layer.mixer.conv1d.bias is not None
    return model


def ids(length):
    return np.random.default_rng(0).integers(0, BASE.vocab_size, (2, length)).astype(np.int32)


def on_cuda(tokens):
    return torch.from_numpy(tokens).long().cuda()


def test_model_of_theirs_both_ways(model, folder, tmp_path):
    with torch.no_grad():
        logits = TORCH.to_numpy(model(on_cuda(ids(300))).logits)
    model.save_pretrained(str(tmp_path / "theirs"))
    for checkpoint in (folder, tmp_path / "theirs"):
        opened = open_model(checkpoint)
        assert opened.layout == "mamba_ssm"
        ours = ReferenceModel(opened.config, dict(opened.tensors()))(ids(300)).logits
        assert relative_l2(logits, ours) <= limit("float32")


def test_logits_and_gradients_of_the_model(model, folder, backend):
    ours = mc.load(folder, backend=backend.name)
    tokens = ids(301)
    logits = model(on_cuda(tokens[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), on_cuda(tokens[:, 1:]).flatten())
    loss.backward()
    found = backend.to_numpy(ours(backend.from_numpy(tokens[:, :-1], device=ours.device)).logits)
    assert relative_l2(found, TORCH.to_numpy(logits)) <= limit("float32")
    our_loss, gradients = backend.loss_and_gradients(ours, tokens)
    assert abs(our_loss - loss.item()) <= 1e-5 * loss.item()
    for name in parameter_table(ours.config):
        expected = model.get_parameter(name.replace("embeddings", "embedding")).grad
        assert relative_l2(gradients[name], TORCH.to_numpy(expected)) <= limit("float32", "gradient"), name


def test_greedy_generation(model, folder, backend):
    prompts = ids(20)
    expected = model.generate(on_cuda(prompts), max_length=60, top_k=1)[:, 20:]
    found = mc.generate(mc.load(folder, backend=backend.name), prompts.tolist(), max_new_tokens=40).tokens
    assert [list(row) for row in found] == expected.tolist()
