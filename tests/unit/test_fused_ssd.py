"""Mamba-2's kernels in Triton against plain operations: on a GPU, and on a CPU in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so that these tests run again in a process of their own.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import selftest
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.cases.mamba2 import CONFIGS

torch = pytest.importorskip("torch")

from mamba_core.backends.torch import training  # noqa: E402
from mamba_core.backends.torch.kernels import triton, triton_gated_norm  # noqa: E402
from mamba_core.backends.torch.ops import gated_norm  # noqa: E402

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
RUNS = triton.reason(torch.device(DEVICE)) is None and (triton.INTERPRETED or torch.cuda.is_available())
here = pytest.mark.skipif(not RUNS, reason="needs a GPU, or Triton's interpreter")
on_gpu = pytest.mark.skipif(triton.INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of results rounded to the dtype once, and of sums of some hundred products.
CLOSE = {F32: 2e-6, BF16: 8e-3, F16: 1e-3}


@pytest.mark.skipif(triton.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    # Without the project's -q, the last line says how many have passed.
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=--import-mode=importlib", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]


def random(*shape, dtype=F32, seed=0):
    value = np.random.default_rng(seed + sum(shape)).normal(size=shape)
    return torch.from_numpy(value).to(DEVICE, dtype)


def numpy(value):
    return value.detach().double().cpu().numpy()


def assert_alike(found, wanted, limit):
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), index
        if other.numel():
            apart = relative_l2(numpy(one), numpy(other))
            assert apart <= limit, f"{index} is {apart} apart"


# --- the gated norm ------------------------------------------------------------------------------


def normed_with_gradients(kernel, wide, weight, groups, before, dy):
    """The norm of slices of a wider array, and the gradients of that and of the weight."""
    wide, weight = (value.detach().requires_grad_() for value in (wide, weight))
    e = len(weight)
    normed = gated_norm.gated_norm(wide[..., 3 : 3 + e], wide[..., -e:], weight, groups, 0.1, before, kernel)
    return [normed, *torch.autograd.grad(normed, (wide, weight), dy)]


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((2, 5, 24), 1), ((0, 5, 6), 2), ((3, 66), 3), ((1, 11, 7), 1)])
def test_gated_norm(dtype, before, shape, groups, monkeypatch):
    """More rows than programs, groups of no power of 2, and an eps that counts."""
    monkeypatch.setattr(triton_gated_norm, "PROGRAMS", 4)
    e = shape[-1]
    wide, weight, dy = random(*shape[:-1], 2 * e + 8, dtype=dtype), random(e, dtype=dtype), random(*shape, dtype=dtype)
    wanted = normed_with_gradients("plain", *(value.double() for value in (wide, weight)), groups, before, dy.double())
    found = normed_with_gradients("triton", wide, weight, groups, before, dy)
    assert_alike(found, [value.to(dtype) for value in wanted], CLOSE[dtype])
    again = normed_with_gradients("triton", wide, weight, groups, before, dy)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@here
@pytest.mark.gpu
def test_gated_norm_of_columns_and_under_autocast():
    y, z, weight = random(24, 3).mT, random(3, 24, seed=1), random(24)
    with torch.autocast(DEVICE, BF16):
        found = gated_norm.gated_norm(y, z, weight, 2, 1e-5, False, "triton")
    assert found.dtype == BF16
    assert_alike([found], [gated_norm.plain(y, z, weight, 2, 1e-5, False).to(BF16)], CLOSE[BF16])


@here
@pytest.mark.gpu
@pytest.mark.parametrize("change", ["dtype", "shape", "width", "policy"])
def test_gated_norms_that_are_left_to_plain_operations(change, monkeypatch):
    monkeypatch.setattr(triton_gated_norm, "gated_norm", None)
    y, z, weight = random(3, 24), random(3, 24, seed=1), random(24)
    if change == "dtype":
        y = y.double()
    if change == "shape":
        z = z[:1]
    if change == "width":
        monkeypatch.setattr(triton_gated_norm, "WIDEST", 23)
    kernel = "plain" if change == "policy" else "auto"
    found = gated_norm.gated_norm(y, z, weight, 1, 1e-5, False, kernel)
    assert_alike([found], [gated_norm.plain(y, z, weight, 1, 1e-5, False)], 0)


@here
@pytest.mark.gpu
def test_the_transforms_of_a_gated_norm():
    """The operator is as PyTorch wants it; torch.func has its gradient, and what it has not is refused."""
    given = [random(2, 3, 24), random(2, 3, 24, seed=1), random(24)]
    torch.library.opcheck(triton_gated_norm._forward, [value.requires_grad_() for value in given] + [2, 0.1, True, F32])

    def loss(kernel):
        return lambda *values: gated_norm.gated_norm(*values, 2, 0.1, False, kernel).square().sum()

    found, wanted = (torch.func.grad(loss(kernel), (0, 1, 2))(*given) for kernel in ("triton", "plain"))
    assert_alike(found, wanted, 1e-5)
    mapped = torch.func.vmap(loss("triton"), (0, 0, None))
    assert_alike([mapped(*given)], [torch.func.vmap(loss("plain"), (0, 0, None))(*given)], 1e-5)
    with pytest.raises(NotImplementedError, match='kernels="plain"'):
        torch.func.jvp(loss("triton"), tuple(given), tuple(given))
    (first,) = torch.autograd.grad(loss("triton")(*given), given[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match='kernels="plain"'):
        torch.autograd.grad(first.sum(), given[1])


@here
@pytest.mark.gpu
def test_the_gated_norm_passes_its_self_test_and_a_broken_one_does_not(monkeypatch):
    backend, right = mc.registry.get("torch"), triton_gated_norm.gated_norm
    verdict = selftest.examine(backend, "gated_norm", "triton", DEVICE)
    assert verdict.faults == verdict.skipped == ()
    assert verdict.trials == len(gated_norm.TRIALS)
    monkeypatch.setattr(triton_gated_norm, "gated_norm", lambda *given: right(*given) * 1.1)
    assert "from the plain kernel" in selftest.examine(backend, "gated_norm", "triton", DEVICE, False).faults[0]


# --- a model -------------------------------------------------------------------------------------


def pair(config, **settings):
    """(the model, the same in plain operations), in which no parameter is one or zero."""
    torch.manual_seed(0)
    settings = {"device": DEVICE, "kernels": "auto"} | settings
    models = [mc.build(config, backend="torch", **settings | {"kernels": k}) for k in (settings["kernels"], "plain")]
    with torch.no_grad():
        for name, value in models[0].named_parameters():
            if name.endswith((".D", "norm.weight", ".bias")):
                value.normal_(0.5)
            if name.endswith("dt_bias"):
                value.normal_(-2.0, 0.3)
        models[1].load_state_dict(models[0].state_dict())
    return models


@here
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["base", "odd"])
@pytest.mark.parametrize("remat", [False, True])
def test_loss_and_gradients_of_a_model(name, remat, monkeypatch):
    config, calls, right = CONFIGS[name], [], triton_gated_norm.gated_norm
    monkeypatch.setattr(triton_gated_norm, "gated_norm", lambda *given: calls.append(1) or right(*given))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    found = []
    for model in pair(config):
        model.remat = remat
        found.append(training.loss_and_gradients(model, ids))
    assert len(calls) == config.n_layer * (1 + remat)
    (loss, gradients), (wanted, of_plain) = found
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, value in of_plain.items():
        assert relative_l2(gradients[name], value) <= 1e-5, name


@pytest.mark.gpu
@on_gpu
def test_compiled_and_under_autocast():
    model, plain = pair(dataclasses.replace(CONFIGS["odd"], n_layer=2))
    ids = torch.arange(18, device=DEVICE).reshape(2, 9) % model.config.vocab_size
    compiled = torch.compile(model, fullgraph=True)
    for dtype, limit in ((F32, 1e-5), (BF16, 3e-2)):
        found = []
        for one in (compiled, model, plain):
            owner = plain if one is plain else model
            owner.zero_grad()
            with torch.autocast(DEVICE, dtype, enabled=dtype == BF16):
                logits = one(ids).logits
            logits.square().mean().backward()
            found.append([logits, *(parameter.grad for parameter in owner.parameters())])
        for values in found[:2]:
            assert_alike(values, found[2], limit)
