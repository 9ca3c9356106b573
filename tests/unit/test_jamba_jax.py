"""Jamba under JAX's transformations: routers through recomputation, room in compiled calls, and blocks of queries."""

import dataclasses

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.ops import attention as spec
from mamba_core.spec.ops.attention import Rotary
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.cases.jamba import CONFIGS
from tests.conformance.strategies import tokens

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
jnp = jax.numpy
CONFIG = dataclasses.replace(CONFIGS["base"], n_layer=2, num_experts=4, num_experts_per_tok=2, vocab_size=19)


@pytest.fixture(scope="module")
def model():
    return mc.build(CONFIG, backend="jax")


def ids(batch, length):
    return jnp.asarray(tokens(CONFIG, batch, length))


def test_routers_are_heard_through_recomputation(model):
    """The same logits and gradients, and nothing of a trace is left behind."""
    from mamba_core.backends.jax.positions import call_of

    given, graph = ids(2, 9), nnx.split(model)[0]

    def run(parameters, remat):
        own, routers = nnx.merge(graph, parameters), []
        own.remat = remat
        call = call_of(None, None, length=9, fresh=True)._replace(routers=routers)
        hidden, _ = own.backbone_of(given, own.init_state(2, 9), call)
        logits = jnp.stack(routers)
        return (jax.nn.softmax(logits) ** 2).sum() + (hidden**2).mean(), logits

    parameters = nnx.split(model)[1]
    run = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1)
    (plain, again) = (run(parameters, remat) for remat in (False, True))
    assert plain[0][1].shape == (1, 2, 9, 4)
    for value, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        assert relative_l2(value, wanted) < 1e-5
    router = dict(nnx.to_flat_state(plain[1]))["backbone", "layers", 1, "feed_forward", "router", "kernel"]
    assert np.abs(router[...]).max() > 0


def test_a_compiled_call_without_room_gives_no_number_and_is_known(model):
    state = model.init_state(1, 16)
    step = jax.jit(lambda ids, state: model(ids, state))
    for length in (15, 1, 1):
        out = step(ids(1, length), state)
        state = out.state
        assert np.isnan(out.logits[:, -1]).all() == (state.layers[1].filled[0] > 16)
    with pytest.raises(ValueError, match="the state has lost 1 positions"):
        model(ids(1, 1), state)


def test_decoding_grows_for_what_is_asked(model):
    """At once, so that one program is compiled; the tokens are those of a call for each."""
    from mamba_core.backends.jax import decoding

    prompt = tokens(CONFIG, 1, 13)[0].tolist()
    before = decoding._advance._cache_size()
    found = mc.generate(model, [prompt], max_new_tokens=12).tokens[0]
    assert decoding._advance._cache_size() == before + 1
    row = list(prompt)
    forward = jax.jit(lambda ids, mask: model(ids, mask=mask).logits)
    for token in found:
        padded = jnp.asarray([row + [0] * (25 - len(row))])
        logits = forward(padded, jnp.arange(25)[None] < len(row))
        assert int(logits[0, len(row) - 1, : CONFIG.vocab_size].argmax()) == token
        row.append(token)


@pytest.mark.parametrize("fresh", [True, False])
def test_blocks_of_queries_are_the_whole(monkeypatch, fresh):
    """Values and gradients; what would be too many scores is computed in four stretches, of blocks."""
    from mamba_core.backends.jax.ops import attention

    monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    monkeypatch.setattr(attention, "FEWEST", 3)
    rng, length = np.random.default_rng(0), 23
    q, k, v = (rng.normal(size=(2, length, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.repeat([[0, 1], [3, 4]], [9, 14], axis=1).astype(np.int32)
    cache = None
    if not fresh:
        keys = np.zeros((2, 40, 2, 4), np.float32)
        keys[:, :5] = rng.normal(size=(2, 5, 2, 4))
        cache = spec.KeyValueCache(keys, keys, np.full(2, 5, np.int32))
    how = {"rotary": Rotary(4), "cache": cache, "segment_ids": segments}
    native = jax.tree.map(jnp.asarray, how | {"rotary": None}) | {"rotary": Rotary(4)}
    lowered = jax.jit(lambda *given: mc.attention(*given, **native)).lower(q, k, v).as_text()
    assert "while" in lowered
    y, pullback = jax.vjp(lambda *given: mc.attention(*given, **native), *map(jnp.asarray, (q, k, v)))
    assert relative_l2(y, spec.attention(q, k, v, **how)) < 1e-6
    wanted = spec.attention_vjp(np.ones(y.shape), None, q, k, v, **how)
    for name, gradient in zip("qkv", pullback(jnp.ones_like(y)), strict=True):
        assert relative_l2(gradient, wanted[name]) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_computes_causal_attention(dtype):
    """Chosen by "auto" for whole rows, under jit; against float64, values and gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 70, heads, 16)), dtype) for heads in (4, 2, 2))
    exact = [np.asarray(value, np.float64) for value in (q, k, v)]
    y, pullback = jax.vjp(jax.jit(mc.attention), q, k, v)
    assert "cudnn" in jax.jit(mc.attention).lower(q, k, v).compile().as_text()
    assert relative_l2(np.asarray(y, np.float64), spec.attention(*exact)) < 8e-3
    wanted = spec.attention_vjp(np.ones(y.shape), None, *exact)
    for name, gradient in zip("qkv", pullback(jnp.ones_like(y)), strict=True):
        assert relative_l2(np.asarray(gradient, np.float64), wanted[name]) < 2e-2, name


def test_a_replaced_expert_layer_is_called(model):
    """On every path: a call, and the prefill and steps of decoding."""

    class Halved(type(model.backbone.layers[1].feed_forward.experts)):
        def __call__(self, hidden, logits, call):
            return 0.5 * super().__call__(hidden, logits, call)

    other = nnx.clone(model)
    experts = other.backbone.layers[1].feed_forward.experts
    halved = nnx.clone(model)
    weights = halved.backbone.layers[1].feed_forward.experts
    weights.down_proj[...] = 0.5 * weights.down_proj[...]
    experts.__class__ = Halved
    given = ids(2, 7)
    assert relative_l2(jax.jit(other)(given).logits, jax.jit(halved)(given).logits) < 1e-5
    prompt = [[1, 2, 3, 4, 5]]
    found, wanted = (mc.generate(each, prompt, max_new_tokens=5).logprobs[0] for each in (other, halved))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    with pytest.raises(ValueError, match="experts"):
        dict(mc.registry.get("jax").parameters(other))


@pytest.mark.parametrize(("kernels", "shape"), [("auto", "b, 20"), ("sequential", "b, l")])
def test_export_of_any_batch_and_for_sequential_any_length(kernels, shape):
    export = pytest.importorskip("jax.export")
    pytest.importorskip("flatbuffers")
    model, given = mc.build(CONFIG, backend="jax", kernels=kernels), ids(3, 20)
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), given.dtype)
    forward = export.export(jax.jit(lambda ids: model(ids).logits), platforms=("cpu", "cuda", "tpu"))(symbolic)
    given = given[:1] if kernels == "auto" else given[:1, :9]
    assert relative_l2(forward.call(given), jax.jit(model)(given).logits) < 1e-6
