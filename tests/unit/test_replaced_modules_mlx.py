"""An MLX model whose modules somebody replaced, subclassed or wrapped: each is called, or refused by its name."""

import functools

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_flatten  # noqa: E402 (after the package that it needs)

from mamba_core.backends.mlx import blocks, layers, stack  # noqa: E402

from . import mlx_paths  # noqa: E402

BACKEND = registry.get("mlx")
# Wide enough for groups of quantised weights, and for NumPy's products.
CONFIG = mc.MambaConfig(d_model=64, n_layer=2, vocab_size=64, dt_rank=32, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 64, (2, 40)).astype(np.int32)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """And with short pieces."""
    monkeypatch.setattr(stack, "PIECE_BYTES", 1)
    monkeypatch.setattr(stack, "FEWEST", 16)
    with mx.stream(mx.cpu):
        yield


def built(kind=mc.MambaConfig, tied=True, dtype="float32", **options):
    shared = {name: value for name, value in vars(CONFIG).items() if name in kind.__dataclass_fields__}
    config = kind(**shared | {"tie_embeddings": tied})
    return mc.build(config, backend="mlx", device="cpu", seed=2, dtype=dtype, **options)


class Counted(nn.Module):
    """A wrapper that changes nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.inner(*arguments)

    def as_linear(self, hidden):
        self.calls += 1
        return self.inner.as_linear(hidden)


class Doubled(Counted):
    """Twice the output of the module inside."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def called(model):
    """What a call, a prefill and a step return."""
    with mx.stream(mx.cpu):
        logits, state = model(mx.array(IDS))
        prefilled = BACKEND.prefill(model, IDS, np.ones(IDS.shape, bool))
        step = model(mx.array(IDS[:, :1]), state)
        return [np.array(value) for value in (logits, prefilled.logits, step.logits)]


