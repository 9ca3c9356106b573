"""FalconMamba on MLX: against the reference, and every fast path against the plain operations."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.architectures.mamba import SelectiveConfig
from mamba_core.spec.graph import block_graph
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.tasks.lm import cross_entropy

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mamba_core.backends.mlx import stack  # noqa: E402 (after the package that it needs)
from mamba_core.backends.mlx.mixers import Options, s6  # noqa: E402
from mamba_core.backends.mlx.mixers.falcon_mamba import FalconMambaMixer  # noqa: E402
from mamba_core.backends.mlx.mixers.mamba import MambaMixer  # noqa: E402

BACKEND = registry.get("mlx")
CONFIG = mc.FalconMambaConfig(
    d_model=20, n_layer=4, vocab_size=29, d_state=5, dt_rank=3, initializer_range=0.3, mixer_rms_eps=0.01
)
CONFIGS = {
    "usual": CONFIG,
    "a small eps": dataclasses.replace(CONFIG, mixer_rms_eps=1e-6, norm_eps=0.1),
    "biases": dataclasses.replace(CONFIG, bias=True, conv_bias=False, residual_in_fp32=False, tie_embeddings=False),
    "one state": dataclasses.replace(CONFIG, d_state=1, dt_rank=1, expand=1),
}
IDS = np.random.default_rng(0).integers(0, 29, (2, 24)).astype(np.int32)
NATIVE = not BACKEND.available_kernels("cpu")["selective_scan"]["native"]


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with mx.stream(mx.cpu):
        yield


def values(config):
    return dict(initial_values(config, 7))


def built(config=CONFIG, **settings):
    return BACKEND.build(config, values(config).items(), device="cpu", **settings)


def reference(config=CONFIG):
    return ReferenceModel(config, values(config))


def assert_same(out, wanted, dtype="float32", kind="value"):
    assert relative_l2(BACKEND.to_numpy(out.logits), wanted.logits) <= tolerance(dtype, kind)
    for layer, other in zip(out.state.layers, wanted.state.layers, strict=True):
        assert relative_l2(BACKEND.to_numpy(layer.conv), other.conv) <= tolerance(dtype, kind)
        assert relative_l2(BACKEND.to_numpy(layer.ssm), other.ssm) <= tolerance(dtype, kind)


def as_numpy(out):
    layers = tuple(type(layer)(*map(BACKEND.to_numpy, layer)) for layer in out.state.layers)
    return out._replace(logits=BACKEND.to_numpy(out.logits), state=out.state._replace(layers=layers))


def stepped(call, ids, state=None):
    """The output of all positions, one after the other."""
    logits = []
    for position in range(ids.shape[1]):
        out = call(mx.array(ids[:, position : position + 1]), state)
        state, logits = out.state, [*logits, out.logits]
    return out._replace(logits=mx.concatenate(logits, axis=1))


# --- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_node_equals_the_reference(config, kernels):
    model, seen, expected = built(config, kernels=kernels), {}, {}
    out = model(mx.array(IDS), observe=seen.__setitem__)
    wanted = reference(config)(IDS, observe=expected.__setitem__)
    assert list(seen) == list(expected)
    here = list(seen)[list(seen).index("layers.1.x_proj") : list(seen).index("layers.1.out_proj") + 1]
    of_mixer = ("x_proj", "dt", "B", "C", "dt_norm", "B_norm", "C_norm", "dt_proj", "scan", "out_proj")
    assert here == [f"layers.1.{name}" for name in of_mixer]
    for name, value in expected.items():
        assert relative_l2(BACKEND.to_numpy(seen[name]), value) <= tolerance("float32", "node"), name
    assert_same(out, wanted)
    assert_same(model(mx.array(IDS)), wanted)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_gradients_equal_the_reference(kernels, remat):
    model = built(kernels=kernels)
    model.remat = remat
    loss, gradients = BACKEND.loss_and_gradients(model, IDS)
    logits = reference()(IDS[:, :-1]).logits
    expected_loss, dlogits = cross_entropy(logits, IDS[:, 1:], None)
    expected, _ = reference().vjp(dlogits, IDS[:, :-1])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert relative_l2(gradient, expected[name]) <= tolerance("float32", "gradient"), name


def test_padded_and_packed_rows_equal_the_reference():
    positions = {"mask": IDS != 3, "segment_ids": (np.arange(24)[None] // np.array([[5], [9]])).astype(np.int32)}
    given = {name: mx.array(value) for name, value in positions.items()}
    assert_same(built()(mx.array(IDS), **given), reference()(IDS, **positions))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    model, seen = built(dtype=dtype), {}
    assert_same(model(mx.array(IDS)), reference()(IDS), dtype, "node")
    assert_same(stepped(model, IDS), reference()(IDS), dtype, "node")
    model(mx.array(IDS), observe=seen.__setitem__)
    for name in ("dt", "B", "C"):
        before, after = (np.float64(BACKEND.to_numpy(seen[f"layers.0.{name}{end}"])) for end in ("", "_norm"))
        wanted = before / np.sqrt(np.mean(before**2, -1, keepdims=True) + CONFIG.mixer_rms_eps)
        assert seen[f"layers.0.{name}_norm"].dtype == getattr(mx, dtype)
        # Computed in float32, and rounded once.
        np.testing.assert_allclose(after, wanted, rtol=2**-8 if dtype == "bfloat16" else 2**-11, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_step_by_step_equals_the_whole(config):
    model, wanted = built(config), reference(config)(IDS)
    assert_same(stepped(model, IDS), wanted)
    rest = stepped(model, IDS[:, 11:], model(mx.array(IDS[:, :11])).state)
    assert relative_l2(BACKEND.to_numpy(rest.logits), wanted.logits[:, 11:]) <= tolerance("float32")


def test_the_norms_use_the_config_s_eps():
    """Not that of the blocks' norms, and not 1e-6."""
    for eps in (1e-6, 0.5):
        config = dataclasses.replace(CONFIG, mixer_rms_eps=eps)
        assert relative_l2(reference(config)(IDS).logits, reference()(IDS).logits) > 1e-3
        assert_same(built(config)(mx.array(IDS)), reference(config)(IDS))


