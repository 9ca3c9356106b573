"""The kernels in Triton against the plain operations that they equal: on a GPU, and on a CPU in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so that these tests run again in a process of their own.
"""

import importlib.util

import numpy as np
import pytest
import torch

import mamba_core as mc
from mamba_core import selftest
from mamba_core.backends.torch import decoding, training
from mamba_core.backends.torch.blocks import RMSNorm
from mamba_core.backends.torch.kernels import (
    triton,
    triton_choice,
    triton_conv,
    triton_linear,
    triton_loss,
    triton_mixer,
    triton_norm,
    triton_product,
    triton_step,
)
from mamba_core.backends.torch.ops import causal_conv, fused_mixer, rms_norm, selective_scan
from mamba_core.backends.torch.quantization import GROUP, pack, unpack
from mamba_core.backends.torch.ways import cuda_step
from mamba_core.call import Call
from mamba_core.spec.tolerances import relative_l2
from tests.unit.triton_compile import run_in_the_interpreter

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
RUNS = triton.reason(torch.device(DEVICE)) is None and (triton.INTERPRETED or torch.cuda.is_available())
here = pytest.mark.skipif(not RUNS, reason="needs a GPU, or Triton's interpreter")
on_gpu = pytest.mark.skipif(triton.INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
F32, BF16 = torch.float32, torch.bfloat16
# Of results rounded to the dtype once, and of sums of some hundred products.
CLOSE = {F32: 2e-6, BF16: 8e-3, torch.float16: 1e-3}
CONFIG = mc.MambaConfig(d_model=40, n_layer=2, vocab_size=61, d_state=8)


@pytest.mark.skipif(triton.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    run_in_the_interpreter(__file__)


def random(*shape, dtype=F32, seed=0):
    value = np.random.default_rng(seed + sum(shape)).normal(size=shape)
    return torch.from_numpy(value).to(DEVICE, dtype)


def with_gradients(function, arguments):
    """Results and the gradients of all arguments in floating point."""
    arguments = [
        value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    ]
    results = function(*arguments)
    cotangents = [random(*value.shape, dtype=value.dtype, seed=seed) for seed, value in enumerate(results)]
    leaves = [value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad]
    return [*results, *torch.autograd.grad(results, leaves, cotangents)]


def compare(function, plain, arguments, limit, at_least=1):
    found, expected = with_gradients(function, arguments), with_gradients(plain, arguments)
    assert len(found) == len(expected) > at_least
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), index
        if other.numel():
            apart = relative_l2(one.detach().double().cpu().numpy(), other.detach().double().cpu().numpy())
            assert apart <= limit, f"{index} is {apart} apart"


# An op's kernel, by module and name, and what makes one of its results wrong.
CHANGED = {
    "rms_norm": (triton_norm, "add_norm", lambda found: (found[0] * 1.1, found[1])),
    "cross_entropy": (triton_loss, "linear_cross_entropy", lambda loss: loss * 1.1),
    "block_step": (triton_step, "block", lambda found: (found[0] * 1.1, found[1])),
    "fused_mixer": (triton_mixer, "inner", lambda found: (*found[:2], found[2] * 1.1)),
}


@here
@pytest.mark.gpu
@pytest.mark.parametrize("op", CHANGED)
def test_a_kernel_passes_its_self_test_and_a_broken_one_does_not(op, monkeypatch):
    backend = mc.registry.get("torch")
    kernel = "cuda" if op == "block_step" else "triton"
    if op == "fused_mixer" and triton.INTERPRETED:  # the others take it half a minute
        monkeypatch.setattr(fused_mixer, "TRIALS", fused_mixer.TRIALS[1:2])
    verdict = selftest.examine(backend, op, kernel, DEVICE)
    assert verdict.faults == verdict.skipped == ()
    assert verdict.trials == len(list(backend.op(op).trials(DEVICE)))
    module, name, change = CHANGED[op]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **options: change(right(*given, **options)))
    assert "from the plain kernel" in selftest.examine(backend, op, kernel, DEVICE, to_the_end=False).faults[0]


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("given", [True, False])
def test_add_norm(dtype, given):
    residual, weight = random(3, 5, 24), random(24)
    hidden = random(3, 5, 24, dtype=dtype, seed=1) if given else None

    def plain(residual, weight, hidden):
        total = residual * 1 if hidden is None else residual + hidden
        norm = RMSNorm(24, 1e-5)
        return torch.func.functional_call(norm, {"weight": weight}, (total,)).to(dtype), total

    def ours(residual, weight, hidden):
        return triton_norm.add_norm(residual, hidden, weight, 1e-5, dtype)

    compare(ours, plain, (residual, weight, hidden), CLOSE[dtype])


