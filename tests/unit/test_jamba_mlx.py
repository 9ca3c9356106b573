"""Jamba on MLX: its parts in transformations, computed again, in pieces, replaced and quantised."""

import dataclasses
from functools import partial

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.cases import bases

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_flatten  # noqa: E402 (after the package that it needs)

from mamba_core.backends.mlx import stack  # noqa: E402
from mamba_core.backends.mlx.positions import call_of  # noqa: E402

BACKEND = registry.get("mlx")
# Of four experts two compute a position; every layer has them.
CHOOSES = {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 1, "expert_layer_offset": 0}
CONFIG = dataclasses.replace(bases()["jamba"], **CHOOSES)
IDS = mx.array(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 40)))
LAYERS = {"remat": (True, False), "pieces": (False, True), "remat in pieces": (True, True)}


def build(**settings):
    return mc.build(CONFIG, backend="mlx", device="cpu", seed=1, **settings)


def loss(model, ids):
    return nn.losses.cross_entropy(model(ids[:, :-1]).logits, ids[:, 1:]).mean()


def routed(model, ids):
    """The logits of all routers, (layers, b, l, experts)."""
    routers = []
    call = call_of(None, None, length=ids.shape[1], fresh=True, routers=routers)
    model.backbone(ids, model.init_state(len(ids), ids.shape[1]), call)
    return mx.stack(routers)


def assert_gradients(found, expected, what):
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_l2(np.array(found[name]), np.array(value)) < 1e-5, f"{what}: {name}"


@pytest.mark.parametrize(("remat", "pieces"), LAYERS.values(), ids=LAYERS)
def test_routers_are_outputs_of_what_is_computed_again(monkeypatch, remat, pieces):
    def balance(model, ids):
        return (routed(model, ids) ** 2).mean() + loss(model, ids)

    model = build()
    logits = routed(model, IDS)
    assert logits.shape == (CONFIG.n_layer, *IDS.shape, CONFIG.num_experts)
    expected = nn.value_and_grad(model, balance)(model, IDS)
    model.remat = remat
    cut = []
    if pieces:
        monkeypatch.setattr(stack, "FEWEST", 16)
        monkeypatch.setattr(stack, "PIECE_BYTES", 16)
        split = stack._split
        monkeypatch.setattr(stack, "_split", lambda *given: cut.append(given[1]) or split(*given))
    assert relative_l2(np.array(routed(model, IDS)), np.array(logits)) < 1e-6
    assert bool(cut) == pieces, "not in pieces"
    found = nn.value_and_grad(model, balance)(model, IDS)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_gradients(found[1], expected[1], "computed again")


@pytest.mark.parametrize("remat", [False, True])
def test_a_compiled_training_step_has_the_same_gradients(remat):
    model = build()
    expected = nn.value_and_grad(model, loss)(model, IDS)
    model.remat = remat
    held = [model.state]
    found = partial(mx.compile, inputs=held, outputs=held)(lambda ids: nn.value_and_grad(model, loss)(model, ids))(IDS)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_gradients(found[1], expected[1], "compiled")


def test_a_compiled_call_that_finds_no_room_gives_nan_and_a_state_that_is_refused():
    model, expected = build(), build()(IDS).logits
    call = mx.compile(lambda ids, state: model(ids, state))
    first = call(IDS[:, :12], model.init_state(2, 12))
    full = call(IDS[:, 12:20], first.state)
    logits = np.array(mx.concatenate([first.logits, full.logits], axis=1))
    assert relative_l2(logits[:, :16], np.array(expected[:, :16])) < 3e-6
    assert np.isnan(logits[:, 16:]).all()
    for again in (lambda: model(IDS[:, 20:21], full.state), lambda: mc.room(model, full.state)):
        with pytest.raises(ValueError, match="the state has lost 4 positions"):
            again()
    roomy = mc.grown(model, first.state, 8)
    assert relative_l2(np.array(call(IDS[:, 12:20], roomy).logits), np.array(expected[:, 12:20])) < 3e-6


@pytest.mark.parametrize("kernels", [{"attention": "fused", "mixture_of_experts": "gathered"}, "plain"])
def test_other_kernels_compute_the_same(kernels):
    logits, other = build()(IDS).logits, build(kernels=kernels)(IDS).logits
    assert relative_l2(np.array(other), np.array(logits)) < 3e-6


class Doubled(nn.Module):
    """Something around a module that doubles what it gives."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __call__(self, *given):
        return 2 * self.inside(*given)


PARTS = ("1.mixer.in_proj", "1.mixer.out_proj", "0.mixer.B_norm", "0.feed_forward.router", "2.feed_forward.experts")


@pytest.mark.parametrize("path", PARTS)
def test_a_replaced_part_acts_in_every_way_to_compute(path):
    model = build()
    before = np.array(model(IDS).logits)
    layer, folder, name = path.split(".")
    parent = model.backbone.layers[int(layer)][folder]
    parent[name] = Doubled(parent[name])
    expected = np.array(model(IDS).logits)
    assert relative_l2(expected, before) > 1e-2
    prefilled = BACKEND.prefill(model, np.array(IDS[:, :20]), np.ones((2, 20), bool))
    assert relative_l2(np.array(prefilled.logits), expected[:, 19]) < 3e-6
    state, found = prefilled.state, []
    for at in range(20, 24):
        logits, state = model(IDS[:, at : at + 1], state)
        found.append(np.array(logits[:, 0]))
    assert relative_l2(np.stack(found, axis=1), expected[:, 20:24]) < 3e-6


def test_quantising_leaves_the_experts_and_says_so():
    wide = dataclasses.replace(CONFIG, d_model=64, d_intermediate=32)
    model = mc.build(wide, backend="mlx", device="cpu")
    expected = np.array(model(IDS).logits)
    with pytest.warns(UserWarning, match="experts are not quantised") as told:
        nn.quantize(model, group_size=32, bits=8)
    named = {str(warning.message).split()[0] for warning in told}
    assert named == {f"backbone.layers.{layer}.feed_forward.experts" for layer in range(wide.n_layer)}
    block = model.backbone.layers[1]
    assert isinstance(block.mixer.in_proj, nn.QuantizedLinear)
    assert block.feed_forward.experts.gate_up_proj.dtype == mx.float32
    assert 0 < relative_l2(np.array(model(IDS).logits), expected) < 0.1
