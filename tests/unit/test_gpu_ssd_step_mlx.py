"""MLX's GPU kernel of one position of Mamba-2, without a GPU: its source for CUDA and Metal, run as C++ on a CPU."""

import functools
import re

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import selftest
from mamba_core.spec.ops import ssd as spec
from mamba_core.spec.tolerances import relative_l2, tolerance

mx = pytest.importorskip("mlx.core")

from mamba_core.backends.mlx.kernels import gpu_language, gpu_ssd_step  # noqa: E402 (after the package that it needs)
from mamba_core.backends.mlx.ops import ssd_step as op  # noqa: E402
from tests.unit import mlx_gpu_on_cpu  # noqa: E402
from tests.unit.mlx_gpu_on_cpu import as_numpy  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=["cuda", "metal", pytest.param("a GPU", marks=pytest.mark.gpu)])
def kernel(request, folder, monkeypatch):
    """A kernel's name: of one that is made as MLX would have it and run on the CPU, or on a GPU itself."""
    if request.param == "a GPU":
        names = [name for name, why in op.kernels("gpu").items() if why is None and name != "plain"]
        if not names:
            pytest.skip("no GPU")
        yield names[0]
        return
    gpu_ssd_step._kernel.cache_clear()
    language = mlx_gpu_on_cpu.language(request.param, folder, monkeypatch)
    monkeypatch.setattr(op, "KERNELS", {"on a CPU": gpu_ssd_step.step(language, op.plain)} | op.KERNELS)
    yield "on a CPU"
    gpu_ssd_step._kernel.cache_clear()


# dtype, rows, heads, channels, groups, states, what is given, and settings of the op.
ALL = ("D", "z", "dt_bias")
CASES = {
    "all options": ("float32", 3, 9, 12, 3, 40, ALL, {"dt_softplus": True, "dt_limit": (1e-3, 0.5)}),
    "no option": ("float32", 2, 8, 5, 1, 7, (), {}),
    "bfloat16": ("bfloat16", 1, 8, 64, 1, 128, ALL, {"dt_softplus": True}),
    "float16": ("float16", 1, 8, 6, 8, 1, ("D", "dt_bias"), {"dt_softplus": True}),
}


def drawn(dtype, b, h, p, g, n, given, settings):
    """Arrays by the op's names; step sizes are from 1e-6 to 20."""
    rng = np.random.default_rng(0)
    softplus = settings.get("dt_softplus", False)
    arrays = spec._draw(rng, b, 1, h, p, g, n, softplus, spec.NO_LIMIT, "z" in given, (*given, "initial_state")).arrays
    arrays = {name: value[:, 0] if name in spec.OP.per_position else value for name, value in arrays.items()}
    arrays["state"] = arrays.pop("initial_state")
    kinds = {name: mx.float32 if name in (*spec.OP.float32, "state") else getattr(mx, dtype) for name in arrays}
    return {name: mx.array(value.astype(np.float32)).astype(kinds[name]) for name, value in arrays.items()}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_recurrence_and_gradients_those_of_the_plain_form(kernel, case):
    dtype, *_, settings = CASES[case]
    arrays = drawn(*CASES[case])
    names, values = list(arrays), list(arrays.values())

    def run(name, *values):
        return op.one_position(**dict(zip(names, values, strict=True)), **settings, kernel=name)

    exact = {name: as_numpy(value) for name, value in arrays.items()}
    wanted = spec.ssd_step(**exact, **settings)
    rng = np.random.default_rng(1)
    kinds = (arrays["x"].dtype, mx.float32)
    cotangents = [
        mx.array(rng.normal(size=value.shape).astype(np.float32)).astype(kind)
        for value, kind in zip(wanted, kinds, strict=True)
    ]
    outputs, gradients = mx.vjp(functools.partial(run, kernel), values, cotangents)
    for value, other in zip(outputs, wanted, strict=True):
        assert relative_l2(as_numpy(value), other) < tolerance(dtype)
    assert [value.dtype for value in outputs] == list(kinds)
    for value, other in zip(gradients, mx.vjp(functools.partial(run, "plain"), values, cotangents)[1], strict=True):
        assert mx.array_equal(value, other).item()


def test_ends_of_the_domain(kernel):
    """A rate of -inf forgets, unless the step is zero; a rate may grow the state; NaN is not lost."""
    arrays = drawn("float32", 1, 8, 4, 1, 9, (), {})
    A = [-np.inf, -np.inf, 0.5, -1.0, np.nan, -300.0, -1.0, -1.0]
    dt = [[0.5, 0.0, 2.0, np.nan, 0.1, 20.0, 20.0, -1.0]]
    arrays |= {"A": mx.array(A), "dt": mx.array(dt)}
    found, wanted = (op.one_position(**arrays, kernel=name) for name in (kernel, "plain"))
    for value, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(as_numpy(value), as_numpy(other), rtol=2e-6, atol=1e-6)
    assert np.isnan(as_numpy(found[0])[0, 3:5]).all()
    soft = [[-100.0, 0.0, 30.0, np.nan, 1.0, -5.0, 5.0, 88.0]]
    arrays |= {"A": -mx.ones(8), "dt": mx.array(soft)}
    found, wanted = (op.one_position(**arrays, dt_softplus=True, kernel=name) for name in (kernel, "plain"))
    np.testing.assert_allclose(as_numpy(found[1]), as_numpy(wanted[1]), rtol=2e-6, atol=1e-6)