def places(model):
    """Name -> (owner, attribute) of every module of a model that is called."""
    block = model.backbone.layers[1]
    found = {"embeddings": (model.backbone, "embeddings"), "norm_f": (model.backbone, "norm_f")}
    found |= {"norm": (block, "norm"), "mixer": (block, "mixer")}
    found |= {name: (block.mixer, name) for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    return found | ({"lm_head": (model, "lm_head")} if "lm_head" in model else {})


# --- a wrapper -----------------------------------------------------------------------------------

NAMES = ["embeddings", "norm_f", "norm", "mixer", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_module_is_called_and_changes_nothing(name, kind, dtype):
    model = built(kind, dtype=dtype)
    wanted = called(model)
    owner, attribute = places(model)[name]
    wrapper = Counted(owner[attribute])
    owner[attribute] = wrapper
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) < (1e-5 if dtype == "float32" else 3e-2)
    assert wrapper.calls >= 3
    assert model.dtype == dtype


@pytest.mark.parametrize("name", ["norm_f", "norm", "in_proj", "x_proj", "out_proj", "lm_head"])
@pytest.mark.parametrize("subclass", [False, True])
def test_what_another_module_computes_counts(name, subclass):
    """Twice the output is that of twice the weight."""
    model, scaled = built(tied=False), built(tied=False)
    owner, attribute = places(scaled)[name]
    owner[attribute].weight = 2 * owner[attribute].weight
    owner, attribute = places(model)[name]
    kind = type(owner[attribute])
    if subclass:
        doubled = type("Twice", (kind,), {"__call__": lambda self, x: 2 * kind.__call__(self, x)})
        owner[attribute].__class__ = doubled
    else:
        owner[attribute] = Doubled(owner[attribute])
    for value, other in zip(called(model), called(scaled), strict=True):
        assert relative_l2(value, other) < 1e-5


def test_mlx_s_own_norm_in_the_place_of_ours():
    model = built()
    wanted = on_every_path(model)
    owners = [(block, "norm") for block in model.layers] + [(model.backbone, "norm_f")]
    for owner, name in owners:
        made = nn.RMSNorm(CONFIG.d_model, CONFIG.norm_eps)
        made.weight = owner[name].weight
        owner[name] = made
    for value, other in zip(on_every_path(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5


def test_every_norm_replaced():
    """The compute dtype is then told by other parameters."""
    for kind in (nn.LayerNorm, nn.RMSNorm):
        for dtype in ("float32", "bfloat16"):
            model = built(dtype=dtype)
            for block in model.backbone.layers:
                block.norm = kind(CONFIG.d_model)
            model.backbone.norm_f = kind(CONFIG.d_model)
            assert model.dtype == dtype
            assert model.init_state(1).layers[0].conv.dtype == getattr(mx, dtype)
            assert all(np.isfinite(value.astype(np.float32)).all() for value in called(model))
            model.remat = True
            value = nn.value_and_grad(model, lambda model: model(mx.array(IDS)).logits.square().mean())(model)[0]
            assert np.isfinite(value.item())


# --- quantised -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_quantised(tied):
    model = built(tied=tied)
    wanted = called(model)
    nn.quantize(model, group_size=32, bits=8)
    assert isinstance(model.backbone.layers[0].mixer.in_proj, nn.QuantizedLinear)
    assert model.dtype == "float32"
    for value, other in zip(called(model), wanted, strict=True):
        assert 0 < relative_l2(value, other) < 0.1


# --- the step's projection, whose bias the scan adds -----------------------------------------------


@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig])
@pytest.mark.parametrize("another", [nn.Linear, type("Another", (layers.StepProjection,), {})])
def test_another_class_of_linear_layer_in_the_place_of_dt_proj_computes_the_same(another, kind):
    model = built(kind)
    wanted = called(model)
    for block in model.backbone.layers:
        linear = another(32, len(block.mixer.A_log))
        linear.weight, linear.bias = block.mixer.dt_proj.weight, block.mixer.dt_proj.bias
        block.mixer.dt_proj = linear
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5


def double(*layers):
    """Twice what the layers give: their weights and biases doubled."""
    for layer in layers:
        layer.weight = 2 * layer.weight
        if "bias" in layer:
            layer.bias = 2 * layer.bias


@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig, mc.FalconMambaConfig])
@pytest.mark.parametrize("name", ["dt_proj", "conv1d"])
def test_twice_the_output_of_a_layer_is_that_of_twice_its_weight_and_bias(name, kind):
    model, scaled = built(kind), built(kind)
    double(scaled.layers[1].mixer[name])
    model.layers[1].mixer[name] = Doubled(model.layers[1].mixer[name])
    for value, other in zip(called(model), called(scaled), strict=True):
        assert relative_l2(value, other) < 1e-5


# --- the convolution -------------------------------------------------------------------------------


class Called:
    """What calls a convolution, and is no module: it has no attribute that anybody could ask for."""

    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def dense(conv):
    """The same function, with a weight for every pair of channels."""
    channels, taps, _ = conv.weight.shape
    made = nn.Conv1d(channels, channels, taps, padding=taps - 1)
    made.weight, made.bias = mx.eye(channels)[:, None] * conv.weight, conv.bias
    return made


def unpadded(conv):
    conv.padding = 0
    return conv


def at_the_front(conv):
    taps, inner = conv.padding, unpadded(conv)
    return Called(lambda x: inner(mx.pad(x, ((0, 0), (taps, 0), (0, 0)))))


CONVOLUTIONS = {
    "on both sides": lambda conv: Called(conv),
    "in front": at_the_front,
    "not at all": lambda conv: Called(unpadded(conv)),
    "another padding": unpadded,
    "dense": dense,
    "a subclass": lambda conv: as_subclass(conv),
}


def as_subclass(module):
    module.__class__ = type("Another", (type(module),), {})
    return module


def on_every_path(model):
    return mlx_paths.on_every_path(model, IDS[:, :21])


