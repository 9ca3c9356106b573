"""Jamba's kernels in Triton against plain operations: on a GPU, and on a CPU in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so that these tests run again in a process of their own.
"""

import dataclasses
import importlib.util

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.ops import attention as spec
from mamba_core.spec.ops.attention import KeyValueCache, Rotary
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.cases.jamba import SMALL

torch = pytest.importorskip("torch")

from mamba_core.backends.torch import decoding, explain, private, quantize, training  # noqa: E402
from mamba_core.backends.torch.kernels import (  # noqa: E402
    triton,
    triton_attention_step,
    triton_experts_step,
    triton_feed_forward_step,
    triton_linear,
    triton_norm,
    triton_product,
)
from mamba_core.backends.torch.ops import swiglu  # noqa: E402
from mamba_core.backends.torch.ops.rms_norm import rms_norm  # noqa: E402
from mamba_core.backends.torch.ways import cuda_step  # noqa: E402
from mamba_core.sampling import Sampling  # noqa: E402
from tests.unit.triton_compile import run_in_the_interpreter  # noqa: E402

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
RUNS = triton.reason(torch.device(DEVICE)) is None and (triton.INTERPRETED or torch.cuda.is_available())
here = pytest.mark.skipif(not RUNS, reason="needs a GPU, or Triton's interpreter")
on_gpu = pytest.mark.skipif(triton.INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
F32, BF16 = torch.float32, torch.bfloat16
# Of results rounded to the dtype a few times.
CLOSE = {F32: 2e-6, BF16: 1e-2}
EPS = 1e-3


@pytest.mark.skipif(not triton.INTERPRETED, reason="not in the interpreter")
def test_the_interpreter_is_there():
    assert RUNS


@pytest.mark.skipif(triton.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """A program takes the interpreter some milliseconds, whatever it computes."""
    if triton.INTERPRETED:
        monkeypatch.setattr(triton_linear, "_outputs_of_program", lambda n, rows: 8)


def random(*shape, dtype=F32, seed=0):
    value = np.random.default_rng(seed + sum(shape)).normal(size=shape) / shape[-1] ** 0.5
    return torch.from_numpy(value).to(DEVICE, dtype)


def numpy(value):
    return value.detach().double().cpu().numpy()


def summed(layer, residual, *arguments):
    """The residual stream after a step, with what was still to be added to it."""
    counters = triton_product.new_counters(residual.device)
    total, hidden = layer.step(residual, None, *arguments, counters)
    return total if hidden is None else total + hidden


def normed(residual, norm):
    return numpy(rms_norm(residual.double(), norm.double(), EPS))


# --- attention -----------------------------------------------------------------------------------

# dtype, heads, groups, channels of a head, capacity, how many are filled, rotary
CASES = [
    (F32, 4, 2, 6, 40, (0, 38), Rotary(4, 100.0)),
    (F32, 4, 4, 5, 16, (15,), Rotary(4, 100.0, True)),
    (F32, 3, 1, 8, 130, (64, 63, 65, 129, 1), Rotary()),
    (BF16, 20, 1, 16, 300, (299,), Rotary()),
    (BF16, 8, 2, 16, 70, (3, 64, 0, 7, 69), Rotary(16)),
]


def attention_layer(dtype, heads, groups, size, rotary, d=24):
    rows = (heads + 2 * groups) * size
    weights = (random(rows, d, dtype=dtype), random(rows, dtype=dtype), random(d, heads * size, dtype=dtype))
    norm, bias = random(d, dtype=dtype, seed=1), random(d, dtype=dtype, seed=2)
    return triton_attention_step.Layer(norm, EPS, *weights, bias, heads, groups, size, 0.7, rotary)


def cache(b, capacity, groups, size, filled, dtype):
    keys, values = (random(b, capacity, groups, size, dtype=dtype, seed=seed) for seed in (3, 4))
    for row, count in enumerate(filled):
        keys[row, count:], values[row, count:] = 0.0, 0.0
    return KeyValueCache(keys, values, torch.tensor(filled, dtype=torch.int32, device=DEVICE))


@here
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_position_of_attention(case):
    """Against float64: the sum, and the cache that is written in its memory."""
    dtype, heads, groups, size, capacity, filled, rotary = case
    layer, b = attention_layer(dtype, heads, groups, size, rotary), len(filled)
    residual, own = random(b, 24), cache(b, capacity, groups, size, filled, dtype)
    before = KeyValueCache(*map(numpy, own))
    found = summed(layer, residual, *own, own)
    projected = normed(residual, layer.norm) @ numpy(layer.in_proj).T + numpy(layer.in_bias)
    cuts = np.cumsum([heads * size, groups * size])
    q, k, v = (part.reshape(b, 1, -1, size) for part in np.split(projected, cuts, axis=1))
    before = before._replace(filled=before.filled.astype(int))
    y, after = spec.attention(q, k, v, scale=0.7, rotary=rotary, cache=before, return_cache=True)
    wanted = numpy(residual) + y.reshape(b, -1) @ numpy(layer.out_proj).T + numpy(layer.out_bias)
    assert relative_l2(numpy(found), wanted) <= CLOSE[dtype]
    for one, other in zip(own, after, strict=True):
        assert relative_l2(numpy(one), other) <= CLOSE[dtype]


@here
@pytest.mark.gpu
def test_a_position_without_room_gives_nan_and_writes_nothing():
    layer, filled = attention_layer(F32, 4, 2, 6, Rotary()), (16, 3)
    own = cache(2, 16, 2, 6, filled, F32)
    before = [value.clone() for value in own]
    found = summed(layer, random(2, 24), *own, own)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert torch.equal(own.keys[0], before[0][0])
    assert torch.equal(own.values[0], before[1][0])


@here
@pytest.mark.gpu
@pytest.mark.parametrize("where", ["keys", "values", "residual"])
def test_a_nan_is_not_lost(where):
    layer, own, residual = attention_layer(F32, 2, 1, 6, Rotary()), cache(2, 80, 1, 6, (70, 70), F32), random(2, 24)
    (residual[0] if where == "residual" else getattr(own, where)[0, 5]).fill_(torch.nan)
    found = summed(layer, residual, *own, own)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


# --- feed-forwards -------------------------------------------------------------------------------


@here
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "b"), [(F32, 2), (F32, 5), (BF16, 1), (BF16, 4), (BF16, 9)])
def test_a_position_of_a_swiglu(dtype, b):
    d, width = 24, 37
    weights = random(2 * width, d, dtype=dtype), random(d, width, dtype=dtype)
    layer, residual = triton_feed_forward_step.FeedForward(random(d, dtype=dtype, seed=1), EPS, *weights), random(b, d)
    gate, up = np.split(normed(residual, layer.norm) @ numpy(layer.in_proj).T, 2, axis=1)
    wanted = numpy(residual) + gate / (1 + np.exp(-gate)) * up @ numpy(layer.out_proj).T
    assert relative_l2(numpy(summed(layer, residual)), wanted) <= CLOSE[dtype]


