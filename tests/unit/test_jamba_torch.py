"""What PyTorch adds to Jamba: in place, recomputed, compiled, exported, quantised and changed by others."""

import copy
import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.architectures.jamba import JambaConfig
from mamba_core.backends.native import library
from mamba_core.spec.ops import mixture_of_experts as spec
from mamba_core.spec.tolerances import relative_l2

torch = pytest.importorskip("torch")

from mamba_core.backends.torch import decoding, prefill, quantize, stack  # noqa: E402
from mamba_core.backends.torch.kernels import native_step, native_tensors, sorted_experts  # noqa: E402
from mamba_core.backends.torch.ops import attention, mixture_of_experts  # noqa: E402
from mamba_core.backends.torch.positions import call_of  # noqa: E402
from mamba_core.backends.torch.private import tree_leaves, tree_map  # noqa: E402
from mamba_core.sampling import Sampling  # noqa: E402

SMALL = {"d_state": 4, "dt_rank": 3, "num_heads": 4, "num_kv_heads": 2, "initializer_range": 0.3, "vocab_size": 31}
CONFIG = JambaConfig(
    d_model=16, n_layer=4, d_intermediate=12, attn_layer_period=3, attn_layer_offset=1, num_experts=6,
    num_experts_per_tok=2, **SMALL,
)  # fmt: skip
# One layer of each kind, which is compiled in a few seconds.
TWO = dataclasses.replace(CONFIG, n_layer=2)
IDS = torch.tensor(np.random.default_rng(0).integers(0, 31, (2, 24)))
needs_native = pytest.mark.skipif(native_tensors.MISSING is not None, reason=f"native: {native_tensors.MISSING}")


def built(config=CONFIG, **settings):
    return mc.build(config, backend="torch", device="cpu", seed=3, **settings)


def close(found, wanted, **limits):
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(one, other, **limits)


@pytest.fixture(autouse=True)
def forget_compiled():
    torch.compiler.reset()


# --- decoding ----------------------------------------------------------------------------------------------


def test_decoding_writes_its_cache_in_place_and_leaves_the_caller_s(monkeypatch):
    model, wrote, write = built(), [], attention._in_place
    monkeypatch.setattr(attention, "_in_place", lambda *given: wrote.append(given[0].data_ptr()) or write(*given))
    prefilled = prefill(model, IDS[:, :5].numpy(), np.ones((2, 5), bool))
    before = tree_map(torch.clone, prefilled.state)
    again = [[step.tokens.tolist() for step in decoding.decode(model, prefilled, Sampling(), limit=20)] for _ in "ab"]
    assert again[0] == again[1]
    close(prefilled.state, before, rtol=0, atol=0)
    # The layer has keys and values. The first step copies, and so does the state where it grows from 16 to 32.
    assert len(wrote) == 2 * 2 * 18
    assert len(set(wrote[:36])) == 4


def test_a_position_without_room_is_nan_and_not_written():
    """As inside a compiled graph, where the state is not grown."""
    model = built()
    with torch.no_grad():
        state = model(IDS[:, :16]).state
        assert state.layers[1].keys.shape[1] == 16
        call = call_of(None, None, length=1)
        hidden, after = model.backbone(IDS[:, 16:17], state, call)
    assert hidden.isnan().all()
    torch.testing.assert_close(after.layers[1].keys, state.layers[1].keys, rtol=0, atol=0)


# --- which experts are read ----------------------------------------------------------------------------------


def test_a_token_reads_the_experts_that_it_has_chosen_alone(monkeypatch):
    read, product = [], sorted_experts._product
    monkeypatch.setattr(native_step, "MOST_ROWS", 0)  # test_native_experts.py has what the library computes
    monkeypatch.setattr(sorted_experts, "_product", lambda x, w: read.append(w.data_ptr()) or product(x, w))
    experts = built().backbone.layers[1].feed_forward.experts
    with torch.no_grad():
        logits = torch.zeros(1, 1, 6)
        logits[..., [2, 5]] = 3.0
        experts(torch.randn(1, 1, 16), logits)
    names = ("gate_up_proj", "down_proj")
    assert sorted(read) == sorted(getattr(experts, name)[expert].data_ptr() for name in names for expert in (2, 5))