@pytest.mark.parametrize("another", CONVOLUTIONS)
def test_another_convolution_is_called_on_every_path(another):
    model = built()
    wanted = on_every_path(model)
    mixer = model.layers[1].mixer
    calls, call = [], CONVOLUTIONS[another](mixer.conv1d)
    mixer.conv1d = Called(lambda x: calls.append(x.shape[1]) or call(x))
    for value, other in zip(on_every_path(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5
    assert calls
    mixer.conv1d = call
    for value, other in zip(on_every_path(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5


def with_settings(**settings):
    def made(conv):
        for name, value in settings.items():
            setattr(conv, name, value)
        return conv

    return made


REFUSED = {
    "dilation": (with_settings(dilation=2), TypeError, "stride 1 and dilation 2"),
    "stride": (with_settings(stride=2), TypeError, "stride 2 and dilation 1"),
    "taps": (lambda conv: nn.Conv1d(128, 128, 5, groups=128, padding=4), TypeError, "5 taps; expected 4 at most"),
    "padding": (lambda conv: nn.Conv1d(128, 128, 3, groups=128, padding=1), TypeError, "padding 1; expected 0 or 2"),
    "positions": (lambda conv: Called(lambda x: x[:, :2]), ValueError, "gives 2 positions for"),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_convolution_that_reaches_further_than_the_state_is_refused_by_name(name, inside):
    make, error, reason = REFUSED[name]
    model = built()
    mixer = model.layers[1].mixer
    mixer.conv1d = Counted(make(mixer.conv1d)) if inside else make(mixer.conv1d)
    for length in (1, 40):
        with pytest.raises(error, match=rf"backbone\.layers\.1\.mixer\.conv1d .*{reason}"):
            model(mx.array(IDS[:, :length]))


# --- the embedding, which may be the head -----------------------------------------------------------


class Shown(nn.Module):
    """An embedding without as_linear."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, ids):
        return 2 * self.inner(ids)


class Twice(nn.Embedding):
    """as_linear stays that of its base, which does not know of the factor."""

    def __call__(self, ids):
        return 2 * super().__call__(ids)


def twice(embedding):
    embedding.__class__ = Twice
    return embedding


@pytest.mark.parametrize("another", [Shown, twice])
def test_an_embedding_that_is_the_head_too_is_the_head_with_what_it_gives_for_every_id(another):
    model, scaled = built(), built()
    double(scaled.backbone.embeddings)
    model.backbone.embeddings = another(model.backbone.embeddings)
    for value, other in zip(called(model), called(scaled), strict=True):
        assert relative_l2(value, other) < 1e-5


def test_an_embedding_with_its_own_as_linear_is_asked_for_that():
    class Own(Shown):
        def as_linear(self, hidden):
            return 6 * self.inner.as_linear(hidden)

    model, rows = built(), built()
    model.backbone.embeddings = Own(model.backbone.embeddings)
    rows.backbone.embeddings = Shown(rows.backbone.embeddings)
    for value, other in zip(called(model), called(rows), strict=True):
        assert relative_l2(value, 3 * other) < 1e-5


def test_another_head_is_always_shown_three_axes():
    model = built(tied=False)
    wanted, inner, axes = called(model), model.lm_head, []
    model.lm_head = Called(lambda x: axes.append(x.ndim) or inner(x))
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5
    assert axes == [3, 3, 3]


def test_a_missing_head_is_not_replaced_by_the_embedding():
    model = built(tied=False)
    del model.lm_head
    with pytest.raises(TypeError, match="lm_head is missing"):
        model(mx.array(IDS))


def test_a_head_given_to_a_tied_model_is_called():
    model = built()
    model.lm_head = nn.Linear(CONFIG.d_model, 64, bias=False)
    model.lm_head.weight = mx.zeros((64, CONFIG.d_model))
    assert not any(value.any() for value in called(model))


# --- the backbone and the model's own call -----------------------------------------------------------


class Other(nn.Module):
    """A backbone of somebody else."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, CONFIG.d_model)

    def __call__(self, inputs, state, call):
        return self.table(inputs), state


def test_a_wrapped_backbone_is_called():
    model = built()
    wanted = called(model)
    model.backbone = Counted(model.backbone)
    model.remat = True
    assert model.backbone.inner.remat
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5
    assert model.backbone.calls == 3
    assert model.dtype == "float32"


def test_another_backbone_is_called_and_says_what_it_cannot_do():
    model = built(tied=False)
    model.backbone = Other()
    logits, prefilled, _ = called(model)
    assert relative_l2(logits, np.array(model.lm_head(model.backbone.table(mx.array(IDS))))) < 1e-6
    assert relative_l2(prefilled, logits[:, -1]) < 1e-6
    with pytest.raises(TypeError, match=r"backbone is .*Other.*remat needs one"):
        model.remat = True
    tied = built()
    tied.backbone = Other()
    with pytest.raises(TypeError, match=r"backbone is .*Other.*the head"):
        tied(mx.array(IDS))


def test_a_subclass_of_the_backbone_is_not_asked_for_the_last_position_alone():
    model = built(kernels={"selective_scan": "chunked"})
    kind, lengths = type(model.backbone), []

    def call(self, inputs, state, call):
        hidden, state = kind.__call__(self, inputs, state, call)
        lengths.append(hidden.shape[1])
        return hidden, state

    model.backbone.__class__ = type("Another", (kind,), {"__call__": call})
    called(model)
    assert lengths == [40, 40, 1]


def changed_model(model, monkeypatch, how):
    """The model with a bias on its logits, by another call of its own: the token 7 is always the likeliest."""
    kind = type(model)
    original = kind.__call__

    def call(self, *arguments, **named):
        output = original(self, *arguments, **named)
        return output._replace(logits=output.logits + 100 * (mx.arange(64) == 7))

    if how == "a subclass":
        model.__class__ = type("Another", (kind,), {"__call__": call})
    else:
        # With the names of the original, as most decorators have them.
        monkeypatch.setattr(kind, "__call__", functools.wraps(original)(call))
    return model


@pytest.mark.parametrize("how", ["a subclass", "a patched class"])
def test_the_model_s_own_call_acts_on_every_path(how, monkeypatch):
    model = changed_model(built(), monkeypatch, how)
    assert mc.generate(model, [[1, 2], [3]], max_new_tokens=3).tokens == [[7, 7, 7], [7, 7, 7]]
    logits, prefilled, step = called(model)
    assert (logits[0, -1].argmax(), prefilled[0].argmax(), step[0, -1].argmax()) == (7, 7, 7)
    with mx.stream(mx.cpu):
        embeds = np.array(model.backbone.embeddings(mx.array(IDS)))
    found = BACKEND.prefill(model, embeds, np.ones(IDS.shape, bool))
    assert relative_l2(np.array(found.logits), prefilled) < 1e-6
    loss, gradients = BACKEND.loss_and_gradients(model, np.full((1, 5), 7))
    assert loss < 1e-3
    assert set(gradients) == set(BACKEND.parameters(model))


def test_a_call_that_knows_no_mask_is_given_none_where_all_positions_count(monkeypatch):
    model = built()
    kind = type(model)
    model.__class__ = type("Few", (kind,), {"__call__": lambda self, ids, state: kind.__call__(self, ids, state)})
    wanted = mc.generate(built(), [[1, 2, 3]], max_new_tokens=4).tokens
    assert mc.generate(model, [[1, 2, 3]], max_new_tokens=4).tokens == wanted


# --- a class that somebody patched -----------------------------------------------------------------

PATCHED = {
    "in_proj": nn.Linear,
    "x_proj": nn.Linear,
    "out_proj": nn.Linear,
    "conv1d": nn.Conv1d,
    "norm": blocks.RMSNorm,
    "embeddings": nn.Embedding,
}


@pytest.mark.parametrize("name", PATCHED)
def test_a_patched_class_acts_on_every_path(name, monkeypatch):
    model, scaled = built(), built()
    wanted = on_every_path(built())
    owner, attribute = places(model)[name]
    patched = owner[attribute]
    other, attribute = places(scaled)[name]
    double(other[attribute])
    original = PATCHED[name].__call__
    expected = on_every_path(scaled)

    def call(self, x):
        return original(self, x) * (2 if self is patched else 1)

    monkeypatch.setattr(PATCHED[name], "__call__", call)
    for value, other in zip(on_every_path(model), expected, strict=True):
        assert relative_l2(value, other) < 1e-5
    assert relative_l2(expected[0], wanted[0]) > 1e-3
    with mx.stream(mx.cpu):
        prefilled = BACKEND.prefill(model, IDS, np.ones(IDS.shape, bool)).logits
        last = model(mx.array(IDS)).logits[:, -1]
    assert relative_l2(np.array(prefilled), np.array(last)) < 1e-5


def test_a_patched_as_linear_acts(monkeypatch):
    model, original = built(), nn.Embedding.as_linear
    wanted = called(model)
    monkeypatch.setattr(nn.Embedding, "as_linear", lambda self, x: 2 * original(self, x))
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, 2 * other) < 1e-6


def test_a_patched_mixer_is_neither_cut_nor_asked_for_the_last_position(monkeypatch):
    """It adds what it sees of the whole sequence."""
    model = built()
    kind = type(model.layers[0].mixer)
    original, lengths = kind.__call__, []

    def call(self, hidden, state, call):
        lengths.append(hidden.shape[1])
        output, state = original(self, hidden, state, call)
        return output + hidden.mean(axis=1, keepdims=True), state

    monkeypatch.setattr(kind, "__call__", call)
    logits, prefilled, _ = called(model)
    assert lengths == [40, 40, 40, 40, 1, 1]
    assert relative_l2(prefilled, logits[:, -1]) < 1e-5


# --- the last position only ----------------------------------------------------------------------


def test_a_subclass_of_the_mixer_is_never_asked_for_the_last_position_only():
    """It adds its input to the mixer's output, and would add all positions to one."""
    model = built()
    wanted = called(model)[1]
    mixer = model.backbone.layers[1].mixer
    kind, lengths = type(mixer), []

    def call(self, hidden, state, call):
        output, state = kind.__call__(self, hidden, state, call)
        lengths.append((hidden.shape[1], output.shape[1], call.last))
        return output + 0 * hidden, state

    mixer.__class__ = type("Adding", (kind,), {"__call__": call})
    found = called(model)[1]
    assert relative_l2(found, wanted) < 1e-6
    assert all(one == other and not last for one, other, last in lengths)


# --- what a stack says of itself ------------------------------------------------------------------


def test_explain_names_the_way_of_every_layer():
    assert BACKEND.explain(built(), 2, 40) == [(0, 1, "plain", {})]
    assert BACKEND.explain(built(), 1, 1) == [(0, 1, "plain", {})]


@pytest.mark.parametrize("kernels", ["auto", "chunked"])
def test_positions_are_computed_once_a_call(kernels, monkeypatch):
    from mamba_core.backends.mlx import positions

    if kernels == "auto" and library.missing():
        pytest.skip("native library")
    counts = {"_restarts": 0, "compaction": 0}
    for name in counts:
        function = getattr(positions, name)

        def counted(*arguments, function=function, name=name):
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(positions, name, counted)
    model = built(kernels=kernels)
    model(mx.array(IDS), mask=mx.array(IDS > 3), segment_ids=mx.array(IDS // 32))
    assert counts == {"_restarts": 1, "compaction": 1}


# --- a wrapped block ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_wrapped_block_is_called_and_its_gradient_is_the_block_s(remat, kernels):
    model = built(kernels={"selective_scan": "sequential"} if kernels == "plain" else kernels)

    def loss(model):
        return model(mx.array(IDS)).logits.square().mean()

    value, gradients = nn.value_and_grad(model, loss)(model)
    wanted = dict(tree_flatten(gradients))
    wrapper = Counted(model.backbone.layers[1])
    model.backbone.layers[1], model.remat = wrapper, remat
    found, gradients = nn.value_and_grad(model, loss)(model)
    assert wrapper.calls >= 1
    assert relative_l2(np.array(found), np.array(value)) < 1e-6
    for name, gradient in tree_flatten(gradients):
        assert relative_l2(np.array(gradient), np.array(wanted[name.replace("inner.", "")])) < 1e-5, name