def normed_parts(dtbc, rank, states, eps):
    """dt, B and C, each normed, in plain operations."""
    return [rms_norm.rms_norm(value, None, eps) for value in dtbc.split((rank, states, states), dim=-1)]


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize(("rank", "states"), [(1, 1), (5, 3), (16, 16), (70, 9), (3, 40)])
@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norms_of_dt_b_and_c(dtype, rank, states, rows, eps):
    dtbc, dnormed = (random(2, rows, rank + 2 * states, dtype=dtype, seed=seed) for seed in (0, 1))
    dtbc.requires_grad_()
    expected = torch.cat(normed_parts(dtbc, rank, states, eps), dim=-1)
    (gradient,) = torch.autograd.grad(expected, dtbc, dnormed)
    # A gradient may be the little that is left of large terms of this size: all of it, where a part has one entry.
    size = (dnormed * expected / dtbc).abs().float()
    with torch.no_grad():
        normed = triton_norm.unit_norms(dtbc, states, eps)
        triton_norm.unit_norms_backward_(dnormed, dtbc, states, eps)
    torch.testing.assert_close(normed, expected.detach(), rtol=CLOSE[dtype], atol=1e-6)
    apart, gradient = (dnormed.float() - gradient.float()).abs(), gradient.float().abs()
    assert (apart <= CLOSE[dtype] * gradient + CLOSE[F32] * size + 1e-7).all()


def mixer_arguments(e=12, n=4, r=2, length=9, dtype=F32, scale=1.0):
    x_proj, dt_proj = random(r + 2 * n, e) * scale / e**0.5, random(e, r) / r**0.5
    weights = (random(e, 4), random(e), x_proj, dt_proj, random(e), -random(e, n).abs(), random(e))
    return (random(2, length, 2 * e, dtype=dtype), *weights, random(2, 3, e, dtype=dtype), random(2, e, n))


def plain_mixer(xz, conv, conv_bias, x_proj, dt_proj, delta_bias, A, D, conv_state, ssm_state, restart, eps):
    """`triton_mixer.inner` in plain operations."""
    x, z = xz.chunk(2, dim=-1)
    call, n = Call(restart=restart), A.shape[1]
    told = {"initial_state": conv_state, "kernel": "plain"}
    x, conv_state = causal_conv.conv(call, x, conv, conv_bias, activation="silu", **told)
    dtbc = torch.nn.functional.linear(x, x_proj.to(x.dtype))
    rank = len(x_proj) - 2 * n
    dt, B, C = normed_parts(dtbc, rank, n, eps) if eps > 0 else dtbc.split((rank, n, n), dim=-1)
    delta = torch.nn.functional.linear(dt, dt_proj.to(x.dtype))
    told = {"delta_bias": delta_bias, "delta_softplus": True, "initial_state": ssm_state, "kernel": "plain"}
    y, ssm_state = selective_scan.scan(call, x, delta, A, B, C, D, z=z, **told)
    return y, conv_state, ssm_state


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(
    ("n", "r", "eps", "scale"), [(4, 2, 0.0, 1.0), (3, 5, 1e-6, 1.0), (16, 17, 0.1, 0.3), (1, 3, 0.1, 1.0)]
)
def test_a_mixer_as_one_operator(dtype, segments, n, r, eps, scale):
    """Its results and all gradients, with dt, B and C normed or not. Where x_proj is small, the eps counts."""
    restart = None
    if segments:
        restart = torch.from_numpy(np.random.default_rng(0).random((2, 9)) < 0.2).to(DEVICE)
    arguments = (*mixer_arguments(n=n, r=r, dtype=dtype, scale=scale), restart, eps)
    compare(triton_mixer.inner, plain_mixer, arguments, 1e-5 if dtype == F32 else 3e-2)