def test_the_last_position_alone_passes_the_last_feed_forward():
    model, lengths, mask = built(), [], torch.arange(24) >= torch.tensor([[3], [0]])
    wanted = model(IDS, mask=mask)
    mixture = model.backbone.layers[3].feed_forward
    mixture.router.register_forward_hook(lambda module, given, y: lengths.append(y.shape[1]))
    prefill(model, IDS.numpy(), mask.numpy())
    assert lengths == [24], "a hooked part is called with all positions"
    plain = built()
    found = prefill(plain, IDS.numpy(), mask.numpy())
    close(found.logits, wanted.logits[:, -1, :31].detach(), rtol=1e-5, atol=1e-5)
    close(found.state, tree_map(torch.detach, wanted.state), rtol=1e-5, atol=1e-5)


@needs_native
def test_the_last_position_is_what_fused_gives():
    model = built()
    with torch.no_grad():
        hidden, _ = model.backbone(IDS, model.init_state(2, 24), call_of(None, None, length=24, last=True, fresh=True))
    assert hidden.shape == (2, 1, 16)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_native_step_computes_a_block_up_to_its_feed_forward(dtype, batch):
    """dt, B and C normed with weights; 3 % off, a bfloat16 rounds less than the plain operations do."""
    config = dataclasses.replace(CONFIG, num_experts_per_tok=6, residual_in_fp32=True)
    models = [built(config, dtype=dtype, kernels=kernels) for kernels in ("auto", "plain")]
    ids = torch.arange(9 * batch).reshape(batch, 9) % 31
    for model in models:
        torch.manual_seed(0)
        for block in model.backbone.layers:
            if type(block.mixer).__name__ == "JambaMixer":
                for norm in (block.mixer.dt_norm, block.mixer.B_norm, block.mixer.C_norm):
                    norm.weight.data.copy_(torch.rand(norm.weight.shape) + 0.5)
    runs = mc.explain(models[0], batch, 1).layers
    assert [(run.first, run.last, run.way) for run in runs] == [
        (0, 0, "native_step"), (1, 1, "fused"), (2, 3, "native_step"),
    ]  # fmt: skip
    with torch.no_grad():
        state = models[0](ids).state
        found, wanted = (model(ids[:, :1], state) for model in models)
    limits = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 5e-2, "atol": 5e-2}
    close(found, wanted, **limits)


def test_the_native_step_leaves_a_norm_that_was_changed():
    model = built()
    model.backbone.layers[2].mixer.B_norm.eps = 0.1
    model.backbone.layers[3].mixer.dt_norm = torch.nn.RMSNorm(3)
    refused = [run.passed_over["native_step"] for run in mc.explain(model, 1, 1).layers if run.first > 1]
    if native_tensors.MISSING is None:
        assert refused == ["a norm of dt, B or C was changed"]


@needs_native
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (4, 2)])
def test_a_few_rows_by_the_library_are_the_reference_s(monkeypatch, rows, dtype, limit):
    calls, step = [], library.experts_step
    monkeypatch.setattr(library, "experts_step", lambda struct: calls.append(struct.b) or step(struct))
    rng = np.random.default_rng(0)
    shapes = {"x": (*rows, 20), "logits": (*rows, 7), "gate_up": (7, 10, 20), "down": (7, 20, 5)}
    arrays = {name: torch.tensor(rng.normal(size=shape)).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    wanted = spec.mixture_of_experts(**{name: value.double().numpy() for name, value in arrays.items()}, top_k=3)
    with torch.no_grad():
        found = mc.mixture_of_experts(**arrays, top_k=3)
    assert relative_l2(found.double().numpy(), wanted) < limit
    assert calls == [rows[0] * rows[1]]


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_products_are_the_plain_form_s(masked):
    """PyTorch has them on a CPU too, where they are not chosen."""
    rng, found = np.random.default_rng(0), []
    shapes = {"x": (2, 9, 16), "logits": (2, 9, 5), "gate_up": (5, 16, 16), "down": (5, 16, 8)}
    values = [torch.tensor(rng.normal(size=shape) / 4, dtype=torch.float32) for shape in shapes.values()]
    values, dy = [value.requires_grad_() for value in values], torch.tensor(rng.normal(size=(2, 9, 16)))
    mask = torch.tensor(rng.random((2, 9)) < 0.6) if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_of_experts.grouped_experts, "reason", lambda *_: None)
        for kernel in ("grouped", "plain"):
            y = mc.mixture_of_experts(*values, top_k=2, mask=mask, kernel=kernel)
            gradients = torch.autograd.grad(y, values, dy.float())
            found.append([y.detach(), *gradients])
    close(*found, rtol=1e-4, atol=1e-5)


