"""MLX's GPU scan, without a GPU: its kernels' sources, for CUDA and for Metal, compiled as C++ and run on a CPU."""

import functools
import re

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import selftest
from mamba_core.backends.gpu import launch as gpu
from mamba_core.spec import ops
from mamba_core.spec.ops import selective_scan as scan_spec
from mamba_core.spec.ops.base import samples_of
from mamba_core.spec.tolerances import relative_l2, tolerance

mx = pytest.importorskip("mlx.core")

from mamba_core.backends.mlx.kernels import gpu_scan  # noqa: E402 (after the package that it needs)
from mamba_core.backends.mlx.kernels.gpu_language import LEAST_METAL_SIZE  # noqa: E402
from mamba_core.backends.mlx.ops import selective_scan as op  # noqa: E402
from tests.unit import mlx_gpu_on_cpu  # noqa: E402
from tests.unit.mlx_gpu_on_cpu import as_numpy  # noqa: E402

KEPT_IN_FLOAT32 = ("A", "D", "delta_bias", "initial_state")
MULTIPROCESSORS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=["cuda", "metal", pytest.param("a GPU", marks=pytest.mark.gpu)])
def kernel(request, folder, monkeypatch):
    """A kernel's name: of one that is made as MLX would have it and run on the CPU, or on a GPU itself."""
    if request.param == "a GPU":
        names = [language.name for language in (gpu_scan.CUDA, gpu_scan.METAL) if not gpu_scan.reason(language, "gpu")]
        if not names:
            pytest.skip("no GPU")
        yield names[0]
        return
    monkeypatch.setattr(gpu_scan.driver, "multiprocessors", lambda: MULTIPROCESSORS)
    gpu_scan._kernel.cache_clear()
    language = mlx_gpu_on_cpu.language(request.param, folder, monkeypatch)
    monkeypatch.setitem(op.KERNELS, "on a CPU", gpu_scan.scan(language))
    yield "on a CPU"
    gpu_scan._kernel.cache_clear()


def arguments(b, l, e, n, dtype="float32", without=(), seed=0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (b, l, e),
        "delta": (b, l, e),
        "A": (e, n),
        "B": (b, l, n),
        "C": (b, l, n),
        "D": (e,),
        "z": (b, l, e),
    }
    shapes |= {"delta_bias": (e,), "initial_state": (b, e, n)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items() if name not in without}
    arrays |= {"A": -np.exp(arrays["A"]), "delta": abs(arrays["delta"])}
    kinds = {name: mx.float32 if name in KEPT_IN_FLOAT32 else getattr(mx, dtype) for name in arrays}
    return {name: mx.array(value.astype(np.float32)).astype(kinds[name]) for name, value in arrays.items()}


def positions(b, l) -> dict:
    rng = np.random.default_rng(1)
    return {"mask": mx.array(rng.random((b, l)) < 0.7), "segment_ids": mx.array(np.cumsum(rng.random((b, l)) < 0.1, 1))}


def scan(arrays, kernel, **given):
    return mc.selective_scan(**arrays, **given, return_final_state=True, kernel=kernel)