@here
@pytest.mark.gpu
@pytest.mark.parametrize("length", [0, 1, 2, 70])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv(length, segments, width):
    """Of slices of wider arrays."""
    e = 12
    restart = None
    if segments:
        restart = torch.from_numpy(np.random.default_rng(0).random((2, length)) < 0.2).to(DEVICE)
    arguments = (random(2, length, 2 * e), random(e, 2 * width), random(2 * e), random(2, width - 1, e))

    def ours(xz, weight, bias, state):
        return triton_conv.cuda(xz[..., :e], weight[:, ::2], bias[::2], "silu", state, Call(restart=restart))

    def plain(xz, weight, bias, state):
        return causal_conv.shifted(xz[..., :e], weight[:, ::2], bias[::2], "silu", state, Call(restart=restart))

    compare(ours, plain, arguments, CLOSE[F32])


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_conv_without_bias_state_and_activation(dtype):
    arguments = (random(2, 9, 300, dtype=dtype), random(300, 3))
    compare(
        lambda x, weight: triton_conv.cuda(x, weight, None, None, None, Call()),
        lambda x, weight: causal_conv.shifted(x, weight, None, None, None, Call()),
        arguments,
        CLOSE[dtype],
    )


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_linear_cross_entropy(dtype, monkeypatch):
    """In several parts, the last of them shorter, with targets that do not count."""
    monkeypatch.setattr(triton_loss, "BYTES", 20 * 53 * 4)
    targets = torch.randint(0, 53, (50,), device=DEVICE)
    targets[3] = targets[20:30] = triton_loss.IGNORED

    def plain(hidden, weight):
        logits = torch.nn.functional.linear(hidden, weight.to(dtype)).float()
        return (torch.nn.functional.cross_entropy(logits, targets, reduction="sum"),)

    def ours(hidden, weight):
        return (triton_loss.linear_cross_entropy(hidden, weight, targets),)

    compare(ours, plain, (random(50, 16, dtype=dtype), random(53, 16)), CLOSE[dtype])


@here
@pytest.mark.gpu
def test_a_target_outside_the_vocabulary_is_nan():
    for target in (53, -1):
        targets = torch.tensor([0, target], device=DEVICE)
        assert triton_loss.linear_cross_entropy(random(2, 16), random(53, 16), targets).isnan()


def models(**settings):
    """One with fused kernels, one in plain operations."""
    return [mc.build(CONFIG, backend="torch", device=DEVICE, kernels=name, **settings) for name in ("auto", "chunked")]


def tokens(rows, length):
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)


@here
@pytest.mark.gpu
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradients_of_a_model(remat, padded):
    given = tokens(2, 40)
    mask = None
    if padded:
        mask = np.ones(given.shape, bool)
        mask[1, :7] = False
    found = []
    for model in models():
        model.remat = remat
        found.append(training.loss_and_gradients(model, given, mask))
    (ours, gradients), (plain, expected) = found
    assert ours == pytest.approx(plain, rel=1e-6)
    for name, value in expected.items():
        assert relative_l2(gradients[name], value) <= 1e-5, name


@here
@pytest.mark.gpu
def test_an_evaluation_by_fused_kernels(monkeypatch):
    """The loss with the head, of the targets that count; not for a model whose own call was changed."""
    given, calls, real = tokens(2, 40), [], triton_loss.linear_cross_entropy
    monkeypatch.setattr(triton_loss, "linear_cross_entropy", lambda *values: calls.append(1) or real(*values))
    counts = np.arange(39) >= np.array([[0], [30]])
    ours, plain = ([training.Trainer(model, mc.TrainSettings()), model] for model in models())
    assert ours[0].evaluate(given, counts) == pytest.approx(plain[0].evaluate(given, counts), rel=1e-6)
    assert len(calls) == 1
    ours[1].register_forward_hook(lambda module, inputs, output: output._replace(logits=0 * output.logits))
    wanted = counts.sum() * np.log(CONFIG.padded_vocab_size)
    assert ours[0].evaluate(given, counts) == pytest.approx(wanted, rel=1e-6)
    assert len(calls) == 1


