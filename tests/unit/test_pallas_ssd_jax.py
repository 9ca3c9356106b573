"""Mamba-2's recurrence in Pallas: interpreted on a CPU, lowered for a TPU, and compiled where its compiler is there."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import selftest
from mamba_core.spec import ops
from mamba_core.spec.ops import ssd as spec
from mamba_core.spec.ops.base import samples_of
from mamba_core.spec.tolerances import relative_l2, tolerance
from tests.conformance import test_ssd as laws
from tests.unit.tpu_compile import TOPOLOGIES, check_that_it_compiles

jax = pytest.importorskip("jax")
jnp = jax.numpy

from mamba_core.backends.jax.kernels import chunked_ssd, pallas_ssd  # noqa: E402 (after the package that it needs)
from mamba_core.backends.jax.ops import ssd as jax_ssd  # noqa: E402


@pytest.fixture
def interpreted(monkeypatch):
    """The name of a kernel that is the one for TPUs, interpreted."""
    kernel = jax_ssd._prepared(pallas_ssd.beside(chunked_ssd.chunked, interpret=True), narrow=True)
    monkeypatch.setitem(jax_ssd.KERNELS, "interpreted", kernel)
    with jax.default_device(jax.devices("cpu")[0]):
        yield "interpreted"
    jax.clear_caches()


# dtype, length, heads, channels, groups, states, whether D has a value a channel, what is given, and positions.
CASES = {
    "all options": ("float32", 150, 6, 20, 2, 16, True, spec.OPTIONAL, ("mask", "segment_ids")),
    "heads of more than a tile": ("float32", 140, 1, 200, 1, 8, False, ("initial_state",), ()),
    "bfloat16": ("bfloat16", 140, 3, 64, 1, 12, False, spec.OPTIONAL, ("segment_ids",)),
}


def drawn(dtype, l, h, p, g, n, per_channel, given, where, batch=2):
    """(arrays, positions, options) with steps from 1e-6 to 20."""
    rng = np.random.default_rng(0)
    arrays, options = spec._draw(rng, batch, l, h, p, g, n, True, spec.NO_LIMIT, per_channel, given)
    kinds = {name: "float32" if name in spec.OP.float32 else dtype for name in arrays}
    positions = spec.draw_positions(rng, batch, l, where)
    return {name: jnp.asarray(value, kinds[name]) for name, value in arrays.items()}, positions, options


def run(arrays, kernel, **given):
    return mc.ssd(**arrays, **given, return_final_state=True, kernel=kernel)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_recurrence(interpreted, case):
    arrays, positions, options = drawn(*CASES[case])
    if not positions:  # short steps, so that something passes through a whole chunk
        arrays["dt"] -= 6.0
    given, dtype = positions | options, CASES[case][0]
    exact = {name: np.asarray(value).astype(np.float64) for name, value in arrays.items()}
    outputs, pullback = jax.vjp(jax.jit(lambda arrays: run(arrays, interpreted, **given)), arrays)
    for value, wanted in zip(outputs, spec.ssd(**exact, **given, return_final_state=True), strict=True):
        assert relative_l2(value.astype("float32"), wanted) < tolerance(dtype)
    assert [value.dtype for value in outputs] == [dtype, "float32"]
    rng = np.random.default_rng(2)
    cotangents = tuple(jnp.asarray(rng.normal(size=value.shape), value.dtype) for value in outputs)
    gradients = pullback(cotangents)[0]
    for name, wanted in spec.ssd_vjp(*map(np.asarray, cotangents), **exact, **given).items():
        assert gradients[name].dtype == arrays[name].dtype
        assert relative_l2(gradients[name].astype("float32"), wanted) < tolerance(dtype, "gradient"), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "law",
    [
        laws.test_short_steps_after_a_long_one_keep_their_digits,
        laws.test_a_rate_of_minus_infinity_forgets_at_every_position_that_counts,
        laws.test_a_negative_step_without_softplus_is_zero,
        laws.test_a_segment_that_comes_again_is_another,
        laws.test_masked_positions_do_not_leak_what_is_not_finite,
        laws.test_a_later_chunk_forgets_a_segment_that_was_not_finite,
    ],
    ids=lambda law: law.__name__.removeprefix("test_"),
)
def test_the_laws_of_every_kernel(interpreted, monkeypatch, law):
    monkeypatch.setattr(laws, "runnable", lambda backend, op: [interpreted])
    law(mc.registry.get("jax"))


@pytest.mark.slow
def test_it_passes_its_self_test(interpreted, monkeypatch):
    monkeypatch.setattr(jax_ssd, "KERNELS", {interpreted: jax_ssd.KERNELS[interpreted]} | jax_ssd.KERNELS)
    verdict = selftest.examine(mc.registry.get("jax"), "ssd", interpreted, "cpu")
    assert (verdict.faults, verdict.trials) == ((), len(samples_of(ops.public()["ssd"])))


def test_a_restart_forgets_what_is_not_finite(interpreted):
    """At its own position too, and whatever comes before it in its chunk."""
    arrays, _, options = drawn("float32", 40, 2, 8, 1, 3, False, ("initial_state",), (), 1)
    spoilt = arrays | {"x": arrays["x"].at[0, 5].set(jnp.inf)}
    segments = {"segment_ids": jnp.repeat(jnp.arange(2), 20)[None]}
    found, clean = (run(given, interpreted, **options, **segments) for given in (spoilt, arrays))
    np.testing.assert_array_equal(found[0][:, 20:], clean[0][:, 20:])
    np.testing.assert_array_equal(found[1], clean[1])
    for value, wanted in zip(clean, run(arrays, "sequential", **options, **segments), strict=True):
        assert relative_l2(value, wanted) < 1e-6
    assert np.isfinite(found[0][:, :5]).all()
    assert not np.isfinite(found[0][:, 5:20]).any()


@pytest.mark.parametrize("kernel", ["pallas", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_exported_for_a_tpu(kernel, dtype):
    arrays, positions, options = drawn(dtype, 300, 4, 8, 2, 16, False, ("z", "D"), ("segment_ids",))

    def loss(arrays):
        y, h = run(arrays, kernel, **options, **positions)
        return (y.astype("float32") ** 2).sum() + h.sum()

    for function in (loss, jax.grad(loss)):
        module = jax.export.export(jax.jit(function), platforms=["tpu"])(arrays).mlir_module()
        calls = [line for line in module.splitlines() if "@tpu_custom_call" in line]
        assert len(calls) == 1 + (function is not loss)
        # The kernels read x, B and C as they are stored.
        assert all(("bf16" in line.rpartition(" : ")[2]) == (dtype == "bfloat16") for line in calls)


def test_elsewhere_its_twin_or_nothing():
    arrays, _, _ = drawn("float32", 300, 4, 8, 2, 16, False, (), ())
    several = jax.export.export(jax.jit(lambda arrays: run(arrays, "auto")), platforms=["cpu", "tpu"])(arrays)
    assert "tpu_custom_call" not in several.mlir_module()
    with pytest.raises(ValueError, match="kernel 'pallas' runs on a TPU only; take 'auto' or another"):
        jax.jit(lambda arrays: run(arrays, "pallas")).trace(arrays).lower(lowering_platforms=("cpu",))
    assert pallas_ssd.reason("gpu") == "it runs on a TPU only"
    assert pallas_ssd.reason("tpu", "float16") == "x is float16, and it computes float32 and bfloat16"
    assert pallas_ssd.reason("tpu", "float32", 513) == "d_state is 513, and it holds at most 512"
    assert pallas_ssd.reason("tpu", "bfloat16", 512) is None
    with pytest.raises(ValueError, match="x is float16, and it computes float32 and bfloat16; these can: chunked"):
        run(drawn("float16", 9, 4, 8, 2, 16, False, (), ())[0], "pallas")


def test_only_states_between_chunks_are_kept():
    """And the inputs; no array has both axes of a chunk."""
    arrays, _, _ = drawn("float32", 300, 4, 8, 2, 16, False, (), (), 1)
    module = jax.jit(jax.grad(lambda arrays: run(arrays, "pallas")[0].sum()))
    text = module.trace(arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<1x3x16x32xf32>" in text
    assert "x128x128xf32>" not in text


COMPILED = """
    from mamba_core.backends.jax.ops.ssd import pallas

    def loss(*arrays):
        y, h = pallas(*arrays, dt_softplus=True, dt_limit=(0.0, float("inf")))
        return (y.astype(jnp.float32) ** 2).sum() + h.sum()

    sizes = ((2, 300, 4, 20, 2, 5), (1, 256, 80, 64, 1, 128), (1, 256, 128, 64, 8, 128), (1, 130, 8, 64, 1, 512))
    sizes += ((1, 130, 16, 8, 1, 512), (1, 130, 2, 256, 1, 512), (1, 130, 3, 1, 3, 1))
    for b, l, h, p, g, n in sizes:
        for dtype in ("float32", "bfloat16"):
            of_x, of_B = (shaped(b, l, *shape, dtype=dtype) for shape in ((h, p), (g, n)))
            arrays = [of_x, shaped(b, l, h, dtype=dtype), shaped(h), of_B, of_B, shaped(h), of_x, shaped(h)]
            arrays += [shaped(b, h, p, n), shaped(b, l, dtype=bool), shaped(b, l, dtype=bool)]
            compile(loss, *arrays)
            compile(jax.grad(loss, argnums=tuple(range(9))), *arrays)
            without = arrays[:5] + [None] * 6
            compile(jax.grad(loss, argnums=tuple(range(5))), *without)
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_compiler_of_tpus_takes_it(topology):
    check_that_it_compiles(topology, COMPILED)
