"""Mamba-2 on JAX takes the native step of its blocks, and only where it computes what the model would."""

import dataclasses
import functools

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2, tolerance
from tests.conformance.cases.mamba2 import CONFIGS

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
jnp = jax.numpy

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")
ODD = dataclasses.replace(CONFIGS["odd"], n_layer=2)
LIMITS = {"odd": CONFIGS["odd"], "bare": CONFIGS["bare"], "base": dataclasses.replace(CONFIGS["base"], bias=True)}


def pair(config=ODD, **settings):
    """(the model, the same in plain operations)."""
    models = [mc.build(config, backend="jax", device="cpu", **settings | {"kernels": k}) for k in ("auto", "plain")]
    for model in models:
        rng = np.random.default_rng(0)
        for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            # Ones and zeros would hide what is left out; and step sizes are to be within their limits.
            if path[-1] in ("D", "scale", "bias", "dt_bias"):
                mean, scale = (-2.0, 0.3) if path[-1] == "dt_bias" else (0.5, 1.0)
                parameter[...] = jnp.asarray(rng.normal(mean, scale, parameter.shape), parameter.dtype)
    return models


def inputs(model, batch=2):
    """(ids (b, 1), a state)."""
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda zero: jnp.asarray(rng.normal(size=zero.shape), zero.dtype), model.init_state(batch))
    return jnp.arange(batch)[:, None] % model.config.vocab_size, state


def ways(model, batch=2):
    return [run[:3] for run in mc.registry.get("jax").explain(model, batch, 1)]


def same(found, wanted, dtype="float32"):
    for value, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (value.shape, value.dtype) == (other.shape, other.dtype)
        assert relative_l2(value.astype("float32"), other.astype("float32")) < tolerance(dtype, "node")


@pytest.mark.parametrize(("name", "dtype", "batch"), [
    ("base", "bfloat16", 8), ("odd", "float32", 1), ("odd", "bfloat16", 3), ("bare", "float32", 5),
])  # fmt: skip
def test_a_step_is_that_of_the_plain_operations(name, dtype, batch):
    (model, plain), last = pair(LIMITS[name], dtype=dtype), LIMITS[name].n_layer - 1
    arguments = inputs(model, batch)
    assert ways(model, batch) == [(0, last, "native_step")]
    assert ways(model, 9)[0][2] == "plain"
    assert "mamba_ssd_steps_xla" in jax.jit(model).lower(*arguments).as_text()
    same(jax.jit(model)(*arguments), jax.jit(plain)(*arguments), dtype)


def doubled(module):
    class Doubled(type(module)):
        def __call__(self, *arguments):
            result = super().__call__(*arguments)
            return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    module.__class__ = Doubled


def adapted(mixer):
    linear = mixer.in_proj
    mixer.in_proj = nnx.LoRA(linear.in_features, 4, linear.out_features, base_module=linear, rngs=nnx.Rngs(0))
    mixer.in_proj.lora_b[...] += 1.0


def narrow_norm(mixer):
    mixer.norm.dtype = "bfloat16"


def of_one_group(mixer):
    mixer.norm.groups = 1


def narrowed(mixer):
    mixer.D = nnx.Param(mixer.D[...].astype("bfloat16"))


CHANGES = {
    "a mixer": doubled,
    "a linear": lambda mixer: doubled(mixer.out_proj),
    "a norm": lambda mixer: doubled(mixer.norm),
    "an adapter": adapted,
    "a norm of another dtype": narrow_norm,
    "a norm of one group": of_one_group,
    "D of another dtype": narrowed,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_mixer_computes_what_it_was_changed_to(change):
    (model, plain), before = pair(), unchanged()
    for each in (model, plain):
        change(each.backbone.layers[1].mixer)
    assert [way for *_, way in ways(model)] == ["native_step", "plain"]
    found, wanted = (jax.jit(each)(*inputs(each)) for each in (model, plain))
    same(found, wanted)
    assert relative_l2(found.logits, before) > 5e-5


@functools.cache
def unchanged():
    """The logits of the model as it was built."""
    _, plain = pair()
    return jax.jit(plain)(*inputs(plain)).logits


def test_a_limit_that_is_none_is_refused():
    model, _ = pair()
    model.backbone.layers[1].mixer.dt_limit = (0.5, 0.1)
    with pytest.raises(ValueError, match=r"dt_limit is \(0.5, 0.1\)"):
        model(*inputs(model))


def test_groups_that_the_arrays_do_not_have_are_the_plain_way_s_to_refuse():
    model, _ = pair()
    for block in model.backbone.layers:
        block.mixer.groups = block.mixer.norm.groups = 2
    assert [way for *_, way in ways(model)] == ["plain"]


def test_every_block_has_its_own_numbers():
    """In one call: the eps of both norms, the limit, the side of the gate."""
    models = pair()
    for model in models:
        first, second = model.backbone.layers
        first.norm.eps, first.mixer.norm.eps, first.mixer.norm.norm_before_gate = 3.0, 0.5, False
        second.mixer.dt_limit, second.mixer.norm.eps = (0.0, float("inf")), 2.0
    assert ways(models[0]) == [(0, 1, "native_step")]
    same(*(jax.jit(model)(*inputs(model)) for model in models))


def test_blocks_of_several_kinds_are_cut_into_runs():
    """Mamba-1's between Mamba-2's, and a block of other sizes after them."""
    mamba = mc.MambaConfig(d_model=ODD.d_model, n_layer=1, vocab_size=ODD.vocab_size, residual_in_fp32=False)
    models = pair(dataclasses.replace(ODD, n_layer=4))
    inside, narrow = pair(mamba), pair(dataclasses.replace(ODD, d_state=2))
    ids, state = inputs(models[0])
    layers = list(state.layers)
    layers[1], layers[3] = inputs(inside[0])[1].layers[0], inputs(narrow[0])[1].layers[1]
    found = []
    for model, other, third in zip(models, inside, narrow, strict=True):
        model.backbone.layers[1], model.backbone.layers[3] = other.backbone.layers[0], third.backbone.layers[1]
        found.append(model.backbone(ids, state._replace(layers=tuple(layers)), call()))
    same(*found)


def call():
    from mamba_core.backends.jax.positions import call_of

    return call_of(None, None, length=1)


def test_gradients_through_a_step_are_those_of_the_plain_operations():
    model, plain = pair(dataclasses.replace(ODD, n_layer=1))
    ids, state = inputs(model)

    def gradient(model):
        run = jax.grad(lambda layers: model(ids, state._replace(layers=layers)).logits.var())
        return jax.jit(run)(state.layers)

    for value, other in zip(jax.tree.leaves(gradient(model)), jax.tree.leaves(gradient(plain)), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-3, atol=1e-5)


def test_tokens_are_those_of_the_plain_operations():
    """The states are in one another's memory then."""
    prompts, drawn = [[1, 2, 3], [7], [4, 5, 6]], {"temperature": 1.0, "seed": 3}
    found, wanted = (mc.generate(model, prompts, max_new_tokens=16, **drawn).tokens for model in pair())
    assert found == wanted
    assert len({token for row in found for token in row}) > 3