@here
@pytest.mark.gpu
def test_segments_and_states_of_a_model():
    given = torch.from_numpy(tokens(2, 40)).to(DEVICE)
    segment_ids = torch.arange(40, device=DEVICE).repeat(2, 1) // 9
    found = []
    for model in models():
        first = model(given[:, :23], segment_ids=segment_ids[:, :23])
        out = model(given[:, 23:], state=first.state, segment_ids=segment_ids[:, 23:])
        found.append([out.logits, *(value for layer in out.state.layers for value in layer)])
    for one, other in zip(*found, strict=True):
        assert relative_l2(one.detach().cpu().numpy(), other.detach().cpu().numpy()) <= 1e-5


# In the interpreter, where each takes seconds, half precision is tried for the fewest and the most rows.
INTERPRETED = [("float32", rows) for rows in (1, 2, 4, 5, 19)] + [("bfloat16", 1), ("float16", 19)]
ON_GPU = [(dtype, rows) for dtype in ("bfloat16", "float16") for rows in (1, 2, 4, 5, 19)]


@here
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "batch"), INTERPRETED if triton.INTERPRETED else INTERPRETED[:5] + ON_GPU)
def test_a_position_in_fused_kernels(dtype, batch):
    model, plain = models(dtype=dtype)
    assert cuda_step.reason(model) is None
    with torch.no_grad():
        state = model(torch.from_numpy(tokens(batch, 7)).to(DEVICE)).state
        following = torch.from_numpy(tokens(batch, 1)).to(DEVICE)
        expected = plain(following, state)
        layers = tuple(type(layer)(*(value.clone() for value in layer)) for layer in state.layers)
        state = state._replace(layers=layers)
        logits = cuda_step.logits(model, following[:, 0], state)
    limit = 3e-6 if dtype == "float32" else 2e-2
    assert relative_l2(logits.cpu().numpy(), expected.logits[:, 0].cpu().numpy()) <= limit
    for own, other in zip(state.layers, expected.state.layers, strict=True):
        for one, two in zip(own, other, strict=True):
            assert relative_l2(one.float().cpu().numpy(), two.float().cpu().numpy()) <= limit


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch", [1, 4, 19])
@pytest.mark.parametrize(("n", "r", "eps", "scale"), [(3, 5, 1e-6, 1.0), (5, 17, 0.1, 0.3)])
def test_a_position_with_norms_of_dt_b_and_c(dtype, batch, n, r, eps, scale):
    """Against the same block in float64, so that a norm that is left out or has another eps is seen."""
    d, e = 40, 48
    conv, conv_bias, x_proj, dt_proj, delta_bias, A, D = mixer_arguments(e, n, r, scale=scale)[1:8]
    weights = (random(d), 1e-5, random(2 * e, d) / d**0.5, None, conv, conv_bias, x_proj, dt_proj)
    weights = [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in weights]
    out_proj = (random(d, e) / e**0.5).to(dtype)
    layer = triton_step.Layer(*weights, delta_bias, (-A).log(), D, out_proj, None, eps)
    residual, conv_state, ssm_state = random(batch, d), random(batch, 3, e, dtype=dtype), random(batch, e, n)
    after = conv_state.clone(), ssm_state.clone()
    counters = triton_product.new_counters(residual.device)
    total, hidden = triton_step.block(layer, residual, None, *after, after, counters)
    total = total.double() if hidden is None else total.double() + hidden.double()

    norm, _, in_proj, _, *others = (value.double() if isinstance(value, torch.Tensor) else value for value in weights)
    wide = residual.double()
    xz = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * norm @ in_proj.mT
    wide = (xz, *others, delta_bias, A, D, conv_state, ssm_state)
    expected = [residual.double() + 0, *plain_step(*(value.double() for value in wide), eps)]
    expected[0] += expected.pop(1) @ out_proj.double().mT
    limit = 1e-5 if dtype == F32 else 4e-2
    for one, other in zip((total, *after), expected, strict=True):
        assert relative_l2(one.double().cpu().numpy(), other.cpu().numpy()) <= limit


