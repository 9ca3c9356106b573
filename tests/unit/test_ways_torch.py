"""Which way computes which blocks on PyTorch, what a call computes once, and modules that somebody replaced."""

import copy

import pytest

import mamba_core as mc
from mamba_core.backends.native import library

torch = pytest.importorskip("torch")

from mamba_core.backend import LayerState  # noqa: E402
from mamba_core.backends.torch import explain, positions, private  # noqa: E402
from mamba_core.backends.torch.kernels import native_tensors  # noqa: E402
from mamba_core.backends.torch.mixers import s6  # noqa: E402
from mamba_core.backends.torch.untouched import untouched  # noqa: E402
from mamba_core.kernels import Kernels  # noqa: E402

CONFIG = mc.MambaConfig(d_model=20, n_layer=5, vocab_size=29, d_state=5, initializer_range=0.3)
IDS = torch.arange(18).reshape(2, 9)
needs_native = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")


def built(config=CONFIG, **settings):
    return mc.build(config, backend="torch", device="cpu", **settings)


class Wrapped(torch.nn.Module):
    """Calls another module, and has nothing else of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *arguments):
        self.calls += 1
        return self.inner(*arguments)


class Subclassed(type(built().backbone.layers[0].mixer)):
    def forward(self, hidden, state, call):
        hidden, state = super().forward(hidden, state, call)
        return 2 * hidden, state


def subclassed(mixer):
    mixer = copy.copy(mixer)
    mixer.__class__ = Subclassed
    return mixer


class Normed(type(built().backbone.layers[0].mixer)):
    """A mixer of the same parameters that norms dt, B and C, and says so to the native step."""

    def native_step(self):
        return s6.native_operands(self, self.selection_eps)

    def forward(self, hidden, state, call):
        x, z = s6.project(self, "in_proj", hidden).chunk(2, dim=-1)
        x, conv = s6.convolve(self, x, state.conv, call)
        dt, B, C = s6.norm_selection(*s6.select(self, x, call), self.selection_eps, call)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state.ssm, call)
        return self.out_proj(y), LayerState(conv, ssm)


def norm_selections(model, *eps):
    """Norms dt, B and C of the first layers with these numbers, and leaves a layer where it is 0."""
    for block, number in zip(model.backbone.layers, eps, strict=False):
        if number:
            block.mixer.__class__, block.mixer.selection_eps = Normed, number


CHANGES = {
    "a LayerNorm": lambda model: setattr(model.backbone.layers[2], "norm", torch.nn.LayerNorm(20)),
    "torch's RMSNorm": lambda model: setattr(model.backbone.layers[2], "norm", torch.nn.RMSNorm(20)),
    "no norm": lambda model: setattr(model.backbone.layers[2], "norm", torch.nn.Identity()),
    "no norm in the first layer": lambda model: setattr(model.backbone.layers[0], "norm", torch.nn.Identity()),
    "another final norm": lambda model: setattr(model.backbone, "norm_f", torch.nn.LayerNorm(20)),
    "a block": lambda model: model.backbone.layers.__setitem__(2, Wrapped(model.backbone.layers[2])),
    "the first block": lambda model: model.backbone.layers.__setitem__(0, Wrapped(model.backbone.layers[0])),
    "a mixer": lambda model: setattr(model.backbone.layers[2], "mixer", Wrapped(model.backbone.layers[2].mixer)),
    "a subclass": lambda model: setattr(model.backbone.layers[2], "mixer", subclassed(model.backbone.layers[2].mixer)),
    "the embedding": lambda model: setattr(model.backbone, "embeddings", Wrapped(model.backbone.embeddings)),
    "a linear": lambda model: setattr(model.backbone.layers[2].mixer, "in_proj", Wrapped(torch.nn.Linear(20, 80))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_replaced_module_is_what_is_computed(change):
    """Prefill, one position and a gradient, against the model in plain operations."""
    models = built(), built(kernels="plain")
    for model in models:
        torch.manual_seed(0)
        change(model)
    with torch.no_grad():
        found, wanted = (model(IDS) for model in models)
        torch.testing.assert_close(found.logits, wanted.logits)
        found, wanted = (model(IDS[:, :1], out.state) for model, out in zip(models, (found, wanted), strict=True))
        torch.testing.assert_close(found.logits, wanted.logits)
    for model in models:
        model(IDS).logits.square().sum().backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


@needs_native
@pytest.mark.parametrize("name", ["a mixer", "a subclass", "a block", "a LayerNorm"])
def test_the_native_step_takes_the_blocks_around_another(name):
    model = built()
    assert explain(model, 2, 1) == [(0, 4, "native_step", {})]
    CHANGES[name](model)
    runs = explain(model, 2, 1)
    assert [run[:2] for run in runs] == [(0, 1), (2, 2), (3, 4)]
    assert [run[2] for run in runs[::2]] == ["native_step"] * 2
    assert runs[1][2] in ("fused", "plain")
    assert runs[1][3]["native_step"]


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_native_step_norms_dt_b_and_c_of_the_blocks_that_do(dtype, batch):
    models = [built(dtype=dtype, kernels=kernels) for kernels in ("auto", "plain")]
    ids = torch.arange(9 * batch).reshape(batch, 9) % 29
    with torch.no_grad():
        state = models[0](ids).state
        unlike = models[0](ids[:, :1], state).logits
        for model in models:
            norm_selections(model, 0, 1e-3, 0.3)
        assert explain(models[0], batch, 1) == [(0, 4, "native_step", {})]
        found, wanted = (model(ids[:, :1], state) for model in models)
    limits = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    for value, other in zip(private.tree_leaves(found), private.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(value, other, **limits)
    assert (found.logits - unlike).abs().max() > 0.05


@needs_native
def test_the_native_step_leaves_an_eps_that_float32_has_not():
    """It would be 0 there, and 0 says that nothing is normed."""
    model = built()
    norm_selections(model, 0, 0, 1e-50)
    runs = explain(model)
    assert [run[:2] for run in runs] == [(0, 1), (2, 2), (3, 4)]
    assert runs[0][2] == runs[2][2] == "native_step"
    assert "1e-50, is too small" in runs[1][3]["native_step"]


@needs_native
def test_the_ways_of_a_policy():
    assert explain(built(kernels="plain"), 1, 7)[0][2] == "plain"
    assert explain(built(), 1, 7)[0][2] == "fused"
    ((_, _, way, why),) = explain(built(kernels={"block_step": "plain"}), 1, 1)
    assert way == "fused"
    assert "block_step" in why["native_step"]
    ((_, _, way, why),) = explain(built(kernels={"block_step": "plain", "rms_norm": "plain"}), 1, 1)
    assert way == "plain"
    assert list(why) == ["native_step", "cuda_step", "fused"]
    assert explain(built(dtype="float16"), 1, 1)[0][2] == "plain"
    assert "at most 8 rows" in explain(built(), 9, 1)[0][3]["native_step"]


def test_positions_are_computed_once_a_call(monkeypatch):
    counts = {"compaction": 0, "_restarts": 0}
    for name in counts:
        function = getattr(positions, name)

        def counted(*arguments, name=name, function=function):
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(positions, name, counted)
    for kernels in ("auto", "plain"):
        built(kernels=kernels)(IDS, mask=IDS != 3, segment_ids=IDS // 4)
    assert counts == {"compaction": 2, "_restarts": 2}


def test_a_policy_by_op():
    model = built(kernels={"selective_scan": "chunked", "causal_conv": "shifted"})
    assert isinstance(model.policy, Kernels)
    assert (model.kernels["selective_scan"], model.kernels["causal_conv"]) == ("chunked", "shifted")
    torch.testing.assert_close(model(IDS).logits, built(kernels="plain")(IDS).logits)
    with pytest.raises(ValueError, match="selective_scan has no kernel 'shifted'"):
        built(kernels={"selective_scan": "shifted"})
    with pytest.raises(ValueError, match="kernels has op 'nonsense'"):
        built(kernels={"nonsense": "auto"})


# --- torch's private API -------------------------------------------------------------------------


def test_hooks_are_found():
    layer, kinds = torch.nn.Linear(2, 2), ("forward", "forward_pre", "full_backward", "full_backward_pre")
    for kind in kinds:
        for owner, name in (
            (layer, f"register_{kind}_hook"),
            (torch.nn.modules.module, f"register_module_{kind}_hook"),
        ):
            assert untouched(torch.nn.Linear, layer)
            with getattr(owner, name)(lambda *_: None):
                assert private.hooked(layer)
                assert not untouched(torch.nn.Linear, layer)
    layer.forward = lambda x: x
    assert not untouched(torch.nn.Linear, layer)
    assert not untouched(torch.nn.Module, torch.nn.Linear(2, 2))


def test_modes_and_transforms_are_found():
    assert not any((private.in_forward_mode(), private.transformed(), private.intercepted()))
    with torch.autograd.forward_ad.dual_level():
        assert private.in_forward_mode()
    seen = []
    torch.func.vmap(lambda x: (seen.append(private.transformed()), x)[1])(torch.ones(2))
    with torch.overrides.TorchFunctionMode():
        seen.append(private.intercepted())
    with torch.utils._python_dispatch.TorchDispatchMode():
        seen.append(private.intercepted())
    assert seen == [True] * 3


def test_the_private_names_are_there():
    assert private.onednn_linear is not None or not torch.backends.mkldnn.is_available()
    assert private.tree_leaves(private.tree_map(lambda x: x + 1, (1, [2]))) == [2, 3]
    assert library.missing() == native_tensors.MISSING
