"""FalconMamba on JAX: against the reference, and every fast path against the plain operations."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.architectures.mamba import SelectiveConfig
from mamba_core.backends.native import library
from mamba_core.spec.graph import block_graph
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2, tolerance
from mamba_core.tasks.lm import cross_entropy

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
jnp = jax.numpy

from mamba_core.backends.jax import stack  # noqa: E402 (after the packages that it needs)
from mamba_core.backends.jax.mixers import Options, s6  # noqa: E402
from mamba_core.backends.jax.mixers.falcon_mamba import FalconMambaMixer  # noqa: E402
from mamba_core.backends.jax.mixers.mamba import MambaMixer  # noqa: E402

BACKEND = registry.get("jax")
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
needs_native = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")


def values(config):
    return dict(initial_values(config, 7))


def built(config=CONFIG, **settings):
    return BACKEND.build(config, values(config).items(), device="cpu", **settings)


def reference(config=CONFIG):
    return ReferenceModel(config, values(config))


def ways(model, batch=2, length=1) -> list[tuple[int, int, str]]:
    return [tuple(run[:3]) for run in BACKEND.explain(model, batch, length)]


def assert_same(out, wanted, dtype="float32", kind="value"):
    assert relative_l2(BACKEND.to_numpy(out.logits), wanted.logits) <= tolerance(dtype, kind)
    for layer, other in zip(out.state.layers, wanted.state.layers, strict=True):
        assert relative_l2(BACKEND.to_numpy(layer.conv), other.conv) <= tolerance(dtype, kind)
        assert relative_l2(BACKEND.to_numpy(layer.ssm), other.ssm) <= tolerance(dtype, kind)


def stepped(model, ids, state=None):
    """The output of all positions, one after the other."""
    step, logits = jax.jit(model), []
    state = model.init_state(len(ids)) if state is None else state
    for position in range(ids.shape[1]):
        out = step(ids[:, position : position + 1], state)
        state, logits = out.state, [*logits, out.logits]
    return out._replace(logits=jnp.concatenate(logits, axis=1))


# --- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_node_equals_the_reference(config, kernels):
    model, seen, expected = built(config, kernels=kernels), {}, {}
    out, wanted = model(IDS, observe=seen.__setitem__), reference(config)(IDS, observe=expected.__setitem__)
    assert list(seen) == list(expected)
    here = list(seen)[list(seen).index("layers.1.x_proj") : list(seen).index("layers.1.out_proj") + 1]
    of_mixer = ("x_proj", "dt", "B", "C", "dt_norm", "B_norm", "C_norm", "dt_proj", "scan", "out_proj")
    assert here == [f"layers.1.{name}" for name in of_mixer]
    for name, value in expected.items():
        assert relative_l2(seen[name], value) <= tolerance("float32", "node"), name
    assert_same(out, wanted)
    assert_same(jax.jit(model)(IDS), wanted)


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
    assert_same(jax.jit(built())(IDS, **positions), reference()(IDS, **positions))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    assert_same(jax.jit(built(dtype=dtype))(IDS), reference()(IDS), dtype, "node")


# --- one position --------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", range(1, 9))
def test_the_native_step_equals_the_plain_operations(batch, dtype):
    """Of one position from a random state."""
    model, plain = built(dtype=dtype), built(dtype=dtype, kernels="plain")
    assert ways(model, batch) == [(0, 3, "native_step")]
    assert ways(plain, batch) == [(0, 3, "plain")]
    rng = np.random.default_rng(batch)
    state = jax.tree.map(lambda zero: jnp.asarray(rng.normal(size=zero.shape), zero.dtype), model.init_state(batch))
    ids = rng.integers(0, 29, (batch, 1)).astype(np.int32)
    assert "mamba_mamba_steps_xla" in jax.jit(model).lower(ids, state).as_text()
    wanted = jax.tree.map(BACKEND.to_numpy, plain(ids, state))
    assert_same(jax.jit(model)(ids, state), wanted, dtype, "node")


@needs_native
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_step_by_step_equals_the_whole(config):
    model, wanted = built(config), reference(config)(IDS)
    assert ways(model) == [(0, 3, "native_step")]
    assert_same(stepped(model, IDS), wanted)
    before = jax.jit(model)(IDS[:, :11])
    rest = stepped(model, IDS[:, 11:], before.state)
    assert relative_l2(rest.logits, wanted.logits[:, 11:]) <= tolerance("float32")


def test_bfloat16_step_by_step():
    assert_same(stepped(built(dtype="bfloat16"), IDS), reference()(IDS), "bfloat16", "node")


def test_a_gradient_through_a_step_is_that_of_the_plain_operations():
    config = dataclasses.replace(CONFIG, n_layer=2)
    state = jax.jit(built(config))(IDS[:, :5]).state

    def gradient(model):
        graph, parameters = nnx.split(model)
        loss = jax.jit(lambda parameters: nnx.merge(graph, parameters)(IDS[:, 5:6], state).logits.var())
        return jax.grad(loss)(parameters)

    found, wanted = (jax.tree.leaves(gradient(built(config, kernels=kernels))) for kernels in ("auto", "plain"))
    for one, other in zip(found, wanted, strict=True):
        assert relative_l2(one, other) <= tolerance("float32", "gradient")


def test_where_there_is_no_native_step():
    """For nine rows, for two positions, in float16, and where the policy says so."""
    model = built()
    assert ways(model, 9) == ways(model, 2, 2) == ways(built(dtype="float16")) == [(0, 3, "plain")]
    assert ways(built(kernels={"block_step": "plain"})) == [(0, 3, "plain")]


class Doubled(FalconMambaMixer):
    def __call__(self, hidden, state, call):
        hidden, state = super().__call__(hidden, state, call)
        return 2 * hidden, state


def test_a_subclass_is_called():
    models = built(), built(kernels="plain")
    before = models[1](IDS)
    for model in models:
        model.backbone.layers[1].mixer.__class__ = Doubled
    model, plain = models
    wanted = jax.tree.map(BACKEND.to_numpy, plain(IDS))
    assert relative_l2(wanted.logits, before.logits) > 1e-2
    assert_same(jax.jit(model)(IDS), wanted)
    assert_same(stepped(model, IDS), wanted)
    last = BACKEND.prefill(model, IDS, np.ones(IDS.shape, bool)).logits
    assert relative_l2(last, wanted.logits[:, -1, :29]) <= tolerance("float32")
    if not library.missing():
        assert ways(model) == [(0, 0, "native_step"), (1, 1, "plain"), (2, 3, "native_step")]
    assert BACKEND.explain(model, 2, 1)[-2][3]["native_step"] == "it was not written for Doubled"


# --- beside Mamba-1's mixers ---------------------------------------------------------------------


def mixed(layers, **settings):
    """A model that has Mamba-1's mixers in these layers."""
    model = built(**settings)
    for layer in layers:
        block = model.backbone.layers[layer]
        mixer = MambaMixer(CONFIG, layer, Options(model.dtype, model.policy, nnx.Rngs(0)))
        nnx.update(mixer, nnx.state(block.mixer))
        block.mixer = mixer
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
def test_the_native_step_takes_both_mixers_in_one_run(layers, dtype):
    model, wanted = mixed(layers, dtype=dtype), mixed_reference(layers)(IDS)
    kind = "value" if dtype == "float32" else "node"
    for layer in layers:
        assert relative_l2(wanted.state.layers[layer].ssm, reference()(IDS).state.layers[layer].ssm) > 0.5
    assert_same(jax.jit(model)(IDS), wanted, dtype, kind)
    assert_same(stepped(model, IDS), wanted, dtype, kind)
    if not library.missing():
        assert ways(model) == [(0, 3, "native_step")]