# --- other modules beside it and in it -----------------------------------------------------------


def mixed(layers, **settings):
    """A model that has Mamba-1's mixers in these layers."""
    model = built(**settings)
    for layer in layers:
        mixer = MambaMixer(CONFIG, layer, Options(model.policy))
        mixer.update(model.backbone.layers[layer].mixer.parameters())
        model.backbone.layers[layer].mixer = mixer
    return model


def mixed_reference(layers):
    """Its reference, with the nodes of Mamba-1's graph in these layers."""

    def place(node):
        kind, *rest = node.name.split(".")
        return int(rest[0]) if kind == "layers" else -1 if kind == "embedding" else CONFIG.n_layer

    model, fields = reference(), {item.name: getattr(CONFIG, item.name) for item in dataclasses.fields(SelectiveConfig)}
    others = [node for node in block_graph(mc.MambaConfig(**fields)) if place(node) in layers]
    model.graph = sorted([*(node for node in model.graph if place(node) not in layers), *others], key=place)
    return model


@pytest.mark.parametrize("layers", [(1,), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_mamba_1_s_mixers(layers, dtype):
    model, wanted = mixed(layers, dtype=dtype), mixed_reference(layers)(IDS)
    kind = "value" if dtype == "float32" else "node"
    for layer in layers:
        assert relative_l2(wanted.state.layers[layer].ssm, reference()(IDS).state.layers[layer].ssm) > 0.5
    assert_same(model(mx.array(IDS)), wanted, dtype, kind)
    assert_same(stepped(model, IDS), wanted, dtype, kind)


class Doubled(FalconMambaMixer):
    def __call__(self, hidden, state, call):
        Doubled.lengths.append(hidden.shape[1])
        hidden, state = super().__call__(hidden, state, call)
        assert hidden.shape[1] == Doubled.lengths[-1]
        return 2 * hidden, state


def cut(monkeypatch):
    monkeypatch.setattr(stack, "PIECE_BYTES", 1)
    monkeypatch.setattr(stack, "FEWEST", 10)


def test_a_subclass_is_called_on_all_positions_at_once(monkeypatch):
    """It has neither pieces nor the last position alone."""
    model, plain = built(), built(kernels="plain")
    before = as_numpy(plain(mx.array(IDS)))
    Doubled.lengths = []
    for one in (model, plain):
        one.backbone.layers[3].mixer.__class__ = Doubled
    wanted = as_numpy(plain(mx.array(IDS)))
    assert relative_l2(wanted.logits, before.logits) > 1e-2
    cut(monkeypatch)
    assert_same(model(mx.array(IDS)), wanted)
    last = BACKEND.prefill(model, IDS[:, :9], np.ones((2, 9), bool)).logits
    assert relative_l2(BACKEND.to_numpy(last), wanted.logits[:, 8, :29]) <= tolerance("float32")
    assert Doubled.lengths == [24, 24, 9]
    assert_same(stepped(model, IDS), wanted)


# --- long sequences, compilation and generation --------------------------------------------------


@pytest.fixture
def scanned(monkeypatch):
    """(length, whether without a gate) of each scan."""
    found, scan = [], s6.selective_scan.scan

    def watched(call, x, *arguments, **options):
        found.append((x.shape[1], options["z"] is None))
        return scan(call, x, *arguments, **options)

    monkeypatch.setattr(s6.selective_scan, "scan", watched)
    return found


@pytest.mark.parametrize("remat", [False, True])
def test_pieces_of_a_long_sequence(monkeypatch, scanned, remat):
    cut(monkeypatch)
    model = built()
    model.remat = remat
    assert_same(model(mx.array(IDS)), reference()(IDS))
    assert {length for length, _ in scanned} == ({10, 4} if NATIVE else {24})


def test_a_prefill_gates_the_last_position_alone(scanned):
    found = BACKEND.prefill(built(), IDS, np.ones(IDS.shape, bool))
    wanted = reference()(IDS)
    assert_same(found, wanted._replace(logits=wanted.logits[:, -1, :29]))
    assert scanned == [(24, False)] * 3 + [(24, True)]


def test_compiled():
    model, wanted = built(), reference()(IDS)

    @mx.compile
    def call(ids, layers):
        out = model(ids, model.init_state(2)._replace(layers=layers))
        return out.logits, out.state.layers

    logits, layers = call(mx.array(IDS[:, :20]), model.init_state(2).layers)
    assert relative_l2(BACKEND.to_numpy(logits), wanted.logits[:, :20]) <= tolerance("float32")
    for position in range(20, 24):
        logits, layers = call(mx.array(IDS[:, position : position + 1]), layers)
        assert relative_l2(BACKEND.to_numpy(logits[:, 0]), wanted.logits[:, position]) <= tolerance("float32")


def test_generation():
    """Of a model whose mixers decide the tokens: its embedding is small and not the head."""
    config, prompts = dataclasses.replace(CONFIG, tie_embeddings=False, initializer_range=0.01), [[1, 2, 3, 4, 5], [8]]
    model, plain = built(config), built(config, kernels="plain")
    whole = mc.generate(model, prompts, max_new_tokens=12)
    assert whole.tokens == mc.generate(plain, prompts, max_new_tokens=12).tokens
    assert whole.tokens == mc.generate(model, prompts, max_new_tokens=12, prefill_chunk=3).tokens
    for ids, tokens in zip(prompts, whole.tokens, strict=True):
        logits = reference(config)(np.array([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1, :29]
        assert tokens == logits.argmax(-1).tolist()


def test_quantised_layers_are_called():
    """`nn.quantize` leaves dt_proj alone, and the norms come between two layers that it may replace."""
    model = built(dataclasses.replace(CONFIG, d_model=64))
    before = model(mx.array(IDS)).logits
    nn.quantize(model, 32, 8, class_predicate=lambda _, layer: type(layer) is nn.Linear)
    assert type(model.backbone.layers[0].mixer.x_proj) is nn.QuantizedLinear
    error = relative_l2(BACKEND.to_numpy(model(mx.array(IDS)).logits), BACKEND.to_numpy(before))
    assert 1e-5 < error < 5e-2
