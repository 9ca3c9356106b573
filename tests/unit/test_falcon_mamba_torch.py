"""FalconMamba on PyTorch: every fast way against the plain operations, on a CPU and in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so that its tests run in a process of their own.
"""

import copy
import dataclasses
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.mamba import MambaConfig, SelectiveConfig
from mamba_core.backends.native import library
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.cases import falcon_mamba

torch = pytest.importorskip("torch")

from mamba_core.backends import torch as backend  # noqa: E402
from mamba_core.backends.torch import explain, private  # noqa: E402
from mamba_core.backends.torch.kernels import triton  # noqa: E402
from mamba_core.backends.torch.mixers import Options, mixer_class  # noqa: E402
from mamba_core.backends.torch.mixers.falcon_mamba import FalconMambaMixer  # noqa: E402
from mamba_core.backends.torch.ways import cuda_step  # noqa: E402
from mamba_core.kernels import Kernels  # noqa: E402

CONFIGS = falcon_mamba.CONFIGS | {
    "wide": mc.FalconMambaConfig(d_model=40, n_layer=4, vocab_size=61, d_state=9, initializer_range=0.3)
}
WIDE = CONFIGS["wide"]
DEVICE = "cpu" if triton.INTERPRETED or not torch.cuda.is_available() else "cuda"
here = pytest.mark.skipif(triton.INTERPRETED, reason="the interpreter takes long, and is for kernels in Triton")
native = pytest.mark.skipif(
    triton.INTERPRETED or library.missing() is not None, reason=f"native library: {library.missing()}"
)
fused = pytest.mark.skipif(
    triton.reason(torch.device(DEVICE)) is not None, reason="needs a GPU, or Triton's interpreter"
)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# Of float32, and of what bfloat16 rounds in places that differ between two ways.
LIMITS = {"float32": 1e-5, "bfloat16": 4e-2}