@needs_native
def test_a_subclass_among_both_ends_the_run():
    model, plain = mixed((1,)), mixed((1,), kernels="plain")
    for one in (model, plain):
        one.backbone.layers[2].mixer.__class__ = Doubled
    assert ways(model) == [(0, 1, "native_step"), (2, 2, "plain"), (3, 3, "native_step")]
    assert_same(stepped(model, IDS), jax.tree.map(BACKEND.to_numpy, plain(IDS)))


# --- long sequences, transformations and generation ----------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
def test_pieces_of_a_long_sequence(monkeypatch, remat):
    monkeypatch.setattr(stack, "PIECE_BYTES", 1)
    monkeypatch.setattr(stack, "FEWEST", 10)
    lengths, called = [], s6.project_in

    def watched(mixer, hidden, call):
        lengths.append(hidden.shape[1])
        return called(mixer, hidden, call)

    monkeypatch.setattr(s6, "project_in", watched)
    model = built()
    model.remat = remat
    assert_same(jax.jit(model)(IDS), reference()(IDS))
    assert {10, 4} <= set(lengths)


def test_a_prefill_gates_the_last_position_alone(monkeypatch):
    gated, of_last = [], s6.project_for_last

    def watched(*arguments):
        gated.append(found := of_last(*arguments))
        return found

    monkeypatch.setattr(s6, "project_for_last", watched)
    found = BACKEND.prefill(built(), IDS, np.ones(IDS.shape, bool))
    wanted = reference()(IDS)
    assert_same(found, wanted._replace(logits=wanted.logits[:, -1, :29]))
    assert [gate.shape for _, gate in gated] == [(2, 1, 40)]


def test_nnx_jit():
    model, wanted = built(), reference()(IDS)
    call = nnx.jit(lambda model, ids, state: model(ids, state))
    out = call(model, IDS[:, :20], None)
    assert relative_l2(out.logits, wanted.logits[:, :20]) <= tolerance("float32")
    for position in range(20, 24):
        out = call(model, IDS[:, position : position + 1], out.state)
        assert relative_l2(out.logits[:, 0], wanted.logits[:, position]) <= tolerance("float32")


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


def test_the_norms_use_the_config_s_eps():
    """Not that of the blocks' norms, and not 1e-6."""
    for eps in (1e-6, 0.5):
        config = dataclasses.replace(CONFIG, mixer_rms_eps=eps)
        assert relative_l2(reference(config)(IDS).logits, reference()(IDS).logits) > 1e-3
        assert_same(stepped(built(config), IDS), reference(config)(IDS))
