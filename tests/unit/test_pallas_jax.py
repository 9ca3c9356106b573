"""The scan in Pallas: interpreted on a CPU, lowered for a TPU, and where its compiler is installed compiled too."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import selftest
from mamba_core.spec import ops
from mamba_core.spec.ops import selective_scan as scan_spec
from mamba_core.spec.ops.base import samples_of
from mamba_core.spec.tolerances import relative_l2, tolerance
from tests.unit.test_cuda_jax import arguments, positions
from tests.unit.tpu_compile import TOPOLOGIES, check_that_it_compiles

jax = pytest.importorskip("jax")
jnp = jax.numpy

from mamba_core.backends.jax.kernels import cuda_scan, pallas_scan  # noqa: E402 (after the package that it needs)
from mamba_core.backends.jax.ops import selective_scan as jax_scan  # noqa: E402


def scan(arrays, kernel="pallas", **given):
    return mc.selective_scan(**arrays, **given, return_final_state=True, kernel=kernel)


@pytest.fixture
def interpreted(monkeypatch):
    """The name of a kernel that is the one for TPUs, interpreted."""
    monkeypatch.setattr(jax_scan, "_recurrence", pallas_scan.beside(jax_scan._plain_recurrence, interpret=True))
    monkeypatch.setitem(jax_scan.KERNELS, "interpreted", jax_scan.pallas)
    with jax.default_device(jax.devices("cpu")[0]):
        yield "interpreted"
    jax.clear_caches()


CASES = {
    "all options": (arguments(2, 150, 20, 16), {"delta_softplus": True, **positions(2, 150)}),
    "no option": (arguments(1, 33, 8, 3, without=("D", "z", "delta_bias", "initial_state")), {}),
    "several blocks of channels": (arguments(1, 130, 300, 40), {"delta_softplus": True}),
    "whole chunks": (arguments(1, 256, 128, 8), {"delta_softplus": True}),
    "bfloat16": (arguments(1, 35, 20, 16, "bfloat16"), {"delta_softplus": True, **positions(1, 35)}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_recurrence(interpreted, case):
    arrays, given = CASES[case]
    dtype = arrays["x"].dtype.name
    jax_arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
    jax_arrays["delta"] = abs(jax_arrays["delta"])
    arrays = {name: np.asarray(value) for name, value in jax_arrays.items()}
    outputs, pullback = jax.vjp(lambda arrays: scan(arrays, interpreted, **given), jax_arrays)
    wanted = scan_spec.selective_scan(**arrays, **given, return_final_state=True)
    for value, other in zip(outputs, wanted, strict=True):
        assert relative_l2(value.astype("float32"), other) < tolerance(dtype)
    rng = np.random.default_rng(2)
    cotangents = tuple(jnp.asarray(rng.normal(size=value.shape), value.dtype) for value in outputs)
    gradients = pullback(cotangents)[0]
    for name, other in scan_spec.selective_scan_vjp(*map(np.asarray, cotangents), **arrays, **given).items():
        assert gradients[name].dtype == jax_arrays[name].dtype
        assert relative_l2(gradients[name].astype("float32"), other) < tolerance(dtype, "gradient"), name


def test_it_passes_its_self_test_and_a_broken_one_does_not(interpreted, monkeypatch):
    backend, right = mc.registry.get("jax"), jax_scan.KERNELS[interpreted]
    short = samples_of(ops.public()["selective_scan"])[2:3]
    monkeypatch.setattr(selftest, "samples_of", lambda op: short)
    monkeypatch.setattr(jax_scan, "KERNELS", {interpreted: right} | jax_scan.KERNELS)
    verdict = selftest.examine(backend, "selective_scan", interpreted, "cpu")
    assert (verdict.faults, verdict.trials) == ((), 1)

    def wrong(*arguments, **options):
        y, h = right(*arguments, **options)
        return y, h * 1.001

    jax.clear_caches()
    monkeypatch.setitem(jax_scan.KERNELS, interpreted, wrong)
    verdict = selftest.examine(backend, "selective_scan", interpreted, "cpu", to_the_end=False)
    assert "final_state is 1.0e-03 from the plain kernel" in verdict.faults[0]


def test_a_restart_forgets_a_state_that_is_not_finite(interpreted):
    """In values, and in the gradients of what comes after it."""
    arrays = {name: jnp.asarray(value) for name, value in arguments(1, 40, 8, 3).items()}
    arrays["x"] = arrays["x"].at[0, 5].set(jnp.inf)
    segments = jnp.repeat(jnp.arange(2), 20)[None]
    later = {name: value[:, 20:] if value.shape[:2] == (1, 40) else value for name, value in arrays.items()}
    later["initial_state"] = jnp.zeros_like(later["initial_state"])

    def results(arrays, kernel, **given):
        y, h = scan(arrays, kernel, delta_softplus=True, **given)
        return y[:, -20:], h

    outputs, pullback = jax.vjp(lambda arrays: results(arrays, interpreted, segment_ids=segments), arrays)
    wanted, wanted_pullback = jax.vjp(lambda arrays: results(arrays, "sequential"), later)
    for value, other in zip(outputs, wanted, strict=True):
        assert relative_l2(value, other) < 1e-6
    gradients, others = (pull(tuple(map(jnp.ones_like, wanted)))[0] for pull in (pullback, wanted_pullback))
    for name in ("x", "delta", "B", "C", "z"):
        assert relative_l2(gradients[name][:, 20:], others[name]) < 1e-5, name


def test_y_has_the_dtype_of_x(interpreted):
    arrays = {name: jnp.asarray(value) for name, value in arguments(1, 9, 8, 3, "bfloat16").items()}
    for kernel in (interpreted, "auto"):
        assert [value.dtype for value in scan(arrays, kernel)] == ["bfloat16", "float32"]
    arguments_of_the_kernel = (*(arrays[name] for name in cuda_scan.ARGUMENTS[:-2]), None, None)
    assert jax_scan.pallas(*arguments_of_the_kernel, delta_softplus=True, portable=True)[0].dtype == "bfloat16"


def test_vmap_and_a_second_derivative(interpreted):
    pairs = [{name: jnp.asarray(value) for name, value in arguments(1, 9, 8, 3, seed=seed).items()} for seed in (0, 1)]

    def loss(arrays, name):
        y, h = scan(arrays, name, delta_softplus=True)
        return (y**2).sum() + (h**2).sum()

    stacked = jax.tree.map(lambda *values: jnp.stack(values), *pairs)
    gradients = jax.vmap(jax.grad(lambda arrays: loss(arrays, interpreted)))(stacked)
    for index, arrays in enumerate(pairs):
        for name, wanted in jax.grad(lambda arrays: loss(arrays, "chunked"))(arrays).items():
            assert relative_l2(gradients[name][index], wanted) < 1e-5, name

    def second(name):
        gradient = jax.grad(lambda delta: loss(pairs[0] | {"delta": delta}, name))
        return jax.grad(lambda delta: (gradient(delta) * pairs[1]["delta"]).sum())(pairs[0]["delta"])

    assert relative_l2(second(interpreted), second("chunked")) < 1e-5


@pytest.mark.parametrize("kernel", ["pallas", "auto"])
@pytest.mark.parametrize("given", [{}, {"segment_ids": jnp.zeros((2, 300), int)}])
def test_it_is_exported_for_a_tpu(kernel, given):
    arrays = {name: jnp.asarray(value) for name, value in arguments(2, 300, 8, 4).items()}

    def loss(arrays):
        y, h = scan(arrays, kernel, delta_softplus=True, **given)
        return (y**2).sum() + h.sum()

    for function in (loss, jax.grad(loss)):
        module = jax.export.export(jax.jit(function), platforms=["tpu"])(arrays).mlir_module()
        assert module.count("@tpu_custom_call") == 1 + (function is not loss)


def test_elsewhere_its_twin_or_nothing():
    arrays = {name: jnp.asarray(value) for name, value in arguments(2, 300, 8, 4).items()}
    several = jax.export.export(jax.jit(lambda arrays: scan(arrays, "auto")), platforms=["cpu", "tpu"])(arrays)
    assert "tpu_custom_call" not in several.mlir_module()
    with pytest.raises(ValueError, match="kernel 'pallas' runs on a TPU only; take 'auto' or another"):
        jax.jit(scan).trace(arrays).lower(lowering_platforms=("cpu",))
    assert pallas_scan.reason("gpu") == "it runs on a TPU only"
    assert pallas_scan.reason("tpu", "float16") == "x is float16, and it computes float32 and bfloat16"
    assert pallas_scan.reason("tpu", "float32", 129) == "d_state is 129, and it holds at most 128"
    many = {name: jnp.asarray(value) for name, value in arguments(1, 20, 8, 129).items()}
    text = jax.jit(lambda arrays: scan(arrays, "auto")).trace(many).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_compiler_of_tpus_takes_it(topology):
    check_that_it_compiles(topology, COMPILED)


COMPILED = """
    from mamba_core.backends.jax.ops.selective_scan import pallas

    def loss(*arrays):
        y, h = pallas(*arrays, delta_softplus=True)
        return (y**2).sum() + h.sum()

    for b, l, e, n in ((2, 300, 20, 5), (1, 256, 1536, 16), (1, 130, 256, 128)):
        arrays = [shaped(b, l, e), shaped(b, l, e), shaped(e, n), shaped(b, l, n), shaped(b, l, n), shaped(e)]
        arrays += [shaped(b, l, e), shaped(e), shaped(b, e, n), shaped(b, l, dtype=bool), shaped(b, l, dtype=bool)]
        compile(loss, *arrays)
        compile(jax.grad(loss, argnums=tuple(range(9))), *arrays)
"""