@pytest.mark.skipif(triton.INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    # Without the project's -q, the last line says how many have passed.
    command = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=--import-mode=importlib", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]


def built(config=WIDE, kernels="auto", device="cpu", **settings):
    return mc.build(config, backend="torch", device=device, kernels=kernels, **settings)


def pair(config=WIDE, **settings):
    """The model with all its fast ways, and in plain operations."""
    return built(config, **settings), built(config, "plain", **settings)


def tokens(config, rows, length):
    return torch.from_numpy(np.random.default_rng(rows).integers(0, config.vocab_size, (rows, length)))


def numpy(value):
    return value.detach().double().cpu().numpy()


def assert_equal(found, wanted, limit):
    """The tensors of two outputs, states or lists of gradients."""
    for one, other in zip(private.tree_leaves(found), private.tree_leaves(wanted), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert relative_l2(numpy(one), numpy(other)) <= limit


def ways(model, batch=1, length=1):
    return [run[:3] for run in explain(model, batch, length)]


# --- one position on a CPU -----------------------------------------------------------------------


@native
@every_config
@every_dtype
@pytest.mark.parametrize("batch", range(1, 9))
def test_the_native_step(config, dtype, batch):
    """A prompt, and then one position after another, each in one native call."""
    model, plain = pair(config, dtype=dtype)
    assert ways(model, batch) == [(0, config.n_layer - 1, "native_step")]
    assert ways(plain, batch) == [(0, config.n_layer - 1, "plain")]
    ids = tokens(config, batch, 10)
    with torch.no_grad():
        out, wanted = model(ids[:, :4]), plain(ids[:, :4])
        for position in range(4, 10):
            one = ids[:, position : position + 1]
            out, wanted = model(one, out.state), plain(one, wanted.state)
            assert_equal(out, wanted, LIMITS[dtype])


@native
@every_config
def test_the_native_step_is_the_reference(config):
    model = built(config)
    ids = tokens(config, 3, 7)
    whole = ReferenceModel(config, dict(backend.parameters(model)))(ids.numpy().astype(np.int32)).logits
    state = model.init_state(3)
    with torch.no_grad():
        for position in range(7):
            out = model(ids[:, position : position + 1], state)
            state = out.state
            assert relative_l2(numpy(out.logits[:, 0]), whole[:, position]) <= LIMITS["float32"]


@native
def test_the_norms_and_their_eps_count():
    """The same weights in Mamba, and with another eps: what a way that leaves the norms out would compute."""
    fields = {field.name: getattr(WIDE, field.name) for field in dataclasses.fields(SelectiveConfig)}
    others = MambaConfig(**fields), dataclasses.replace(WIDE, mixer_rms_eps=0.1)
    model, ids = built(), tokens(WIDE, 2, 1)
    with torch.no_grad():
        logits = numpy(model(ids).logits)
        for other in map(built, others):
            assert relative_l2(numpy(other(ids).logits), logits) > 1e-3


@native
@every_dtype
@pytest.mark.parametrize("norms", [(0, 2), (1, 3), (2,)])
def test_a_stack_of_both_mixers(dtype, norms):
    """Blocks of Mamba among FalconMamba's, on the native step in one run."""
    model, plain = pair(dtype=dtype)
    for each in (model, plain):
        for layer, block in enumerate(each.backbone.layers):
            if layer not in norms:
                block.mixer = without_norms(block.mixer, layer)
    assert ways(model) == [(0, 3, "native_step")]
    ids = tokens(WIDE, 2, 6)
    with torch.no_grad():
        out, wanted = model(ids), plain(ids)
        assert_equal(out, wanted, LIMITS[dtype])
        assert_equal(model(ids[:, :1], out.state), plain(ids[:, :1], out.state), LIMITS[dtype])


def without_norms(mixer, layer):
    """Mamba's mixer with the same weights."""
    new = mixer_class("mamba")(WIDE, layer, Options(mixer.kernels))
    new.load_state_dict(mixer.state_dict(), assign=True)
    return new


class Doubled(FalconMambaMixer):
    def forward(self, hidden, state, call):
        hidden, state = super().forward(hidden, state, call)
        return 2 * hidden, state


@native
def test_a_subclass_is_left_to_its_own_forward():
    model, plain = pair()
    for each in (model, plain):
        mixer = copy.copy(each.backbone.layers[1].mixer)
        mixer.__class__ = Doubled
        each.backbone.layers[1].mixer = mixer
    assert [run[:2] for run in ways(model)] == [(0, 0), (1, 1), (2, 3)]
    assert [run[2] == "native_step" for run in ways(model)] == [True, False, True]
    assert "Doubled was not written for it" in explain(model)[1][3]["native_step"]
    ids = tokens(WIDE, 2, 6)
    with torch.no_grad():
        out, wanted = model(ids), plain(ids)
        assert_equal(out, wanted, LIMITS["float32"])
        assert_equal(model(ids[:, :1], out.state), plain(ids[:, :1], out.state), LIMITS["float32"])


@native
def test_a_layer_that_was_changed_is_called():
    """A hook on dt_proj, which stands after the norms."""
    model, plain = pair()
    for each in (model, plain):
        each.backbone.layers[2].mixer.dt_proj.register_forward_hook(lambda *_: None)
        each.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda module, given, result: 2 * result)
    assert [run[2] == "native_step" for run in ways(model)] == [False, True, False, True]
    ids = tokens(WIDE, 2, 1)
    with torch.no_grad():
        assert_equal(model(ids), plain(ids), LIMITS["float32"])


# --- whole sequences -----------------------------------------------------------------------------


def observed(model, ids):
    found = {}
    model(ids, observe=found.__setitem__)
    return found


@here
def test_the_nodes_in_their_order():
    found = observed(built(), tokens(WIDE, 1, 5))
    between = list(found)[list(found).index("layers.1.x_proj") : list(found).index("layers.1.out_proj") + 1]
    names = ["x_proj", "dt", "B", "C", "dt_norm", "B_norm", "C_norm", "dt_proj", "scan", "out_proj"]
    assert between == [f"layers.1.{name}" for name in names]
    for name in ("dt", "B", "C"):
        sizes = found[f"layers.1.{name}"].square().mean(-1), found[f"layers.1.{name}_norm"].square().mean(-1)
        torch.testing.assert_close(sizes[1], sizes[0] / (sizes[0] + WIDE.mixer_rms_eps))


@here
def test_norms_are_float32_inside():
    """Rounded once, to the dtype of what is normed."""
    found = observed(built(dtype="bfloat16"), tokens(WIDE, 2, 5))
    for name in ("dt", "B", "C"):
        before, after = found[f"layers.0.{name}"], found[f"layers.0.{name}_norm"]
        wide = before.double()
        wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + WIDE.mixer_rms_eps)
        assert after.dtype is torch.bfloat16
        # Half a unit in the last place, and a little for values in the middle of two.
        assert ((after.double() - wanted).abs() <= wanted.abs() * 2**-8 * 1.001).all()