@here
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "b", "top_k"), [(F32, 2, 2), (F32, 6, 1), (BF16, 1, 5)])
def test_a_position_of_experts(dtype, b, top_k):
    d, width, experts = 24, 10, 5
    shapes = {"router": (experts, d), "gate_up": (experts, 2 * width, d), "down": (experts, d, width)}
    weights = {name: random(*shape, dtype=dtype) for name, shape in shapes.items()}
    layer = triton_experts_step.Experts(random(d, dtype=dtype, seed=1), EPS, **weights, top_k=top_k)
    residual = random(b, d)
    x = normed(residual, layer.norm)[:, None]
    experts = [numpy(value) for value in (layer.gate_up, layer.down)]
    y = mc.mixture_of_experts(x, x @ numpy(layer.router).T, *experts, top_k=top_k)
    assert relative_l2(numpy(summed(layer, residual)), numpy(residual) + y[:, 0]) <= CLOSE[dtype]


@here
@pytest.mark.gpu
def test_of_equal_experts_the_first_are_chosen():
    d, router = 24, torch.zeros(5, 24, device=DEVICE)
    gate_up, down = random(5, 20, d), random(5, d, 10)
    layer = triton_experts_step.Experts(random(d, seed=1), EPS, router, gate_up, down, 2)
    residual = random(1, d)
    x = normed(residual, layer.norm)[:, None]
    y = mc.mixture_of_experts(x, np.zeros((1, 1, 5)), numpy(gate_up), numpy(down), top_k=2)
    assert relative_l2(numpy(summed(layer, residual)), numpy(residual) + y[:, 0]) <= CLOSE[F32]


# --- with gradients --------------------------------------------------------------------------------