def plain_step(xz, conv, conv_bias, x_proj, dt_proj, delta_bias, A, D, conv_state, ssm_state, eps):
    """(y, conv state, ssm state) of one position, (b, 2e), in float64."""
    x, z = xz.chunk(2, dim=-1)
    n, window = A.shape[1], torch.cat([conv_state, x[:, None]], dim=1)
    x = torch.nn.functional.silu(torch.einsum("bke,ek->be", window, conv) + conv_bias)
    parts = (x @ x_proj.mT).split((len(x_proj) - 2 * n, n, n), dim=-1)
    dt, B, C = (value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) for value in parts)
    step = torch.nn.functional.softplus(dt @ dt_proj.mT + delta_bias)
    h = torch.exp(step[..., None] * A) * ssm_state + (step * x)[..., None] * B[:, None]
    y = (h * C[:, None]).sum(-1) + D * x
    return y * torch.nn.functional.silu(z), window[:, 1:], h


@here
@pytest.mark.gpu
@pytest.mark.parametrize("change", ["layout", "dtype"])
def test_a_position_of_parameters_that_were_changed_is_left_to_others(change):
    model, _ = models(dtype="bfloat16")
    linear = model.backbone.layers[1].mixer.out_proj
    weight = linear.weight.detach()
    linear.weight = torch.nn.Parameter(weight.T.contiguous().T if change == "layout" else weight.float())
    assert "its parameters have" in cuda_step.reason(model)


@here
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_with_few_rows(bits, rows, dtype):
    """Dense weights of any width, and packed ones as they are unpacked."""
    weight, x, bias = random(7, 512 if bits else 300, dtype=dtype), random(rows, 512 if bits else 300), random(7)
    x = x.to(dtype)
    dense = weight
    if bits:
        weight = triton_linear.Packed(*pack(weight, bits), bits, GROUP)
        dense = unpack(weight, F32)
    found = triton_linear.linear(x, weight, bias)
    expected = x.double() @ dense.double().mT + bias.double()
    assert relative_l2(found.double().cpu().numpy(), expected.cpu().numpy()) <= CLOSE[dtype]


@here
@pytest.mark.gpu
@pytest.mark.parametrize("outputs", [7, 600])
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_products_with_some_rows(outputs, rows, dtype):
    """Of widths that fill no block, shared by several programs; the same bits when repeated."""
    weight, x, bias = random(outputs, 1000, dtype=dtype), random(rows, 1000).to(dtype), random(outputs)
    counters, found = triton_product.new_counters(x.device), [x.new_empty(rows, outputs) for _ in range(2)]
    for y in found:
        triton_product.multiply(x, weight, bias, y, counters)
    assert torch.equal(*found)
    expected = x.double() @ weight.double().mT + bias.double()
    assert relative_l2(found[0].double().cpu().numpy(), expected.cpu().numpy()) <= CLOSE[dtype]


@here
@pytest.mark.gpu
@pytest.mark.parametrize("v", [5, 5000])
def test_the_likeliest_token(v):
    """The lower id of equals, and what `mamba_core.sampling` says of logits that are not finite."""
    logits = random(6, v + 3)[:, :v]
    logits[1, [2, v - 1]] = 9.0
    logits[2] = -torch.inf
    logits[3, v // 2] = torch.nan
    logits[4, 1] = torch.inf
    logits[5, : v - 1] = -torch.inf
    tokens, logprobs = triton_choice.likeliest(logits)
    expected = logits.argmax(-1)
    assert expected[1] == 2
    expected[2:5] = 0
    assert tokens.tolist() == expected.tolist()
    plain = logits.log_softmax(-1).gather(1, expected[:, None])[:, 0]
    plain[2] = -torch.inf
    plain[4] = torch.nan
    torch.testing.assert_close(logprobs, plain, equal_nan=True, rtol=1e-6, atol=1e-6)


@here
@pytest.mark.gpu
def test_a_token_outside_the_vocabulary_is_nan():
    model = models()[0]
    state = model.init_state(2)
    logits = cuda_step.logits(model, torch.tensor([0, CONFIG.padded_vocab_size], device=DEVICE), state)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.2}])