@here
@every_config
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_gradients(config, remat, kernels):
    """Against the reference's, which are float64 and by hand."""
    model = built(config, kernels)
    model.remat = remat
    ids = tokens(config, 2, 21)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, config.padded_vocab_size))
    (model(ids).logits * torch.from_numpy(weights).float()).sum().backward()
    reference = ReferenceModel(config, dict(backend.parameters(model)))
    wanted, _ = reference.vjp(weights, ids.numpy().astype(np.int32))
    for name, parameter in model.named_parameters():
        assert relative_l2(numpy(parameter.grad), wanted[name]) <= 2e-5, name


@here
def test_plain_kernels_are_differentiable_again_and_in_forward_mode():
    """A second derivative by reverse over reverse, and by forward over reverse."""
    model = built(kernels="plain", dtype="float32")
    values = {name: value.detach() for name, value in model.named_parameters()}
    ids, name = tokens(WIDE, 1, 6), "backbone.layers.0.mixer.x_proj.weight"
    direction = torch.from_numpy(np.random.default_rng(0).normal(size=values[name].shape)).float()

    def loss(weight):
        logits = torch.func.functional_call(model, values | {name: weight}, (ids,)).logits
        return logits.square().mean()

    _, forward = torch.func.jvp(torch.func.grad(loss), (values[name],), (direction,))
    weight = values[name].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
    (reverse,) = torch.autograd.grad((first * direction).sum(), weight)
    assert reverse.abs().max() > 0
    assert relative_l2(numpy(forward), numpy(reverse)) <= 1e-4


@here
@pytest.mark.parametrize("piece", [None, 256])
def test_only_the_last_position_of_a_prompt(piece, monkeypatch):
    """Also where a long prompt is computed in pieces."""
    if piece is not None:
        monkeypatch.setattr(backend.stack, "PIECE_BYTES", 1)
    model, ids = built(), tokens(WIDE, 2, 9 if piece is None else 600).numpy()
    calls = []
    last = FalconMambaMixer.last_position
    monkeypatch.setattr(FalconMambaMixer, "last_position", lambda *a: (calls.append(a[1].shape[1]), last(*a))[1])
    out = backend.prefill(model, ids, np.ones(ids.shape, bool))
    wanted = built(kernels="plain")(torch.from_numpy(ids))
    assert calls
    assert relative_l2(numpy(out.logits), numpy(wanted.logits[:, -1, : WIDE.vocab_size])) <= LIMITS["float32"]
    assert_equal(out.state.layers, wanted.state.layers, LIMITS["float32"])


@here
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 7, "repetition_penalty": 1.2}])
def test_generation(settings):
    """Of padded prompts, with the fast ways and without, and each token's log-probability by the reference."""
    prompts = [[1, 2, 3], [7], [4, 5, 6, 7, 8]]
    found, plain = (mc.generate(model, prompts, max_new_tokens=12, seed=3, **settings) for model in pair())
    assert found.tokens == plain.tokens
    reference = ReferenceModel(WIDE, dict(backend.parameters(built())))
    for prompt, new, logprobs in zip(prompts, found.tokens, found.logprobs, strict=True):
        ids = np.array([prompt + new], np.int32)
        logits = reference(ids).logits[0, len(prompt) - 1 : -1, : WIDE.vocab_size]
        wanted = torch.from_numpy(logits).log_softmax(-1)[range(12), new]
        np.testing.assert_allclose(logprobs, wanted, atol=1e-4)


