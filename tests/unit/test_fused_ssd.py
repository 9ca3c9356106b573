"""Mamba-2's kernels in Triton against plain operations: on a GPU, and on a CPU in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so that these tests run again in a process of their own.
"""

import dataclasses
import importlib.util
import itertools

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import selftest
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.cases.mamba2 import CONFIGS

torch = pytest.importorskip("torch")

from mamba_core.backends.torch import decoding, private, quantize, training  # noqa: E402
from mamba_core.backends.torch.kernels import triton, triton_gated_norm, triton_linear, triton_ssd_step  # noqa: E402
from mamba_core.backends.torch.mixers import s6  # noqa: E402
from mamba_core.backends.torch.ops import gated_norm  # noqa: E402
from mamba_core.backends.torch.quantization import GROUP, pack, unpack  # noqa: E402
from mamba_core.backends.torch.ways import cuda_step  # noqa: E402
from mamba_core.sampling import Sampling  # noqa: E402
from tests.unit.triton_compile import run_in_the_interpreter  # noqa: E402

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
RUNS = triton.reason(torch.device(DEVICE)) is None and (triton.INTERPRETED or torch.cuda.is_available())
here = pytest.mark.skipif(not RUNS, reason="needs a GPU, or Triton's interpreter")
on_gpu = pytest.mark.skipif(triton.INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of results rounded to the dtype once, and of sums of some hundred products.
CLOSE = {F32: 2e-6, BF16: 8e-3, F16: 1e-3}


@pytest.mark.skipif(not triton.INTERPRETED, reason="not in the interpreter")
def test_the_interpreter_is_there():
    assert RUNS


@pytest.mark.skipif(triton.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    run_in_the_interpreter(__file__)


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
def test_a_gated_norm_whose_weight_lies_apart_and_groups_that_do_not_divide_it():
    y, z, weight, dy = random(3, 24), random(3, 24, seed=1), random(48)[::2], random(3, 24, seed=2)

    def both(kernel):
        leaves = [value.detach().requires_grad_() for value in (y, z, weight)]
        normed = gated_norm.gated_norm(*leaves, 2, 0.1, False, kernel)
        return [normed, *torch.autograd.grad(normed, leaves, dy)]

    assert_alike(both("auto"), both("plain"), CLOSE[F32])
    with pytest.raises(RuntimeError, match="unflatten"):
        gated_norm.gated_norm(y, z, weight, 5, 0.1, False)


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
@pytest.mark.parametrize(("name", "remat"), [("base", False), ("odd", True)])
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


# --- one position --------------------------------------------------------------------------------

# Every branch of the kernels: several groups, channels beside the recurrence, limits of the steps, no norm at all.
WIDE = dataclasses.replace(CONFIGS["base"], d_model=20, d_state=20, headdim=5, norm_eps=0.1)
POSITIONS = CONFIGS | {
    "wide": WIDE,
    "before": dataclasses.replace(WIDE, norm_before_gate=True, dt_limit=(0.05, 0.2)),
    "groups": dataclasses.replace(WIDE, ngroups=2),
    "beside": dataclasses.replace(WIDE, d_ssm=30, D_has_hdim=True, bias=True),
}
LIMITS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 4e-2}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """A program takes the interpreter some milliseconds, whatever it computes."""
    if triton.INTERPRETED:
        monkeypatch.setattr(triton_linear, "_outputs_of_program", lambda n, rows: 8)


def in_place(model, ids, state):
    """The logits after one position and the states of the layers, which are written in memory of their own."""
    state = state._replace(layers=tuple(type(each)(*(value.clone() for value in each)) for each in state.layers))
    return [cuda_step.logits(model, ids.contiguous(), state), *private.tree_leaves(state.layers)]


def assert_same(models, batch, limit):
    """That positions after a prompt of the plain model are alike on both."""
    model, plain = models
    assert cuda_step.reason(model) is None
    ids = torch.arange(batch * 6, device=DEVICE).reshape(batch, 6) % model.config.vocab_size
    with torch.no_grad():
        state = plain(ids[:, :5]).state
        wanted = plain(ids[:, 5:], state)
        found = in_place(model, ids[:, 5], state)
    assert_alike(found, [wanted.logits[:, 0], *private.tree_leaves(wanted.state.layers)], limit)


# Of few rows; of some, in half precision; of many, whose products are PyTorch's, in float32.
FEW = [*((name, "float32") for name in POSITIONS if name not in ("base", "wide")), ("wide", "bfloat16")]
SOME, MANY = [("odd", "bfloat16"), ("wide", "float16")], [("before", "float32"), ("beside", "float32")]
QUICK = [*((*each, 2) for each in FEW), *((*each, 5) for each in (*SOME, *MANY))]
EVERY = itertools.product(POSITIONS, LIMITS, (1, 2, 4, 5, 70, 150))


@here
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype", "batch"), [*QUICK, *(pytest.param(*each, marks=on_gpu) for each in EVERY if each not in QUICK)]
)
def test_a_position_in_fused_kernels(name, dtype, batch):
    assert_same(pair(dataclasses.replace(POSITIONS[name], n_layer=1), dtype=dtype), batch, LIMITS[dtype])


