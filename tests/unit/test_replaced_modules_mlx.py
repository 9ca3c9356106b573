"""An MLX model whose modules somebody replaced, subclassed or wrapped: each is called, or refused by its name."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_flatten  # noqa: E402 (after the package that it needs)

from mamba_core.backends.mlx import stack  # noqa: E402
from mamba_core.backends.mlx.mixers import s6  # noqa: E402

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
    config = kind(**vars(CONFIG) | {"tie_embeddings": tied})
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
    found |= {name: (block.mixer, name) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    return found | ({"lm_head": (model, "lm_head")} if "lm_head" in model else {})


# --- a wrapper -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [mc.MambaConfig, mc.MiniMambaConfig])
@pytest.mark.parametrize("name", ["embeddings", "norm_f", "norm", "mixer", "in_proj", "x_proj", "dt_proj", "out_proj"])
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


# --- others' modules -----------------------------------------------------------------------------


def test_lora_of_mlx_lm():
    lora = pytest.importorskip("mlx_lm.tuner.lora")
    model = built()
    wanted = called(model)
    for block in model.backbone.layers:
        for name in ("in_proj", "x_proj", "out_proj"):
            block.mixer[name] = lora.LoRALinear.from_base(block.mixer[name], r=4)
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5
    for block in model.backbone.layers:
        block.mixer.in_proj.lora_b = mx.ones(block.mixer.in_proj.lora_b.shape)
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) > 1e-3
    # Only what the adapter adds is trained, also where blocks are computed again.
    model.freeze()
    model.apply_to_modules(lambda _, m: m.unfreeze(keys=["lora_a", "lora_b"], recurse=False, strict=False))
    found = []
    for remat in (False, True):
        model.remat = remat
        gradient = nn.value_and_grad(model, lambda model: model(mx.array(IDS)).logits.square().mean())(model)[1]
        found.append(dict(tree_flatten(gradient)))
    assert {name.rpartition(".")[2] for name in found[0]} == {"lora_a", "lora_b"}
    for name, value in found[0].items():
        assert relative_l2(np.array(found[1][name]), np.array(value)) < 1e-5, name


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


def test_a_linear_in_the_place_of_dt_proj_adds_its_bias_itself():
    model = built()
    wanted = called(model)
    for block in model.backbone.layers:
        linear = nn.Linear(32, len(block.mixer.A_log))
        linear.weight, linear.bias = block.mixer.dt_proj.weight, block.mixer.dt_proj.bias
        block.mixer.dt_proj = linear
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-5


def test_a_linear_in_the_place_of_minimamba_s_dt_proj_is_refused():
    model = built(mc.MiniMambaConfig)
    model.backbone.layers[1].mixer.dt_proj = nn.Linear(32, 128)
    with pytest.raises(TypeError, match=r"backbone\.layers\.1\.mixer\.dt_proj"):
        model(mx.array(IDS))


def test_a_subclass_of_the_step_projection_leaves_its_bias_to_the_scan():
    model = built()
    wanted = called(model)
    for block in model.backbone.layers:
        block.mixer.dt_proj.__class__ = type("Another", (s6.StepProjection,), {})
    for value, other in zip(called(model), wanted, strict=True):
        assert relative_l2(value, other) < 1e-6


# --- what is read and not called ------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Counted, lambda conv: type("Another", (nn.Conv1d,), {})(128, 128, 4, groups=128)])
def test_another_convolution_is_refused_by_name(wrap):
    model = built()
    mixer = model.backbone.layers[1].mixer
    mixer.conv1d = wrap(mixer.conv1d)
    for length in (1, 40):
        with pytest.raises(TypeError, match=r"backbone\.layers\.1\.mixer\.conv1d is .*expected mlx\.nn\.Conv1d"):
            model(mx.array(IDS[:, :length]))


def test_an_embedding_that_cannot_be_a_head_is_refused_by_name():
    class Shifted(nn.Module):
        def __call__(self, ids):
            return mx.zeros((*ids.shape, CONFIG.d_model))

    model = built()
    model.backbone.embeddings = Shifted()
    with pytest.raises(TypeError, match=r"backbone\.embeddings is .*Shifted.*as_linear"):
        model(mx.array(IDS))


def test_a_head_given_to_a_tied_model_is_called():
    model = built()
    model.lm_head = nn.Linear(CONFIG.d_model, 64, bias=False)
    model.lm_head.weight = mx.zeros((64, CONFIG.d_model))
    assert not any(value.any() for value in called(model))


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