def test_mixed_dtypes_and_transformations_are_those_of_the_plain_form(kernel):
    arrays = drawn(*CASES["all options"])
    mixed = arrays | {"x": arrays["x"].astype(mx.bfloat16)}
    y, h = op.one_position(**mixed, kernel=kernel)
    assert (y.dtype, h.dtype) == (mx.bfloat16, mx.float32)
    assert relative_l2(as_numpy(h), as_numpy(op.one_position(**mixed, kernel="plain")[1])) < 1e-6

    def run(name, x):
        return op.one_position(**arrays | {"x": x}, kernel=name)[0]

    tangent = mx.random.normal(arrays["x"].shape)
    stacked = mx.stack([arrays["x"], tangent])
    for transformed in (
        lambda name: mx.jvp(functools.partial(run, name), [arrays["x"]], [tangent])[1][0],
        lambda name: mx.grad(lambda x: (mx.grad(lambda x: (run(name, x) ** 3).sum())(x) ** 2).sum())(arrays["x"]),
        *([lambda name: mx.vmap(functools.partial(run, name))(stacked)] if kernel != "on a CPU" else []),
    ):
        assert relative_l2(as_numpy(transformed(kernel)), as_numpy(transformed("plain"))) < 1e-5


def test_it_passes_its_self_test_and_a_broken_one_does_not(kernel, monkeypatch):
    backend, device = mc.registry.get("mlx"), "cpu" if kernel == "on a CPU" else "gpu"
    if device == "cpu":  # there each is compiled
        monkeypatch.setattr(op, "TRIALS", op.TRIALS[1:2])
    verdict = selftest.examine(backend, "ssd_step", kernel, device)
    assert (verdict.faults, verdict.trials, verdict.skipped) == ((), len(op.TRIALS), ())
    right = op.KERNELS[kernel]

    def wrong(**arguments):
        y, h = right(**arguments)
        return y, h * 1.001

    monkeypatch.setitem(op.KERNELS, kernel, wrong)
    verdict = selftest.examine(backend, "ssd_step", kernel, device, to_the_end=False)
    assert re.search(r"state is \d\.\de-04 from the plain kernel", verdict.faults[0])


def test_a_model_decodes_by_it(kernel, monkeypatch):
    """Where its policy takes it, and never for "plain"."""
    config = mc.Mamba2Config(d_model=32, n_layer=2, vocab_size=32, headdim=8, d_state=16)
    calls, right = [], op.KERNELS[kernel]
    monkeypatch.setitem(op.KERNELS, kernel, lambda **arguments: calls.append(1) or right(**arguments))
    if kernel == "on a CPU":  # where "auto" would take the kernel for a GPU
        monkeypatch.setattr(op, "kernels", lambda *_: dict.fromkeys(op.KERNELS, None))
    found = {}
    for policy in ("auto", "plain"):
        model = mc.build(config, backend="mlx", kernels=policy)
        found[policy] = mc.generate(model, [[1, 2, 3]], max_new_tokens=4)
        assert bool(calls) == (policy == "auto")
        calls.clear()
    assert found["auto"].tokens == found["plain"].tokens
    np.testing.assert_allclose(found["auto"].logprobs, found["plain"].logprobs, rtol=1e-5)


def test_why_it_cannot_run(monkeypatch):
    available = type("Available", (), {"is_available": staticmethod(lambda: True)})
    monkeypatch.setattr(mx, "cuda", available, raising=False)
    monkeypatch.setattr(mx, "metal", available)
    assert op.kernels("cpu") == {"cuda": "it runs on an NVIDIA GPU only", "metal": "it runs on an Apple GPU only"} | {
        "plain": None
    }
    assert op.kernels("gpu", mx.int32)["metal"].startswith("x is int32, and it computes float32")
    least = gpu_language.LEAST_METAL_SIZE
    small = op.kernels("gpu", mx.float32, [mx.zeros(least - 1), None])
    assert small == {"cuda": None, "metal": f"it takes no array of fewer than {least} elements", "plain": None}
    with pytest.raises(ValueError, match="ssd_step has no kernel 'metall'"):
        op.one_position(**drawn(*CASES["no option"]), kernel="metall")
    with pytest.raises(ValueError, match="kernel 'metal' cannot run here: it runs on an Apple GPU only"):
        op.one_position(**drawn(*CASES["no option"]), kernel="metal")


def test_metal_takes_every_trial_of_its_self_test():
    for trial in op.trials("gpu"):
        assert min(value.size for value, _ in trial.arrays.values()) >= gpu_language.LEAST_METAL_SIZE