@here
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_norm_before_a_product_with_a_sum(bits):
    """As out_proj of few rows has them."""
    weight, norm, x, residual = random(7, 512), random(512, seed=1), random(3, 512), random(3, 7)
    packed = triton_linear.Packed(*pack(weight, bits), bits, GROUP) if bits else weight
    weight = unpack(packed, F32) if bits else weight
    found = torch.empty_like(residual)
    triton_linear.multiply(x, packed, None, found, norm=norm, eps=0.1, residual=residual)
    wide = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 0.1) * norm
    assert_alike([found.double()], [residual.double() + wide @ weight.double().mT], 2e-6)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("bits", "batch"), [(8, 1), (4, 3), (8, 5), (4, 130)])
def test_a_position_of_quantised_weights(bits, batch):
    config = dataclasses.replace(CONFIGS["base"], d_model=256, headdim=64)
    assert_same([quantize(model, bits) for model in pair(config, dtype="bfloat16")], batch, LIMITS["bfloat16"])


@here
@pytest.mark.gpu
def test_a_position_of_many_channels_and_states():
    """Heads whose channels and states are cut into several programs, of no power of 2."""
    config = dataclasses.replace(CONFIGS["base"], d_model=10, d_state=130, headdim=20, n_layer=1)
    assert_same(pair(config), 1, LIMITS["float32"])