def test_decoding_as_a_graph(settings):
    """Twice, for the second finds the first's graph, and two at once, which need one each."""
    model, _ = models()
    assert decoding._captures(model, mc.sampling.Sampling(**settings))
    alone = [mc.generate(model, [[1, 2, 3], [4]], max_new_tokens=40, seed=3, **settings).tokens for _ in range(2)]
    capture, decoding._captures = decoding._captures, lambda *_: False
    try:
        plain = mc.generate(model, [[1, 2, 3], [4]], max_new_tokens=40, seed=3, **settings).tokens
    finally:
        decoding._captures = capture
    assert alone[0] == alone[1] == plain


@pytest.mark.gpu
@on_gpu
def test_compiled_and_under_autocast():
    model, plain = models()
    given = torch.from_numpy(tokens(2, 40)).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    for dtype, limit in ((F32, 1e-5), (BF16, 3e-2)):
        found = []
        for one in (compiled, model, plain):
            model.zero_grad(), plain.zero_grad()
            with torch.autocast(DEVICE, dtype, enabled=dtype == BF16):
                logits = one(given).logits
            logits.square().mean().backward()
            owner = plain if one is plain else model
            found.append([logits, *(parameter.grad for parameter in owner.parameters())])
        for values in zip(*found, strict=True):
            ours, uncompiled, expected = (value.detach().cpu().numpy() for value in values)
            assert relative_l2(ours, expected) <= limit
            assert relative_l2(uncompiled, expected) <= limit


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_an_evaluation_between_captured_steps_changes_none(autocast):
    found = []
    for evaluates in (False, True):
        trainer = training.Trainer(mc.build(CONFIG, backend="torch", device=DEVICE), mc.TrainSettings(steps=9))
        found.append([])
        for _ in range(9):
            with torch.autocast(DEVICE, BF16, enabled=autocast):
                found[-1].append(trainer.step(tokens(2, 40)))
                if evaluates:
                    trainer.evaluate(tokens(2, 40), np.ones((2, 39), bool))
    assert found[0] == found[1]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_training_steps_as_graphs(dtype, autocast, remat):
    """Plain at first, captured, and captured again for another length: the same bits as when all are plain."""

    def losses(captured):
        model = mc.build(CONFIG, backend="torch", device=DEVICE, dtype=dtype)
        model.remat = remat
        trainer = training.Trainer(model, mc.training.TrainSettings(steps=9, learning_rate=0.01))
        if not captured:
            trainer.captured = lambda tokens, settings: trainer._update(tokens)
        found = []
        for length in (40, 40, 40, 40, 23, 23, 23, 23, 40):
            with torch.autocast(DEVICE, BF16, enabled=autocast):
                found.append(trainer.step(tokens(2, length)))
        assert not captured or trainer.captured._calls == 1
        return found, trainer.state()

    (plain, its_state), (captured, state) = losses(False), losses(True)
    assert plain == captured
    assert plain[3][0] < plain[0][0]
    assert all(np.array_equal(state[name], value) for name, value in its_state.items())


def operator_arguments():
    targets = torch.arange(10, device=DEVICE)
    *of_mixer, conv_state, ssm_state = mixer_arguments()
    states = conv_state, ssm_state
    return [
        (triton_norm._forward, (random(3, 24), random(3, 24, seed=1), random(24), 1e-5, F32)),
        (triton_conv._forward, (random(2, 9, 12), random(12, 4), random(12), random(2, 3, 12), None, True)),
        (triton_mixer._operator, (*of_mixer, None, *states, None, 0.0, True)),
        (triton_mixer._operator, (*of_mixer, random(len(of_mixer[3])), *states, None, 1e-3, True)),
        (triton_loss._forward, (random(10, 16), random(53, 16), targets, True)),
    ]


@here
@pytest.mark.gpu
@pytest.mark.parametrize("index", range(5))
def test_operators_are_as_pytorch_wants_them(index):
    """Their schemas, what they say of shapes without computing, and their gradients in a compiled graph."""
    operator, arguments = operator_arguments()[index]
    given = [
        value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    ]
    torch.library.opcheck(operator, given)
