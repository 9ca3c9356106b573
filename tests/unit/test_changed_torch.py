"""Modules of a PyTorch model that somebody replaced, hooked, patched or parametrised: they act on every path."""

import copy
import pickle

import pytest

import mamba_core as mc
from mamba_core import registry

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

from mamba_core.backends.torch import decoding, quantize, training  # noqa: E402
from mamba_core.backends.torch.blocks import Block, RMSNorm  # noqa: E402
from mamba_core.backends.torch.heads.lm import LanguageModel  # noqa: E402
from mamba_core.backends.torch.layers import StepProjection  # noqa: E402
from mamba_core.backends.torch.mixers.mamba import MambaMixer  # noqa: E402
from mamba_core.backends.torch.untouched import untouched  # noqa: E402
from mamba_core.backends.torch.ways import cuda_step  # noqa: E402
from mamba_core.sampling import Sampling  # noqa: E402
from mamba_core.spec.tolerances import relative_l2  # noqa: E402

SIZES = {"d_model": 8, "n_layer": 2, "vocab_size": 20, "d_state": 3, "initializer_range": 0.3}
ARCHITECTURES = {"mamba": mc.MambaConfig, "minimamba": mc.MiniMambaConfig, "falcon_mamba": mc.FalconMambaConfig}
LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
IDS = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[False] * 3 + [True] * 6, [True] * 4 + [False] + [True] * 4])
SEGMENTS = torch.tensor([[1] * 4 + [2] * 5, [3] * 2 + [4] * 4 + [3] * 3])
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
FACTOR = 1.5


def built(name="mamba", dtype="float32", kernels="auto", **settings):
    """A model whose steps are large enough for every layer to show in the logits."""
    config = ARCHITECTURES[name](**SIZES | settings)
    model = mc.build(config, backend="torch", device="cpu", dtype=dtype, kernels=kernels, seed=1)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.dt_proj.bias += 3.0
            block.mixer.x_proj.weight *= 5.0
            block.mixer.dt_proj.weight *= 3.0
    return model


def routes(model) -> dict[str, torch.Tensor]:
    """What the model computes on each path."""
    found = {"with a gradient": model(IDS).logits.detach()}
    with torch.no_grad():
        found["whole"] = model(IDS).logits
        first = model(IDS[:, :4])
        found["in chunks"] = torch.cat([first.logits, model(IDS[:, 4:], first.state).logits], dim=1)
        state, steps = None, []
        for token in IDS.unbind(1):
            out = model(token[:, None], state)
            state = out.state
            steps.append(out.logits)
        found["in steps"] = torch.cat(steps, dim=1)
        found["masked"] = model(IDS, mask=MASK).logits
        found["packed"] = model(IDS, segment_ids=SEGMENTS).logits
        found["packed and masked"] = model(IDS, segment_ids=SEGMENTS, mask=MASK).logits
    found["generated"] = torch.tensor(mc.generate(model, PROMPTS, max_new_tokens=4).logprobs)
    found["loss"] = training.loss(model, IDS, MASK).detach()
    return found


def assert_alike(model, wanted, limit=1e-5):
    found = routes(model)
    for route, value in (wanted if isinstance(wanted, dict) else routes(wanted)).items():
        assert relative_l2(found[route], value) < limit, route


def scaled(layer):
    """The layer with FACTOR times its output, by its weights."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= FACTOR


def places(model) -> dict[str, tuple]:
    """Name -> (owner, attribute) of a layer of each kind."""
    block = model.backbone.layers[1]
    found = {name: (block.mixer, name) for name in LAYERS}
    found |= {"norm": (block, "norm"), "norm_f": (model.backbone, "norm_f")}
    found |= {"embeddings": (model.backbone, "embeddings")}
    return found | ({} if model.lm_head is None else {"lm_head": (model, "lm_head")})


class Wrapped(nn.Module):
    """FACTOR times what another layer gives, without any attribute of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return FACTOR * self.inner(*arguments)


def by_wrapper(owner, name):
    setattr(owner, name, Wrapped(getattr(owner, name)))


def by_hook(owner, name):
    getattr(owner, name).register_forward_hook(lambda module, given, out: FACTOR * out)


def by_hook_with_kwargs(owner, name):
    hook = lambda module, given, named, out: FACTOR * out  # noqa: E731
    getattr(owner, name).register_forward_hook(hook, with_kwargs=True, always_call=True)


def by_instance(owner, name):
    layer = getattr(owner, name)
    layer.forward = lambda x, forward=layer.forward: FACTOR * forward(x)