def test_grouped_products_say_what_they_take():
    reason = mixture_of_experts.grouped_experts.reason
    assert reason(torch.device("cuda"), torch.bfloat16, (16, 8)) is None
    assert "it takes multiples of 8" in reason(torch.device("cuda"), torch.bfloat16, (16, 12))
    assert "it computes bfloat16" in reason(torch.device("cuda"), torch.float32, (16, 8))
    assert "CUDA only" in reason(torch.device("cpu"), torch.bfloat16, (16, 8))


# --- routers -------------------------------------------------------------------------------------------------


def balance(model, ids):
    """A number that depends on every router's logits."""
    routers = []
    call = call_of(None, None, length=ids.shape[1], fresh=True, routers=routers)
    model.backbone(ids, model.init_state(*ids.shape), call)
    assert [logits.shape for logits in routers] == [(*ids.shape, 6)] * (model.config.n_layer // 2)
    return sum(((index + 1) * logits.sigmoid()).sum() for index, logits in enumerate(routers))


@pytest.mark.parametrize("compiled", [False, True])
def test_routers_have_the_same_gradients_where_blocks_are_computed_again(compiled):
    found = []
    for remat in (False, True):
        model = built(TWO if compiled else CONFIG)
        model.remat = remat
        run = torch.compile(balance, backend="aot_eager", fullgraph=True) if compiled and remat else balance
        value = run(model, IDS)
        value.backward()
        given = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert any("router" in name for name in given)
        found.append({"value": value.detach()} | given)
    assert found[0].keys() == found[1].keys()
    close(list(found[0].values()), list(found[1].values()), rtol=1e-4, atol=1e-5)


def test_routers_are_whole_where_a_sequence_is_computed_in_pieces(monkeypatch):
    monkeypatch.setattr(stack, "FEWEST", 4)
    monkeypatch.setattr(stack, "PIECE_BYTES", 1)
    model = built()
    with torch.no_grad():
        in_pieces = model(IDS)
        assert balance(model, IDS) > 0
    monkeypatch.undo()
    close(in_pieces, tree_map(torch.detach, model(IDS)), rtol=1e-4, atol=1e-5)


def test_pieces_of_blocks_that_are_computed_again(monkeypatch):
    model = built()
    model.remat = True
    loss = model(IDS).logits.square().sum()
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    monkeypatch.setattr(stack, "FEWEST", 4)
    monkeypatch.setattr(stack, "PIECE_BYTES", 1)
    close(torch.autograd.grad(model(IDS).logits.square().sum(), list(model.parameters())), wanted, rtol=1e-3, atol=1e-3)


# --- compiled and exported -----------------------------------------------------------------------------------


def test_a_compiled_training_step_has_no_break():
    model, other = built(TWO), built(TWO)
    torch.compile(lambda ids: other(ids).logits.square().mean(), backend="aot_eager", fullgraph=True)(IDS).backward()
    model(IDS).logits.square().mean().backward()
    close([p.grad for p in other.parameters()], [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)


def test_a_compiled_prompt_and_compiled_steps_have_no_break():
    model, mask = built(TWO), IDS[:, :8] != 3
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, wanted = run(IDS[:, :8], mask=mask), model(IDS[:, :8], mask=mask)
        for step in range(8, 11):
            close(found, wanted, rtol=1e-4, atol=1e-5)
            found, wanted = run(IDS[:, step : step + 1], found.state), model(IDS[:, step : step + 1], wanted.state)


def test_a_compiled_packed_batch_has_no_break():
    model, segments = built(TWO), torch.arange(24).repeat(2, 1) // 7
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(run(IDS, segment_ids=segments), model(IDS, segment_ids=segments), rtol=1e-4, atol=1e-5)


def test_an_exported_program():
    """Of one shape, with and without a state."""
    model = built(TWO).requires_grad_(False)
    state = model(IDS).state
    for given in ((IDS,), (IDS[:, :5], state)):
        exported = torch.export.export(model, given).module()
        close(exported(*given), model(*given), rtol=1e-4, atol=1e-5)


def test_per_sample_gradients():
    model = built()
    parameters = dict(model.named_parameters())

    def loss(parameters, ids):
        return torch.func.functional_call(model, parameters, (ids[None],)).logits.square().mean()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IDS[:, :6])
    for row in range(2):
        value = model(IDS[row : row + 1, :6]).logits.square().mean()
        wanted = torch.autograd.grad(value, list(parameters.values()))
        close([gradient[row] for gradient in found.values()], list(wanted), rtol=1e-3, atol=1e-5)


def test_autocast():
    model = built()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(IDS).logits
    assert (found - model(IDS).logits).norm() < 0.1 * found.norm()


# --- quantised and changed -----------------------------------------------------------------------------------

WIDE = JambaConfig(
    d_model=256, n_layer=3, d_intermediate=256, attn_layer_period=3, attn_layer_offset=1, num_experts=3,
    num_experts_per_tok=2, **SMALL | {"initializer_range": 0.05},
)  # fmt: skip


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.03), (4, 0.4)])
def test_a_quantised_model(bits, limit):
    model = built(WIDE)
    small = quantize(model, bits)
    with torch.no_grad():
        wanted, found = model(IDS).logits, small(IDS).logits
        assert 1e-4 < (found - wanted).norm() / wanted.norm() < limit
    kinds = {name: type(part).__name__ for name, part in small.named_modules()}
    quantised = {name.removeprefix("backbone.layers.") for name, kind in kinds.items() if kind == "QuantizedLinear"}
    assert {
        "1.mixer.in_proj",
        "1.mixer.out_proj",
        "0.feed_forward.gate_up_proj",
        "0.feed_forward.down_proj",
    } < quantised
    experts = small.backbone.layers[1].feed_forward.experts
    assert experts.gate_up_proj is model.backbone.layers[1].feed_forward.experts.gate_up_proj
    tokens = mc.generate(small, IDS[0, :5].tolist(), max_new_tokens=20).tokens[0]
    assert len(tokens) == 20


