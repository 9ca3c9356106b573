"""Vision Mamba by fused kernels: on a GPU, and on a CPU in Triton's interpreter, in a process of its own."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

import mamba_core as mc
from mamba_core.backends.torch import training
from mamba_core.backends.torch.kernels import triton, triton_directions
from mamba_core.backends.torch.kernels.triton_mixer import Weights
from mamba_core.backends.torch.mixers import bimamba_v2
from mamba_core.backends.torch.ops import fused_mixer, rms_norm
from mamba_core.call import Call
from mamba_core.spec.tolerances import relative_l2
from tests.unit.triton_compile import run_in_the_interpreter

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
RUNS = triton.reason(torch.device(DEVICE)) is None and (triton.INTERPRETED or torch.cuda.is_available())
here = pytest.mark.skipif(not RUNS, reason="needs a GPU, or Triton's interpreter")
on_gpu = pytest.mark.skipif(triton.INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
IMAGES = {"image_size": 8, "patch_size": 4, "channels": 1, "num_classes": 3}
CONFIG = mc.VisionMambaConfig(d_model=8, d_state=4, n_layer=1, task_options=IMAGES)
TOKENS = mc.VisionMambaConfig(d_model=8, d_state=8, n_layer=1, vocab_size=13, task="features")


@pytest.mark.skipif(triton.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    run_in_the_interpreter(__file__)


def examples(size=8):
    rng = np.random.default_rng(0)
    return {"inputs": rng.normal(size=(4, 1, size, size)).astype(np.float32), "targets": rng.integers(0, 3, 4)}


@pytest.fixture
def calls(monkeypatch):
    """The calls of the fused operator."""
    made, real = [], triton_directions.merged
    monkeypatch.setattr(triton_directions, "merged", lambda *given: made.append(1) or real(*given))
    return made


@here
@pytest.mark.gpu
@pytest.mark.parametrize(("l", "bias"), [(70, True), pytest.param(1, False, marks=on_gpu)])
def test_the_operator_against_one_of_each_direction(l, bias):
    """With segments, over several programs along the positions."""
    rng, (e, n, r, k) = np.random.default_rng(0), (12, 4, 3, 4)
    xz, dy = draw(rng, 2, l, 2 * e), draw(rng, 2, l, e)
    weights, weights_b = (drawn_weights(rng, e, n, r, k, bias) for _ in range(2))
    restart = torch.from_numpy(rng.random((2, l)) < 0.1).to(DEVICE)
    restart_b = torch.cat([torch.zeros_like(restart[:, :1]), restart[:, 1:].flip(1)], 1)

    def plain(xz, weights, weights_b):
        zeros = xz.new_zeros(2, k - 1, e), xz.new_zeros(2, e, n)
        y = fused_mixer._plain(xz, *weights[:-1], *zeros, 0.0, Call(restart=restart, segment_ids=restart.cumsum(1)))[0]
        here = Call(restart=restart_b, segment_ids=restart_b.cumsum(1))
        y_b = fused_mixer._plain(xz.flip(1), *weights_b[:-1], *zeros, 0.0, here)[0]
        return (y + y_b.flip(1)) * 0.5

    leaves = [value for value in (xz, *weights, *weights_b) if value is not None]
    found = triton_directions.merged(xz, weights, weights_b, 0.5, restart, restart_b)
    expected = plain(xz, weights, weights_b)
    for one, other in zip(
        (found, *torch.autograd.grad(found, leaves, dy)),
        (expected, *torch.autograd.grad(expected, leaves, dy)),
        strict=True,
    ):
        assert relative_l2(one.detach().cpu().numpy(), other.detach().cpu().numpy()) <= 2e-6


@here
@pytest.mark.gpu
def test_the_operator_is_as_pytorch_wants_it():
    rng = np.random.default_rng(0)
    weights = [value for _ in range(2) for value in drawn_weights(rng, 6, 2, 1, 4, True)[:-1]]
    torch.library.opcheck(triton_directions._operator, (draw(rng, 1, 3, 12), *weights, None, None, 0.5, True))


def draw(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(DEVICE).requires_grad_()


def drawn_weights(rng, e, n, r, k, bias) -> Weights:
    taps, x_proj, dt_proj = draw(rng, e, k), draw(rng, r + 2 * n, e), draw(rng, e, r)
    A = (-draw(rng, e, n).detach().exp()).requires_grad_()
    return Weights(taps, draw(rng, e) if bias else None, x_proj, dt_proj, draw(rng, e), A, draw(rng, e))


@here
@pytest.mark.gpu
def test_both_directions_are_one_operator(calls):
    found = []
    for kernels in ("auto", "plain"):
        model = mc.build(CONFIG, backend="torch", device=DEVICE, kernels=kernels)
        found.append(training.loss_and_gradients(model, examples()))
    assert len(calls) == CONFIG.n_layer
    (ours, gradients), (plain, expected) = found
    assert ours == pytest.approx(plain, rel=1e-6)
    for name, value in expected.items():
        assert relative_l2(gradients[name], value) <= 1e-5, name


@here
@pytest.mark.gpu
def test_segments_restart_both_directions(calls):
    ids, segments = torch.arange(11, device=DEVICE)[None] % 13, torch.tensor([[0] * 4 + [1] * 7], device=DEVICE)
    fused, plain = (mc.build(TOKENS, backend="torch", device=DEVICE, kernels=kernels) for kernels in ("auto", "plain"))
    hidden = fused(ids, segment_ids=segments).hidden.detach().cpu().numpy()
    assert len(calls) == 1
    assert relative_l2(hidden, plain(ids, segment_ids=segments).hidden.detach().cpu().numpy()) <= 1e-5
    alone = fused(ids[:, :4]).hidden.detach().cpu().numpy()
    assert relative_l2(hidden[:, :4], alone) <= 1e-5


@here
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dt_proj", "x_proj_b", "conv1d_b"])
def test_a_hook_in_either_direction_acts(calls, name):
    model = mc.build(CONFIG, backend="torch", device=DEVICE)
    inputs = torch.from_numpy(examples()["inputs"]).to(DEVICE)
    before = model(inputs).logits
    assert len(calls) == 1
    getattr(model.backbone.layers[0].mixer, name).register_forward_hook(lambda module, given, output: 2 * output)
    assert not torch.allclose(model(inputs).logits, before)
    assert len(calls) == 1


@here
@pytest.mark.gpu
def test_the_norm_is_fused_under_autocast(monkeypatch):
    """There a mixer's output has autocast's dtype, and the residual stream and the weights have their own."""
    made = []
    for name, kernel in list(rms_norm.KERNELS.items()):
        monkeypatch.setitem(rms_norm.KERNELS, name, lambda *given, as_=name, do=kernel: made.append(as_) or do(*given))
    model = mc.build(TOKENS, backend="torch", device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        model(torch.arange(11, device=DEVICE)[None])
    assert made == ["triton", "triton"]


def test_which_steps_of_image_classifiers_are_captured(monkeypatch):
    """Not those of another size, whose positions are interpolated by a matrix from the host."""
    trainer = training.Trainer(mc.build(CONFIG, backend="torch", device="cpu"), mc.TrainSettings())
    trainer.on_gpu = True
    monkeypatch.setattr(bimamba_v2.BidirectionalMixer, "captures", lambda mixer: True)
    batch, larger = ({"inputs": torch.zeros(4, 1, size, size), "targets": torch.zeros(4)} for size in (8, 12))
    assert trainer.captures(batch)
    assert not trainer.captures(larger)
    trainer.model.head = torch.nn.Sequential(trainer.model.head)
    assert trainer.captures(batch)
    trainer.model.head[0].register_forward_hook(lambda *given: None)
    assert not trainer.captures(batch)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_training_steps_as_graphs(rate):
    """The same bits as when all steps are plain; where paths are dropped, other paths at each replay."""
    config = dataclasses.replace(CONFIG, drop_path_rate=rate)

    def losses(captured):
        model = mc.build(config, backend="torch", device=DEVICE).train()
        trainer = training.Trainer(model, mc.TrainSettings(steps=9, learning_rate=0.01))
        if not captured:
            trainer.captured = lambda batch, settings: trainer._update(batch)
        return [trainer.step(examples())[0] for _ in range(8)], trainer

    plain, _ = losses(False)
    captured, trainer = losses(True)
    assert trainer.captured._graph is not None
    if rate == 0.0:
        assert plain == captured
    else:
        assert len({round(value, 6) for value in captured}) == 8
    assert captured[-1] < captured[0] or rate