CASES = {
    "all options": (arguments(2, 35, 20, 16), {"delta_softplus": True, **positions(2, 35)}),
    "no option": (arguments(1, 33, 8, 3, without=("D", "z", "delta_bias", "initial_state")), {}),
    "in chunks": (arguments(1, 500, 9, 16), {"delta_softplus": True, **positions(1, 500)}),
    "many states": (arguments(1, 20, 8, 100), {"delta_softplus": True}),
    "bfloat16": (arguments(1, 35, 24, 16, "bfloat16"), {"delta_softplus": True}),
    "float16": (arguments(1, 35, 8, 30, "float16", without=("z",)), {"delta_softplus": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_recurrence(kernel, case):
    arrays, given = CASES[case]
    dtype = mc.registry.get("mlx").to_numpy(arrays["x"]).dtype.name
    names, values = list(arrays), list(arrays.values())
    rng = np.random.default_rng(2)
    dy, dh = (rng.normal(size=shape) for shape in (arrays["x"].shape, (arrays["x"].shape[0], *arrays["A"].shape)))
    cotangents = [mx.array(dy.astype(np.float32)).astype(arrays["x"].dtype), mx.array(dh.astype(np.float32))]
    outputs, gradients = mx.vjp(
        lambda *values: scan(dict(zip(names, values, strict=True)), kernel, **given), values, cotangents
    )
    plain = {name: as_numpy(value) for name, value in arrays.items()}
    given = {name: np.array(value) if isinstance(value, mx.array) else value for name, value in given.items()}
    for value, wanted in zip(outputs, scan_spec.selective_scan(**plain, **given, return_final_state=True), strict=True):
        assert relative_l2(as_numpy(value), wanted) < tolerance(dtype)
    wanted = scan_spec.selective_scan_vjp(*map(as_numpy, cotangents), **plain, **given)
    for name, value in zip(names, gradients, strict=True):
        assert value.dtype == arrays[name].dtype
        assert relative_l2(as_numpy(value), wanted[name]) < tolerance(dtype, "gradient"), name


def test_it_passes_its_self_test_and_a_broken_one_does_not(kernel, monkeypatch):
    backend, device = mc.registry.get("mlx"), "cpu" if kernel == "on a CPU" else "gpu"
    right, all_samples = op.KERNELS[kernel], samples_of(ops.public()["selective_scan"])
    monkeypatch.setattr(op, "KERNELS", {kernel: right} | op.KERNELS)
    if device == "cpu":  # there each kernel is compiled for each
        monkeypatch.setattr(selftest, "samples_of", lambda op: all_samples[2:3])
    verdict = selftest.examine(backend, "selective_scan", kernel, device)
    assert (verdict.faults, verdict.skipped) == ((), ())
    assert verdict.trials == (1 if device == "cpu" else len(all_samples))

    def wrong(call, x, *others):
        y, h = right(call, x, *others)
        return y, h * 1.001

    monkeypatch.setitem(op.KERNELS, kernel, wrong)
    verdict = selftest.examine(backend, "selective_scan", kernel, device, to_the_end=False)
    assert "final_state is 1.0e-03 from the plain kernel" in verdict.faults[0]


@pytest.mark.parametrize("small", [False, True])
def test_the_case_in_chunks_has_several(small):
    sizes = (*CASES["in chunks"][0]["x"].shape, 16)
    cores = gpu_scan.APPLE_CORES if small else MULTIPROCESSORS
    assert gpu.Scan(*sizes, "float32", frozenset(), False, True, cores, small=small).chunks > 2


def test_slices_mixed_dtypes_and_no_positions(kernel):
    arrays, given = CASES["all options"]
    wide = mx.concatenate([arrays["z"], arrays["x"]], axis=-1)
    y, h = scan(arrays | {"x": wide[..., 20:]}, kernel, **given)
    wanted, wanted_h = scan(arrays, kernel, **given)
    assert mx.array_equal(y, wanted).item()
    assert mx.array_equal(h, wanted_h).item()
    y, h = scan(arrays | {"x": arrays["x"].astype(mx.bfloat16)}, kernel, **given)
    assert (y.dtype, h.dtype) == (mx.bfloat16, mx.float32)
    empty = {name: value[:, :0] if name in ("x", "delta", "B", "C", "z") else value for name, value in arrays.items()}
    y, h = scan(empty, kernel)
    assert y.shape == (2, 0, 20)
    assert mx.array_equal(h, arrays["initial_state"]).item()


@pytest.mark.gpu
def test_inside_compile_and_at_any_address(kernel):
    if kernel == "on a CPU":
        pytest.skip("computes at once")
    arrays, given = CASES["bfloat16"]
    names = list(arrays)

    def loss(*values):
        y, h = scan(dict(zip(names, values, strict=True)), kernel, **given)
        return (y.astype(mx.float32) ** 2).sum() + (h**2).sum()

    gradient = mx.grad(loss, argnums=list(range(len(names))))
    # As views that begin one element into their memory.
    moved = [mx.concatenate([mx.zeros(1, v.dtype), v.flatten()])[1:].reshape(v.shape) for v in arrays.values()]
    for one, other in zip(mx.compile(gradient)(*arrays.values()), gradient(*moved), strict=True):
        assert mx.array_equal(one, other).item()


def test_metal_takes_every_trial_of_its_self_test():
    for sample in samples_of(ops.public()["selective_scan"]):
        sizes = [value.size for value in (*sample.drawn.arrays.values(), *sample.positions.values())]
        assert min(sizes) >= LEAST_METAL_SIZE


def test_other_transformations_are_refused(kernel):
    arrays = arguments(1, 9, 8, 3)
    if kernel != "on a CPU":  # where it computes at once, and under vmap there is nothing to compute with
        with pytest.raises((NotImplementedError, ValueError), match="vmap"):  # ours, or MLX's own for what is inside
            mx.eval(mx.vmap(lambda x: scan(arrays | {"x": x}, kernel)[0])(arrays["x"][None]))
    gradient = mx.grad(lambda x: scan(arrays | {"x": x}, kernel)[0].sum())
    with pytest.raises(NotImplementedError, match="first gradient"):
        mx.eval(mx.grad(lambda x: (gradient(x) ** 2).sum())(arrays["x"]))


def test_why_they_cannot_run(monkeypatch):
    available = type("Available", (), {"is_available": staticmethod(lambda: True)})
    monkeypatch.setattr(mx, "cuda", available, raising=False)
    monkeypatch.setattr(mx, "metal", available)
    cuda, metal = (functools.partial(gpu_scan.reason, language) for language in (gpu_scan.CUDA, gpu_scan.METAL))
    assert cuda("cpu") == "it runs on an NVIDIA GPU only"
    assert metal("cpu") == "it runs on an Apple GPU only"
    assert cuda("gpu", mx.int32).startswith("x is int32, and it computes float32")
    assert [cuda("gpu", mx.float32, 256), metal("gpu", mx.float32, 128)] == [None, None]
    assert metal("gpu", mx.float32, 129) == "d_state is 129, and it holds at most 128"
    assert cuda("gpu", mx.float32, 257) == "d_state is 257, and it holds at most 256"
    assert metal("gpu", mx.float32, 3, [mx.zeros(7)]) == "it takes no array of fewer than 8 elements"
    assert cuda("gpu", mx.float32, 3, [mx.zeros(7)]) is None


@pytest.mark.parametrize(("file", "least"), [("selective_scan.h", 40), ("ssd_step.h", 8)])
def test_metal_is_used_in_metals_words_only(file, least):
    """No number of 64 bits that Metal does not know, and every pointer says where it points to."""
    text = gpu.source("metal.h", file)
    code = re.sub(r"//[^\n]*", "", text)
    assert not re.search(r"long long|\bdouble\b|\bunsigned long\b", code)
    words = "GLOBAL|SHARED|LOCAL|device|threadgroup|thread"
    pointers = re.findall(r"[^\n;{(,]*\b(?:float|float2|float4|Element|byte|Vector<N>|Brought)\s*(?:\*|\(\*)", code)
    assert len(pointers) > least
    assert [pointer for pointer in pointers if not re.search(rf"\b({words})\b", pointer)] == []