@here
def test_a_policy_by_op():
    model = built(kernels={"block_step": "plain", "fused_mixer": "plain"})
    assert isinstance(model.policy, Kernels)
    assert "block_step" in explain(model)[0][3]["native_step"]
    ids = tokens(WIDE, 2, 7)
    assert_equal(model(ids), built(kernels="plain")(ids), LIMITS["float32"])


# --- kernels in Triton ---------------------------------------------------------------------------


@fused
@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(("name", "remat"), [("base", False), ("base", True), ("odd", False)])
def test_the_mixer_as_one_operator(name, dtype, remat):
    """Logits, states and gradients."""
    config = CONFIGS[name]
    ids = tokens(config, 2, 9).to(DEVICE)
    found = []
    for model in pair(config, dtype=dtype, device=DEVICE):
        model.remat = remat
        out = model(ids)
        weights = torch.linspace(-1, 1, out.logits.numel(), device=DEVICE).view(out.logits.shape)
        gradients = torch.autograd.grad((out.logits * weights).sum(), list(model.parameters()))
        found.append([*private.tree_leaves(out), *gradients])
    assert_equal(*found, 2e-5 if dtype == "float32" else 8e-2)


@fused
@pytest.mark.gpu
def test_the_mixer_is_one_operator_for_segments_but_not_for_a_mask(monkeypatch):
    calls = []
    kernels = backend.ops.fused_mixer.KERNELS
    inner = kernels["triton"]
    monkeypatch.setitem(kernels, "triton", lambda *given: (calls.append(given[-2]), inner(*given))[1])
    model, plain = pair(device=DEVICE)
    ids = tokens(WIDE, 2, 12).to(DEVICE)
    for name in ("segment_ids", "mask"):
        given = torch.arange(12, device=DEVICE).repeat(2, 1)
        positions = {name: given // 5 if name == "segment_ids" else given >= 3}
        assert_equal(model(ids, **positions), plain(ids, **positions), LIMITS["float32"])
    assert calls == [WIDE.mixer_rms_eps] * WIDE.n_layer


def in_place(model, ids, state):
    """The logits after one position and the states of the layers, which are written in memory of their own."""
    state = state._replace(layers=tuple(type(each)(*(value.clone() for value in each)) for each in state.layers))
    return [cuda_step.logits(model, ids.contiguous(), state), state.layers]


@fused
@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(("name", "batch"), [("base", 1), ("odd", 4), ("odd", 19), ("wide", 2)])
def test_a_position_in_fused_kernels(name, dtype, batch):
    config = dataclasses.replace(CONFIGS[name], n_layer=2)  # one after the embedding and one after another
    model, plain = pair(config, dtype=dtype, device=DEVICE)
    assert cuda_step.reason(model) is None
    ids = tokens(config, batch, 5).to(DEVICE)
    with torch.no_grad():
        state = plain(ids).state
        wanted = plain(ids[:, :1], state)
        found = in_place(model, ids[:, 0], state)
    assert_equal(found, [wanted.logits[:, 0], wanted.state.layers], LIMITS[dtype])


@fused
@pytest.mark.gpu
def test_a_position_of_a_stack_of_both_mixers():
    model, plain = pair(device=DEVICE)
    for each in (model, plain):
        each.backbone.layers[2].mixer = without_norms(each.backbone.layers[2].mixer, 2)
    ids = tokens(WIDE, 2, 5).to(DEVICE)
    with torch.no_grad():
        state = plain(ids).state
        wanted = plain(ids[:, :1], state)
        found = in_place(model, ids[:, 0], state)
    assert_equal(found, [wanted.logits[:, 0], wanted.state.layers], LIMITS["float32"])
    model.backbone.layers[1].mixer.__class__ = Doubled
    assert "Doubled was not written for it" in cuda_step.reason(model)