def by_subclass(owner, name):
    layer = getattr(owner, name)
    kind = type(layer)
    layer.__class__ = type("Other", (kind,), {"forward": lambda self, x: FACTOR * kind.forward(self, x)})


class Times(nn.Module):
    def forward(self, weight):
        return FACTOR * weight


def by_parametrization(owner, name):
    layer = getattr(owner, name)
    for parameter in [name for name, _ in layer.named_parameters()]:
        parametrize.register_parametrization(layer, parameter, Times())


CHANGES = (by_wrapper, by_hook, by_hook_with_kwargs, by_instance, by_subclass, by_parametrization)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_changed_layer_acts_on_every_path(name, change):
    """Each layer alone, against the model of the weights that compute the same."""
    tied = name != "falcon_mamba"
    base = routes(built(name, tie_embeddings=tied))
    for place in places(built(name, tie_embeddings=tied)):
        model, wanted = built(name, tie_embeddings=tied), built(name, tie_embeddings=tied)
        change(*places(model)[place])
        scaled(getattr(*places(wanted)[place]))
        wanted = routes(wanted)
        # The norms after x_proj take a factor away.
        assert place == "x_proj" or relative_l2(base["in steps"], wanted["in steps"]) > 1e-4, place
        assert_alike(model, wanted)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, StepProjection, RMSNorm, nn.Embedding])
def test_a_patched_class_acts_on_every_path(kind, monkeypatch):
    wanted = built()
    for module in list(wanted.modules()):
        if type(module) is kind:
            scaled(module)
    wanted, model, forward = routes(wanted), built(), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: FACTOR * forward(self, x))
    assert not untouched(kind, *(module for module in model.modules() if type(module) is kind))
    assert_alike(model, wanted)
    monkeypatch.undo()
    assert untouched(kind)


@pytest.mark.parametrize("function", ["forward", "__call__"])
@pytest.mark.parametrize("kind", [Block, MambaMixer])
def test_a_patched_block_or_mixer_acts_on_every_path(kind, function, monkeypatch):
    hooked, model, given = built(), built(), getattr(kind, function)
    for block in hooked.backbone.layers:
        part = block if kind is Block else block.mixer
        part.register_forward_hook(lambda module, given, out: (FACTOR * out[0], out[1]))

    def patched(self, *arguments):
        out, state = given(self, *arguments)
        return FACTOR * out, state

    wanted = routes(hooked)
    assert relative_l2(routes(model)["in steps"], wanted["in steps"]) > 1e-2
    monkeypatch.setattr(kind, function, patched)
    assert_alike(model, wanted)


def test_what_was_patched_before_the_model_was_built_acts(monkeypatch):
    forward, calls = MambaMixer.forward, []
    monkeypatch.setattr(MambaMixer, "forward", lambda self, *given: (calls.append(1), forward(self, *given))[1])
    model = built()
    with torch.no_grad():
        model(IDS[:, :1])
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["mamba", "minimamba"])
def test_hooks_of_the_backward_pass_and_before_a_call_run(name):
    for place in places(built(name)):
        for kind in ("forward_pre", "full_backward", "full_backward_pre", "backward"):
            model, calls = built(name), []
            layer = getattr(*places(model)[place])
            getattr(layer, f"register_{kind}_hook")(lambda *given, calls=calls: calls.append(1))
            (model.backbone.embeddings.weight.sum() * 0 + model(IDS).logits.sum()).backward()
            assert calls, (place, kind)
            if kind == "forward_pre":
                calls.clear()
                with torch.no_grad():
                    model(IDS[:, :1])
                assert calls, (place, "in a step")


@pytest.mark.parametrize("name", ["mamba", "minimamba"])
def test_weight_norm_and_prune(name):
    """They keep the function at first; then a new norm, and a mask, act."""
    base = routes(built(name))
    for place in (*LAYERS, "embeddings"):
        for norm in (torch.nn.utils.weight_norm, parametrizations.weight_norm):
            model, wanted = built(name), built(name)
            layer = norm(getattr(*places(model)[place]), "weight")
            assert_alike(model, base)
            with torch.no_grad():
                gain = layer.weight_g if hasattr(layer, "weight_g") else layer.parametrizations.weight.original0
                gain *= FACTOR
                getattr(*places(wanted)[place]).weight.mul_(FACTOR)
            assert_alike(model, wanted)
        model, wanted = built(name), built(name)
        prune.l1_unstructured(getattr(*places(model)[place]), "weight", amount=0.5)
        with torch.no_grad():
            getattr(*places(wanted)[place]).weight.copy_(getattr(*places(model)[place]).weight)
        assert_alike(model, wanted)