@here
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "shape"), [(F32, (2, 3, 10)), (F32, (0, 4)), (BF16, (3, 2100))])
def test_swiglu_with_its_gradient(dtype, shape):
    x, dy = random(*shape, dtype=dtype), random(*shape[:-1], shape[-1] // 2, dtype=dtype)
    results = []
    for kernel, value in (("plain", x.double()), ("triton", x)):
        value = value.requires_grad_()
        y = swiglu.swiglu(value, kernel)
        results.append([y, *torch.autograd.grad(y, value, dy.to(y.dtype))])
    for wanted, found in zip(*results, strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, dtype)
        assert not found.numel() or relative_l2(numpy(found), numpy(wanted)) <= CLOSE[dtype]


@here
@pytest.mark.gpu
@pytest.mark.parametrize("states", [4, 5])
def test_weights_of_the_norms_of_dt_b_and_c(states):
    dtbc, dnormed, weights = random(7, 3 + 2 * states), random(7, 3 + 2 * states, seed=1), random(3 + 2 * states)
    parts = (3, states, states)
    given = [value.double().requires_grad_() for value in (dtbc, weights)]
    pairs = zip(*(value.split(parts, -1) for value in given), strict=True)
    wanted = torch.cat([rms_norm(value, weight, EPS) for value, weight in pairs], -1)
    dx, dweights = torch.autograd.grad(wanted, given, dnormed.double())
    found = triton_norm.unit_norms(dtbc, states, EPS, weights)
    assert relative_l2(numpy(found), numpy(wanted)) <= CLOSE[F32]
    gradient = triton_norm.unit_norms_backward_(dnormed, dtbc, states, EPS, weights)
    assert relative_l2(numpy(gradient), numpy(dweights)) <= CLOSE[F32]
    assert relative_l2(numpy(dnormed), numpy(dx)) <= CLOSE[F32]


@here
@pytest.mark.gpu
def test_a_model_and_its_gradient_in_fused_operators():
    """The norms with the sums before them, the mixer with its norms, and SwiGLU."""
    models = pair(dataclasses.replace(DENSE, n_layer=2))
    tokens = np.arange(24).reshape(2, 12) % 29
    (loss, found), (other, wanted) = (training.loss_and_gradients(each, tokens) for each in models)
    assert abs(loss - other) <= 1e-5 * abs(other)
    for name, gradient in wanted.items():
        assert relative_l2(found[name], gradient) <= 2e-5, name
    assert {name for _, _, name, _ in explain(models[0], 2, 12)} == {"fused"}


# --- models --------------------------------------------------------------------------------------

PERIODS = {"attn_layer_period": 3, "attn_layer_offset": 1}
DENSE = mc.JambaConfig(d_model=16, n_layer=3, vocab_size=29, num_experts=1, num_experts_per_tok=1, **PERIODS, **SMALL)
SPARSE = dataclasses.replace(DENSE, num_experts=4, num_experts_per_tok=2, residual_in_fp32=True, tie_embeddings=True)


def pair(config, dtype="float32"):
    """(a model that decodes in fused kernels, the same in plain operations)."""
    kernels = ("auto", "plain")
    return [mc.build(config, backend="torch", device=DEVICE, dtype=dtype, seed=1, kernels=each) for each in kernels]


def assert_same(models, batch, limit):
    """That a position after a prompt of the plain model is alike on both."""
    model, plain = models
    assert cuda_step.reason(model) is None
    ids = torch.arange(batch * 6, device=DEVICE).reshape(batch, 6) % model.config.vocab_size
    with torch.no_grad():
        state = plain(ids[:, :5]).state
        wanted = plain(ids[:, 5:], state)
        own = state._replace(layers=tuple(type(each)(*(value.clone() for value in each)) for each in state.layers))
        found = [cuda_step.logits(model, ids[:, 5].contiguous(), own), *private.tree_leaves(own.layers)]
    for one, other in zip(found, [wanted.logits[:, 0], *private.tree_leaves(wanted.state.layers)], strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert relative_l2(numpy(one), numpy(other)) <= limit


@here
@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype", "batch"), [("dense", "float32", 2), ("sparse", "float32", 5)])
def test_a_position_of_a_model(name, dtype, batch):
    assert_same(pair({"dense": DENSE, "sparse": SPARSE}[name], dtype), batch, 1e-5)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("batch", [1, 4, 5, 70, 150])
def test_a_position_of_a_model_on_a_gpu(batch):
    assert_same(pair(DENSE, "bfloat16"), batch, 6e-2)  # the plain form rounds at other places
    assert_same(pair(SPARSE), batch, 1e-5)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("bits", "batch"), [(8, 1), (4, 3), (8, 5)])
def test_a_position_of_quantised_weights(bits, batch):
    config = dataclasses.replace(DENSE, d_model=256, d_intermediate=512)
    assert_same([quantize(model, bits) for model in pair(config, "bfloat16")], batch, 6e-2)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("limit", [None, 90])
def test_captured_decoding_goes_on_where_the_cache_grows(limit, monkeypatch):
    """Captured again with more capacity, once in each ROOM: the same tokens as in plain operations, float32."""
    monkeypatch.setattr(decoding, "ROOM", 16)
    tokens = []
    for model in pair(SPARSE):
        prompt = np.arange(20).reshape(2, 10) % 29
        prefilled = decoding.prefill(model, prompt, np.ones(prompt.shape, bool))
        steps = decoding.decode(model, prefilled, Sampling(), limit=limit)
        tokens.append([next(steps).tokens for _ in range(limit or 90)])
    assert np.array_equal(*tokens)


@here
@pytest.mark.gpu
def test_what_is_not_computed_is_refused():
    model, _ = pair(DENSE)
    feed_forward = model.backbone.layers[0].feed_forward
    handle = feed_forward.register_forward_hook(lambda *_: None)
    assert "was changed" in cuda_step.reason(model)
    handle.remove()
    assert cuda_step.reason(model) is None
    model.backbone.layers[0].mixer.dt_norm.eps *= 2
    assert "several eps" in cuda_step.reason(model)