@here
@pytest.mark.gpu
def test_a_nan_and_an_endless_rate_in_a_position_are_as_in_plain_operations():
    """A NaN is not lost in the limits, and a rate of -inf is none where the step is zero."""
    models = pair(dataclasses.replace(WIDE, n_layer=1, dt_limit=(0.0, 0.2)))
    for model in models:
        with torch.no_grad():
            mixer = model.backbone.layers[0].mixer
            mixer.A_log[0], mixer.dt_bias[0], mixer.dt_bias[1], mixer.A_log[2] = torch.inf, -1e3, torch.nan, torch.nan
    ids = torch.arange(2, device=DEVICE)
    with torch.no_grad():
        state = models[1].init_state(2)
        state.layers[0].ssm.fill_(1.0)
        ssm = in_place(models[0], ids, state)[-1]
        wanted = models[1](ids[:, None], state).state.layers[0].ssm
    torch.testing.assert_close(ssm, wanted, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert (wanted[:, 0] == 1.0).all()
    assert wanted[:, 1:3].isnan().all()


def changed(name):
    """(what is done to a model's last mixer, what is said of it)."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def replaced(mixer, path, kind=Doubled):
        mixer.get_submodule(path).__class__ = kind

    return {
        "in_proj": (lambda mixer: replaced(mixer, "in_proj"), "a layer of the mixer was changed"),
        "norm": (lambda mixer: replaced(mixer, "norm", type("Norm", (type(mixer.norm),), {})), "a layer of the mixer"),
        "hook": (lambda mixer: mixer.norm.register_forward_hook(lambda *given: None), "a layer of the mixer"),
        "groups": (lambda mixer: setattr(mixer.norm, "groups", 4), "other groups"),
        "D": (lambda mixer: setattr(mixer, "D", None), "was removed"),
        "limit": (lambda mixer: setattr(mixer, "dt_limit", (0.3, 0.1)), "dt_limit is"),
        "dtype": (lambda mixer: mixer.out_proj.half(), "another dtype"),
        "step": (lambda mixer: setattr(mixer, "dt_bias", torch.nn.Parameter(mixer.dt_bias.double())), "a dtype"),
        "sizes": (lambda mixer: setattr(mixer, "headdim", 10), "do not fit"),
        "states": (lambda mixer: setattr(triton_ssd_step, "ENTRIES", 8), "20 states"),
        "mixer": (lambda mixer: setattr(mixer, "__class__", type("M", (type(mixer),), {})), "not written for it"),
    }[name]


@here
@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["in_proj", "norm", "hook", "groups", "D", "limit", "dtype", "step", "sizes", "states", "mixer"]
)
def test_a_position_of_a_mixer_that_was_changed_is_left_to_others(name, monkeypatch):
    monkeypatch.setattr(triton_ssd_step, "ENTRIES", triton_ssd_step.ENTRIES)
    model, _ = pair(dataclasses.replace(WIDE, ngroups=2))
    assert cuda_step.reason(model) is None
    change, why = changed(name)
    change(model.backbone.layers[-1].mixer)
    assert why in cuda_step.reason(model)


@here
@pytest.mark.gpu
def test_a_policy_leaves_a_position_to_plain_operations():
    model, _ = pair(WIDE, kernels={"block_step": "plain"})
    assert cuda_step.reason(model) == "kernels has 'plain' for block_step"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 5}])
def test_decoding_as_a_graph(dtype, settings, monkeypatch):
    """Twice, for the second finds the first's graph; the states of a prompt come in another layout in memory."""
    model, _ = pair(WIDE, dtype=dtype)
    prefill = decoding.prefill

    def in_columns(*given, **options):
        out = prefill(*given, **options)
        layers = [type(each)(*(value.mT.contiguous().mT for value in each)) for each in out.state.layers]
        return out._replace(state=out.state._replace(layers=tuple(layers)))

    monkeypatch.setattr(mc.registry.get("torch"), "prefill", in_columns)
    assert decoding._captures(model, Sampling(**settings))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    found = [mc.generate(model, prompts, max_new_tokens=40, seed=3, **settings).tokens for _ in range(2)]
    assert found[0] == found[1]
    if dtype == "float32":
        monkeypatch.setattr(decoding, "_captures", lambda *_: False)
        assert mc.generate(model, prompts, max_new_tokens=40, seed=3, **settings).tokens == found[0]


# --- training ------------------------------------------------------------------------------------


def test_which_training_steps_are_captured(monkeypatch):
    """Those of Mamba-2 whatever the scan of Mamba-1 is, but not position by position, and no mixer that was changed."""

    def captures(config, kernels):
        trainer = training.Trainer(mc.build(config, backend="torch", device="cpu", kernels=kernels), mc.TrainSettings())
        assert not trainer.captures(None)
        trainer.on_gpu = True
        return trainer, trainer.captures(None)

    trainer, found = captures(WIDE, {"selective_scan": "plain"})
    assert found
    assert not captures(WIDE, {"ssd": "sequential"})[1]
    assert not captures(WIDE, "plain")[1]
    trainer.model.backbone.layers[1].mixer.norm.register_forward_hook(lambda *given: None)
    assert not trainer.captures(None)
    untied, found = captures(dataclasses.replace(WIDE, tie_embeddings=False), "auto")
    assert found
    untied.model.lm_head.register_forward_hook(lambda *given: None)
    assert not untied.captures(None)
    mamba = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16)
    assert not captures(mamba, "auto")[1]
    monkeypatch.setattr(s6.selective_scan, "kernel_for", lambda *_: "cuda")
    trainer, found = captures(mamba, "auto")
    assert found
    mixer = trainer.model.backbone.layers[0].mixer
    mixer.__class__ = type("Other", (type(mixer),), {})
    trainer.model.backbone.record()
    assert not trainer.captures(None)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_training_steps_as_graphs(dtype, autocast, remat):
    """The same bits as when all steps are plain."""

    def losses(captured):
        model = mc.build(WIDE, backend="torch", device=DEVICE, dtype=dtype)
        model.remat = remat
        trainer = training.Trainer(model, mc.training.TrainSettings(steps=9, learning_rate=0.01))
        assert trainer.captures(None)
        if not captured:
            trainer.captured = lambda tokens, settings: trainer._update(tokens)
        found = []
        ids = np.random.default_rng(0).integers(0, WIDE.vocab_size, (2, 40)).astype(np.int32)
        for length in (40, 40, 40, 40, 23, 23, 23, 23):
            with torch.autocast(DEVICE, BF16, enabled=autocast):
                found.append(trainer.step(ids[:, :length]))
        return found, trainer.state()

    (plain, its_state), (captured, state) = losses(False), losses(True)
    assert plain == captured
    assert plain[3][0] < plain[0][0]
    assert all(np.array_equal(state[name], value) for name, value in its_state.items())


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