def test_a_parametrised_parameter_of_a_mixer():
    model, wanted = built(), built()
    for name in ("A_log", "D"):
        parametrize.register_parametrization(model.backbone.layers[0].mixer, name, Times())
        with torch.no_grad():
            getattr(wanted.backbone.layers[0].mixer, name).mul_(FACTOR)
    assert_alike(model, wanted)


class Stored(nn.Module):
    """A linear layer whose weight is of another dtype, with a forward of its own."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_a_linear_of_another_dtype(name, dtype):
    model, wanted = built(), built()
    for block, other in zip(model.backbone.layers, wanted.backbone.layers, strict=True):
        stored = Stored(getattr(block.mixer, name))
        with torch.no_grad():
            getattr(other.mixer, name).weight.copy_(stored.weight.float() * stored.scale)
        setattr(block.mixer, name, stored)
    if dtype == "bfloat16":
        model, wanted = model.to(torch.bfloat16), wanted.to(torch.bfloat16)
        for block in model.backbone.layers:
            layer = getattr(block.mixer, name)
            layer.weight.data = layer.weight.data.to(torch.int8)
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(torch.bfloat16))
    assert_alike(model, wanted, 1e-5 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_of_the_framework(dtype):
    """Its weight may have another dtype, and it returns another one than ours."""
    model, wanted = built(dtype=dtype), built(dtype=dtype)
    for block in model.backbone.layers:
        block.norm = nn.RMSNorm(8, eps=block.norm.eps)
    model.backbone.norm_f = nn.RMSNorm(8, eps=model.backbone.norm_f.eps)
    assert model.dtype == dtype
    assert model.init_state(1).layers[0].conv.dtype == getattr(torch, dtype)
    assert_alike(model, wanted, 1e-5 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hooked_layers_in_bfloat16(name):
    """Hooks that change nothing: all layers are called in the dtypes that they have."""
    model, wanted = built(name, "bfloat16"), built(name, "bfloat16")
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    assert_alike(model, wanted, 5e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_somebody_s_own(tied):
    model, wanted = built(tie_embeddings=tied), built(tie_embeddings=tied)
    model.lm_head = nn.Linear(8, 24)
    kept = copy.deepcopy(model.lm_head)
    wanted.register_forward_hook(lambda module, given, out: out)
    wanted.head = lambda hidden: nn.functional.linear(hidden, kept.weight, kept.bias)
    assert_alike(model, wanted)
    assert cuda_step.reason(model) == "its head was changed"


# --- convolutions --------------------------------------------------------------------------------


def convolution(kind) -> nn.Module:
    """Another module in the place of conv1d, of 16 channels and 4 taps."""
    torch.manual_seed(3)
    padded = lambda layer, left: nn.Sequential(nn.ConstantPad1d((left, 0), 0.0), layer)  # noqa: E731
    return {
        "dense, as torch pads": lambda: nn.Conv1d(16, 16, 4, padding=3),
        "dense, causal padding": lambda: padded(nn.Conv1d(16, 16, 4), 3),
        "dense, no padding": lambda: nn.Conv1d(16, 16, 4),
        "fewer taps": lambda: padded(nn.Conv1d(16, 16, 2, groups=16), 1),
        "strided": lambda: nn.Conv1d(16, 16, 4, padding=3, stride=2),
        "dilated": lambda: nn.Conv1d(16, 16, 2, padding=2, dilation=2, groups=16),
        "more taps": lambda: padded(nn.Conv1d(16, 16, 5), 4),
        "centred": lambda: nn.Conv1d(16, 16, 4, padding="same"),
        "too short": lambda: padded(nn.Conv1d(16, 16, 4), 2),
    }[kind]()


@pytest.mark.parametrize("kind", ["dense, as torch pads", "dense, causal padding", "dense, no padding", "fewer taps"])
def test_another_convolution_is_called(kind):
    """Against each sequence alone and whole, by the layer called by hand."""
    model = built()
    for block in model.backbone.layers:
        block.mixer.conv1d = convolution(kind)
    found = routes(model)
    for route in ("with a gradient", "in chunks", "in steps"):
        assert relative_l2(found[route], found["whole"]) < 1e-5, route
    with torch.no_grad():
        assert relative_l2(found["packed"][0, 4:], model(IDS[:1, 4:]).logits[0]) < 1e-5
        assert relative_l2(found["packed"][1, 2:6], model(IDS[1:, 2:6]).logits[0]) < 1e-5
        assert relative_l2(found["masked"][0, 3:], model(IDS[:1, 3:]).logits[0]) < 1e-5
        kept = IDS[1:, MASK[1]]
        assert relative_l2(found["masked"][1, MASK[1]], model(kept).logits[0]) < 1e-5
        assert not found["masked"][~MASK].any()
        # The layer of the first block, by hand.
        seen = {}
        model(IDS, observe=lambda node, value: seen.update({node: value}))
        x = torch.nn.functional.pad(seen["layers.0.x"].mT, (3, 0))
        y = model.backbone.layers[0].mixer.conv1d(x)
        y = y if y.shape[2] == 9 else y[..., 3:12]
        assert relative_l2(seen["layers.0.conv"], torch.nn.functional.silu(y).mT) < 1e-5
        assert model(IDS[:, :0], model(IDS).state).logits.shape[1] == 0


@pytest.mark.parametrize("kind", ["strided", "dilated", "more taps", "centred"])
def test_a_convolution_that_reaches_elsewhere_is_refused(kind):
    model = built()
    model.backbone.layers[1].mixer.conv1d = convolution(kind)
    with pytest.raises(TypeError, match="in the place of conv1d has a convolution"):
        model(IDS)


def test_a_convolution_of_other_positions_is_refused():
    model = built()
    model.backbone.layers[1].mixer.conv1d = convolution("too short")
    with pytest.raises(
        ValueError, match=r"in the place of conv1d gives 11 positions for 12; expected 15 .*, 12 .* or 9"
    ):
        model(IDS)


# --- the model's own call ------------------------------------------------------------------------


def shifted(out):
    return out._replace(logits=out.logits.roll(1, -1))


def shifted_by_hook(model):
    model.register_forward_hook(lambda module, given, out: shifted(out))


def shifted_by_instance(model):
    forward = model.forward
    model.forward = lambda *given, **named: shifted(forward(*given, **named))


class Shifted(LanguageModel):
    def forward(self, input_ids, state=None, mask=None):
        return shifted(super().forward(input_ids, state, mask=mask))


def shifted_by_class(model):
    model.__class__ = Shifted


@pytest.mark.parametrize("change", [shifted_by_hook, shifted_by_instance, shifted_by_class])
def test_the_model_s_own_call_is_what_decodes_and_trains(change):
    """Shifted by one, because the argument of the largest logit is."""
    model, plain = built(vocab_size=24), built(vocab_size=24)
    change(model)
    prefilled, wanted = (decoding.prefill(each, IDS.numpy(), MASK.numpy()) for each in (model, plain))
    torch.testing.assert_close(prefilled.logits, wanted.logits.roll(1, -1))
    after = [
        decoding.advance(each, decoding.begin(prefilled, None, None, Sampling()), None, Sampling()).state
        for each in (model, plain)
    ]
    torch.testing.assert_close(after[0].layers[1].ssm, after[1].layers[1].ssm)
    tokens = mc.generate(model, [[1, 2, 3]], max_new_tokens=4).tokens[0]
    expected, ids = [], [1, 2, 3]
    for _ in range(4):
        expected.append((plain(torch.tensor([ids])).logits[0, -1].argmax().item() + 1) % 24)
        ids.append(expected[-1])
    assert tokens == expected
    assert training.loss(model, IDS) != training.loss(plain, IDS)
    wanted = training.loss(model, IDS).item()
    assert registry.get("torch").trainer(model, mc.TrainSettings()).step(IDS.numpy())[0] == pytest.approx(wanted)


def test_hooks_of_the_model_and_of_the_backbone_run_in_every_step():
    model, calls = built(), []
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    model.backbone.register_forward_hook(lambda *_: calls.append("backbone"))
    mc.generate(model, [[1, 2]], max_new_tokens=3)
    assert calls == ["model", "backbone"] * 3


def test_a_wrapped_backbone():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, inputs, state, call):
            hidden, state = self.inner(inputs, state, call)
            return FACTOR * hidden, state

    model, wanted = built(), built()
    model.backbone = Around(model.backbone)
    scaled(wanted.backbone.norm_f)
    assert_alike(model, wanted)
    assert mc.explain(model).layers[-1].last == 1
    model.remat = True
    assert model.backbone.inner.remat
    model.backbone = nn.Identity()
    with pytest.raises(TypeError, match="backbone is Identity; expected the one that was built"):
        model.remat = True


def test_what_decoding_keeps_of_a_changed_model_can_be_trained():
    """Not made in inference mode."""
    model, kept = built(), []
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda module, given, out: kept.append(out))
    mc.generate(model, [[1, 2]], max_new_tokens=3)
    assert kept
    assert not any(value.is_inference() for value in kept)


# --- random numbers, values and copies -----------------------------------------------------------


def test_dropout_is_the_same_again_where_a_gradient_recomputes():
    for remat in (False, True):
        model = built()
        layer = model.backbone.layers[0].mixer
        layer.in_proj = nn.Sequential(layer.in_proj, nn.Dropout(0.5))
        model.remat = remat
        torch.manual_seed(5)
        loss = model(IDS).logits.square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        if not remat:
            wanted = loss, gradients
    assert loss == wanted[0]
    for found, expected in zip(gradients, wanted[1], strict=True):
        assert relative_l2(found, expected) < 1e-5


@pytest.mark.parametrize("given", [IDS.numpy(), IDS.tolist(), "text"])
def test_values_that_are_no_tensors_are_refused(given):
    model = built()
    for arguments, named in (((given,), {}), ((IDS,), {"mask": given}), ((IDS,), {"segment_ids": given})):
        with pytest.raises(TypeError, match=r"is (list|str|numpy\.ndarray); expected a torch\.Tensor"):
            model(*arguments, **named)
    with pytest.raises(TypeError, match=r"inputs_embeds is .*; expected a torch\.Tensor"):
        model(inputs_embeds=given)
    state = mc.backend.State(model.init_state(2).layers, IDS.numpy()[:, 0])
    with pytest.raises(TypeError, match=r"segment of the state is numpy\.ndarray"):
        model(IDS, state)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_copies_of_models_and_states(name, tmp_path):
    """Before and after a call; pickled, copied, and saved as a whole."""
    model = built(name)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = routes(model)
    with torch.no_grad():
        out = model(IDS)
    torch.save(model, tmp_path / "model.pt")
    copies += [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    for other in copies:
        assert_alike(other, wanted, 1e-12)
        assert other.is_untouched()
        assert other.backbone.is_untouched()
    again = pickle.loads(pickle.dumps(copy.deepcopy(out)))
    assert torch.equal(model(IDS, again.state).logits, model(IDS, out.state).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_throughout(name):
    model = built(name, n_layer=1, tie_embeddings=False).double()
    assert model.dtype == "float64"
    out = model(IDS)
    assert out.logits.dtype == out.state.layers[0].ssm.dtype == out.state.layers[0].conv.dtype == torch.float64
    reference = mc.spec.reference.ReferenceModel(model.config, dict(registry.get("torch").parameters(model)))
    wanted = reference(IDS.numpy()).logits
    assert relative_l2(out.logits.detach(), wanted) < 1e-12
    found = routes(model)
    assert all(relative_l2(found[route], wanted) < 1e-12 for route in ("whole", "in chunks", "in steps"))
    parameters = {key: value.detach().requires_grad_() for key, value in model.named_parameters()}

    def logits(*values):
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(model, given, (IDS[:1, :3],)).logits[..., :3]

    assert torch.autograd.gradcheck(logits, tuple(parameters.values()), fast_mode=True)


def test_quantize_refuses_what_it_would_lose():
    config = mc.MambaConfig(d_model=256, n_layer=1, vocab_size=20)
    for place, name in (("in_proj", "in_proj of layer 0"), ("out_proj", "out_proj of layer 0"), (None, "the head")):
        model = mc.build(config, backend="torch", device="cpu")
        mixer = model.backbone.layers[0].mixer
        layer = model.backbone.embeddings if place is None else getattr(mixer, place)
        layer.register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match=f"{name} is patched or has hooks"):
            quantize(model)
    model = mc.build(config, backend="torch", device="cpu")
    by_wrapper(model.backbone.layers[0].mixer, "in_proj")
    with pytest.raises(TypeError, match=r"in_proj of layer 0 is \S*Wrapped; expected torch\.nn\.Linear"):
        quantize(model)


def test_explain_says_what_decoding_does(monkeypatch):
    """On a GPU decoding computes a position in the memory of its states; asked here for the call alone."""
    seen = []
    monkeypatch.setattr(cuda_step, "take", lambda blocks, residual, states, call: (seen.append(call.in_place), "no")[1])
    for decodes in (False, True):
        monkeypatch.setattr(cuda_step, "decodes", lambda model, decodes=decodes: decodes)
        for length in (1, 5):
            mc.explain(built(), 20, length)
            assert seen.pop() is (decodes and length == 1)


def test_untouched_models_stay_in_one_graph():
    """And their layers are computed by our operators there, not called."""
    model, graphs = built(), []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    for change in (lambda: None, lambda: by_wrapper(model.backbone.layers[0].mixer, "conv1d")):
        change()
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
        exported = torch.export.export(model, (IDS,)).module()
        torch.testing.assert_close(exported(IDS).logits, model(IDS).logits)
    assert len(graphs) == 2
    calls = [sum("conv1d" in target for target in graph) for graph in graphs]
    assert calls[0] == 0 < calls[1]