def test_a_feed_forward_that_is_not_known_is_not_quantised_in_silence():
    model = built(WIDE)
    model.backbone.layers[0].feed_forward = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"the feed-forward of layer 0 is torch.nn.modules.linear.Identity; expected"):
        quantize(model)


class Low(torch.nn.Module):
    """A linear layer and a product of low rank beside it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = torch.nn.Linear(inner.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


PLACES = {
    "attention in": (1, "mixer", "in_proj"),
    "attention out": (1, "mixer", "out_proj"),
    "mamba in": (0, "mixer", "in_proj"),
    "feed-forward": (0, "feed_forward", "gate_up_proj"),
    "router": (1, "feed_forward", "router"),
    "a norm of dt": (0, "mixer", "dt_norm"),
    "the experts": (1, "feed_forward", "experts"),
    "the second norm": (2, "", "norm2"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_changed_part_acts_on_every_path(place):
    """A call with gradients, one without, a prompt, and steps."""
    layer, part, name = place
    model = built()
    with torch.no_grad():
        unlike = model(IDS).logits
    owner = model.backbone.layers[layer].get_submodule(part)
    torch.manual_seed(0)
    if isinstance(getattr(owner, name), torch.nn.Linear):
        setattr(owner, name, Low(getattr(owner, name)))
    else:
        getattr(owner, name).register_forward_hook(lambda module, given, y: 1.5 * y)
    wanted = copy.deepcopy(model)(IDS).logits.detach()
    assert (wanted - unlike).abs().max() > 1e-3
    with torch.no_grad():
        close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        found = prefill(model, IDS[:, :20].numpy(), np.ones((2, 20), bool))
        close(found.logits, wanted[:, 19, :31], rtol=1e-4, atol=1e-4)
        for step in range(20, 24):
            found = model(IDS[:, step : step + 1], found.state)
            close(found.logits[:, 0], wanted[:, step], rtol=1e-4, atol=1e-4)
