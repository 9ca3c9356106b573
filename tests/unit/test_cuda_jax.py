"""JAX's side of CUDA's scan and convolution, without a GPU: kernels run as C++, and what would launch them is read."""

import re
import types
import zlib

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backends.gpu import causal_conv
from mamba_core.backends.gpu import launch as gpu
from mamba_core.spec.ops import causal_conv as conv_spec
from mamba_core.spec.ops import selective_scan as scan_spec
from mamba_core.spec.tolerances import relative_l2, tolerance
from tests.unit import gpu_on_cpu

jax = pytest.importorskip("jax")
jnp = jax.numpy

from mamba_core.backends.jax.kernels import cuda_conv, cuda_launch, cuda_scan  # noqa: E402 (after the package that it needs)
from mamba_core.backends.jax.ops import causal_conv as jax_conv  # noqa: E402
from mamba_core.backends.jax.ops import selective_scan as jax_scan  # noqa: E402

KEPT_IN_FLOAT32 = ("A", "D", "delta_bias", "initial_state")
MULTIPROCESSORS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=["on a CPU", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel(request):
    """The CUDA kernel by the name of one that is it but for where its launches run, and on a GPU itself."""
    if request.param == "cuda":
        if (why := cuda_scan.reason("gpu")) is not None:
            pytest.skip(why)
        return "cuda"
    return request.getfixturevalue("on_cpu")


@pytest.fixture
def on_cpu(folder, monkeypatch):

    def run(scan, arrays):
        names = [name for name, value in arrays.items() if value is not None]
        dtype = arrays["x"].dtype
        results = {
            name: jax.ShapeDtypeStruct(shape, dtype if name in cuda_scan.ELEMENTS else jnp.float32)
            for name, shape in (scan.shapes | (scan.sums if scan.backward else {})).items()
            if scan.defines.get(cuda_scan.OPTIONAL.get(name), True)
        }

        def host(*values):
            found = gpu_on_cpu.run(scan, dict(zip(names, map(np.asarray, values), strict=True)), folder)
            return {name: found[name] for name in results}

        return jax.pure_callback(host, results, *(arrays[name] for name in names))

    def run_conv(plan, arrays):
        names = [name for name, value in arrays.items() if value is not None]
        results = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "sums" else arrays["x"].dtype)
            for name, shape in plan.shapes.items()
        }

        def host(*values):
            return gpu_on_cpu.run_conv(plan, dict(zip(names, map(np.asarray, values), strict=True)), folder)

        return jax.pure_callback(host, results, *(arrays[name] for name in names))

    monkeypatch.setattr(cuda_scan, "_run", run)
    monkeypatch.setattr(cuda_conv, "_run", run_conv)
    for kernels in (cuda_scan, cuda_conv):
        monkeypatch.setattr(kernels, "CUDA", cuda_scan.CUDA._replace(platform="cpu"))
        monkeypatch.setattr(kernels, "device", lambda: types.SimpleNamespace(core_count=MULTIPROCESSORS))
    monkeypatch.setitem(jax_scan.KERNELS, "on a CPU", cuda_scan.beside(jax_scan.associative))
    monkeypatch.setitem(jax_conv.KERNELS, "on a CPU", cuda_conv.beside(jax_conv.shifted))
    with jax.default_device(jax.devices("cpu")[0]):
        yield "on a CPU"


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
    arrays["A"] = -np.exp(arrays["A"])
    return {
        name: np.asarray(jnp.asarray(value, "float32" if name in KEPT_IN_FLOAT32 else dtype))
        for name, value in arrays.items()
    }


def positions(b, l) -> dict:
    rng = np.random.default_rng(1)
    return {"mask": rng.random((b, l)) < 0.7, "segment_ids": np.cumsum(rng.random((b, l)) < 0.1, 1)}


def scan(arrays, kernel="cuda", **given):
    return mc.selective_scan(**arrays, **given, return_final_state=True, kernel=kernel)


CASES = {
    "all options": (arguments(2, 35, 20, 16), {"delta_softplus": True, **positions(2, 35)}),
    "no option": (arguments(1, 33, 8, 3, without=("D", "z", "delta_bias", "initial_state")), {}),
    "in chunks": (arguments(1, 500, 9, 16), {"delta_softplus": True, **positions(1, 500)}),
    "bfloat16": (arguments(1, 35, 20, 16, "bfloat16"), {"delta_softplus": True}),
    "float16": (arguments(1, 35, 8, 30, "float16", without=("z",)), {"delta_softplus": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_recurrence(kernel, case):
    arrays, given = CASES[case]
    dtype = arrays["x"].dtype.name
    jax_arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
    if dtype == "float32":  # without the softplus a step must be positive
        jax_arrays["delta"] = abs(jax_arrays["delta"])
    arrays = {name: np.asarray(value) for name, value in jax_arrays.items()}
    outputs, pullback = jax.vjp(lambda arrays: scan(arrays, kernel, **given), jax_arrays)
    wanted = scan_spec.selective_scan(**arrays, **given, return_final_state=True)
    for value, other in zip(outputs, wanted, strict=True):
        assert relative_l2(value.astype("float32"), other) < tolerance(dtype)
    rng = np.random.default_rng(2)
    cotangents = tuple(jnp.asarray(rng.normal(size=value.shape), value.dtype) for value in outputs)
    gradients = pullback(cotangents)[0]
    wanted = scan_spec.selective_scan_vjp(*map(np.asarray, cotangents), **arrays, **given)
    for name, other in wanted.items():
        assert gradients[name].dtype == jax_arrays[name].dtype
        assert relative_l2(gradients[name].astype("float32"), other) < tolerance(dtype, "gradient"), name


def test_the_case_in_chunks_has_several():
    arrays, _ = CASES["in chunks"]
    sizes = (*arrays["x"].shape, arrays["A"].shape[1])
    plan = gpu.Scan(*sizes, "float32", frozenset(), False, True, multiprocessors=MULTIPROCESSORS)
    assert plan.chunks > 2


def test_vmap_and_a_second_derivative(kernel):
    pairs = [{name: jnp.asarray(value) for name, value in arguments(1, 9, 8, 3, seed=seed).items()} for seed in (0, 1)]
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *pairs)

    def loss(arrays, name):
        y, h = scan(arrays, name, delta_softplus=True)
        return (y**2).sum() + (h**2).sum()

    gradients = jax.vmap(jax.grad(lambda arrays: loss(arrays, kernel)))(stacked)
    for index, arrays in enumerate(pairs):
        for name, wanted in jax.grad(lambda arrays: loss(arrays, "chunked"))(arrays).items():
            assert relative_l2(gradients[name][index], wanted) < 1e-5, name

    def second(name):
        gradient = jax.grad(lambda delta: loss(pairs[0] | {"delta": delta}, name))
        return jax.grad(lambda delta: (gradient(delta) * pairs[1]["delta"]).sum())(pairs[0]["delta"])

    assert relative_l2(second(kernel), second("chunked")) < 1e-5


def test_mixed_dtypes_and_no_positions(kernel):
    arrays = {name: jnp.asarray(value) for name, value in arguments(1, 9, 8, 3).items()}
    mixed = scan(arrays | {"x": arrays["x"].astype("bfloat16")}, kernel)
    assert [value.dtype for value in mixed] == ["bfloat16", "float32"]
    empty = {
        name: value[:, :0] if value.ndim == 3 and name != "initial_state" else value for name, value in arrays.items()
    }
    y, h = scan(empty, kernel)
    assert y.shape == (1, 0, 8)
    np.testing.assert_array_equal(h, arrays["initial_state"])


def test_the_same_bits_every_time(kernel):
    arrays = {name: jnp.asarray(value) for name, value in CASES["in chunks"][0].items()}
    run = jax.jit(jax.grad(lambda arrays: scan(arrays, kernel, delta_softplus=True)[0].sum()))
    jax.tree.map(np.testing.assert_array_equal, run(arrays), run(arrays))


def conv_arguments(b, l, e, k, dtype="float32", without=(), seed=0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"x": (b, l, e), "weight": (e, k), "bias": (e,), "initial_state": (b, k - 1, e)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items() if name not in without}


def conv(arrays, kernel="cuda", **given):
    causal_conv = mc.registry.get("jax").op("causal_conv").causal_conv
    return causal_conv(**arrays, activation="silu", **given, return_final_state=True, kernel=kernel)


SEGMENTS = {"segment_ids": positions(2, 40)["segment_ids"]}
CONV_CASES = {
    "segments": (conv_arguments(2, 40, 8, 4), SEGMENTS),
    "no option": (conv_arguments(2, 40, 7, 3, without=("bias", "initial_state")), {}),
    "bfloat16": (conv_arguments(2, 40, 12, 4, "bfloat16"), SEGMENTS),
    "a mask": (conv_arguments(2, 40, 8, 4), positions(2, 40)),
    "one tap": (conv_arguments(2, 40, 8, 1), SEGMENTS),
    "five taps": (conv_arguments(2, 40, 8, 5), SEGMENTS),
    "no positions": (conv_arguments(2, 0, 8, 4), {}),
}
# Of them those that the kernel leaves to its twin.
TWINS = ("a mask", "one tap", "five taps", "no positions")


@pytest.mark.parametrize("case", CONV_CASES)
def test_values_and_gradients_are_those_of_the_convolution(kernel, case):
    arrays, given = CONV_CASES[case]
    dtype = arrays["x"].dtype.name
    outputs, pullback = jax.vjp(lambda arrays: conv(arrays, kernel, **given), arrays)
    numpy_arrays = {name: np.asarray(value) for name, value in arrays.items()}
    wanted = conv_spec.causal_conv(**numpy_arrays, **given, activation="silu", return_final_state=True)
    for value, other in zip(outputs, wanted, strict=True):
        assert value.dtype == dtype
        assert relative_l2(value.astype("float32"), other) < tolerance(dtype)
    rng = np.random.default_rng(2)
    cotangents = tuple(jnp.asarray(rng.normal(size=value.shape), dtype) for value in outputs)
    gradients = pullback(cotangents)[0]
    wanted = conv_spec.causal_conv_vjp(*map(np.asarray, cotangents), **numpy_arrays, **given, activation="silu")
    for name, other in wanted.items():
        assert gradients[name].dtype == arrays[name].dtype
        assert relative_l2(gradients[name].astype("float32"), other) < tolerance(dtype, "gradient"), name


def test_the_convolution_mapped_and_differentiated_twice(kernel):
    pairs = [conv_arguments(1, 9, 8, 4, seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *pairs)

    def loss(arrays, name):
        y, state = conv(arrays, name)
        return (y**2).sum() + (state**3).sum()

    gradients = jax.vmap(jax.grad(lambda arrays: loss(arrays, kernel)))(stacked)
    for index, arrays in enumerate(pairs):
        for name, wanted in jax.grad(lambda arrays: loss(arrays, "shifted"))(arrays).items():
            assert relative_l2(gradients[name][index], wanted) < 1e-5, name

    def second(name):
        gradient = jax.grad(lambda x: loss(pairs[0] | {"x": x}, name))
        return jax.grad(lambda x: (gradient(x) * pairs[1]["x"]).sum())(pairs[0]["x"])

    assert relative_l2(second(kernel), second("shifted")) < 1e-5


def test_the_same_bits_of_the_convolution_every_time(kernel):
    run = jax.jit(jax.grad(lambda arrays: conv(arrays, kernel, **SEGMENTS)[0].sum()))
    arrays, _ = CONV_CASES["segments"]
    jax.tree.map(np.testing.assert_array_equal, run(arrays), run(arrays))


# --- what is launched ------------------------------------------------------------------------------------------------


def fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a protobuf message."""
    found, at = [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        size = varint()
        if key & 7 == 2:
            found.append((key >> 3, message[at : at + size]))
            at += size
        else:
            found.append((key >> 3, size))
    return found


@pytest.fixture
def described(monkeypatch):
    """A GPU that is none, and a compiler that only says what it was asked."""
    asked = []
    monkeypatch.setattr(cuda_launch, "device", lambda: types.SimpleNamespace(compute_capability="9.0"))
    for kernels in (cuda_scan, cuda_conv):
        monkeypatch.setattr(kernels, "device", lambda: types.SimpleNamespace(core_count=MULTIPROCESSORS))
    compiler = types.SimpleNamespace(
        compile_source=lambda *given: asked.append(given) or b"image", missing=lambda: None
    )
    for kernels in (cuda_scan, cuda_conv):
        monkeypatch.setattr(kernels, "nvrtc", compiler)
    return asked


def lowered(function, arrays):
    return jax.jit(function).trace(arrays).lower(lowering_platforms=("cuda",))


def calls(text) -> list[tuple[str, list[str], list, dict]]:
    """(result, operands, fields of the call, fields of the kernel) of each launch."""
    found = []
    for line in text.splitlines():
        if cuda_launch.TARGET not in line:
            continue
        operands = line.split(f"@{cuda_launch.TARGET}(")[1].split(")")[0].split(", ")
        opaque = line.split('opaque = "')[1].split('"}')[0]
        # As MLIR prints bytes.
        raw, at = bytearray(), 0
        while at < len(opaque):
            if opaque[at] != "\\":
                raw.append(ord(opaque[at]))
                at += 1
            elif opaque[at + 1] == "\\":
                raw.append(ord("\\"))
                at += 2
            else:
                raw.append(int(opaque[at + 1 : at + 3], 16))
                at += 3
        call = fields(dict(fields(zlib.decompress(bytes(raw))))[1])
        found.append((line.split()[0], operands, call, dict(fields(dict(call)[1]))))
    return found


@pytest.mark.parametrize("cubin", [True, False])
def test_every_launch_gives_a_kernel_its_parameters(described, monkeypatch, cubin):
    monkeypatch.setattr(cuda_launch, "takes_cubin", lambda: cubin)
    monkeypatch.setattr(cuda_scan, "takes_cubin", lambda: cubin)
    arrays, given = CASES["in chunks"]
    made = calls(lowered(jax.grad(lambda arrays: scan(arrays, **given)[0].sum()), arrays).as_text())
    sizes, options = (*arrays["x"].shape, arrays["A"].shape[1]), frozenset(gpu.OPTIONS)
    forward = gpu.Scan(*sizes, "float32", options, False, True, MULTIPROCESSORS, keep=True)
    backward = gpu.Scan(*sizes, "float32", options, False, True, MULTIPROCESSORS, backward=True)
    steps = [(forward, step) for step in forward.launches]
    steps += [(backward, step) for step in (*backward.launches, backward.adding_up)]
    # Of each the arrays that it reads, absent ones apart.
    assert [len(operands) for _, operands, *_ in made] == [11, 4, 11, 12, 4, 13, 4]
    for (combined, *_), (_, operands, *_), step in ((made[1], made[2], steps[2][1]), (made[4], made[5], steps[5][1])):
        read = [name for name in step.arrays if name != "dy" or len(operands) == 13]
        assert operands[read.index("begin")] == combined
    for (_, _, call, kernel), (plan, step) in zip(made, steps, strict=True):
        assert (kernel[1].decode(), kernel[2] * 32, kernel[3]) == (step.kernel, step.threads, step.shared)
        assert [value for number, value in call if number in (2, 3, 4)] == [step.blocks, 1, 1]
        assert kernel[6] == 90
        parameters = [fields(value)[0] for number, value in call if number == 5]
        pointers, numbers = parameters[: len(step.arrays)], parameters[len(step.arrays) :]
        # A pointer is an array of 16 bytes' alignment, or null where there is no such array.
        absent = [name for name, value in zip(step.arrays, pointers, strict=True) if value == (6, 0)]
        assert absent == (["dy"] if step.strided and not plan.backward else [])
        assert {value for value in pointers if value[0] == 1} == {(1, bytes([2 << 3, 16]))}
        wanted = [(3, size) for size in plan.sizes(step)]
        if step.strided:
            _, l, e, n = sizes
            own = {"B": n, "C": n} | ({} if plan.backward else {"dy": 0})
            widths = [own.get(name, e) for name in gpu.SEQUENCES]
            wanted += [(5, stride) for width in widths for stride in (l * width, width)]
        assert numbers == wanted
        assert (kernel.get(11) is not None) == cubin
        assert (kernel[4] == b"image") == (not cubin)
    assert {asked[2:] for asked in described} == {("sm_90", "CUBIN" if cubin else "PTX")}


def test_the_array_that_is_updated_is_a_result(described):
    arrays, given = CASES["in chunks"]
    text = lowered(lambda arrays: scan(arrays, **given), arrays).as_text()
    line = next(line for line in text.splitlines() if 'name = "combine_chunks"' in line)
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 3" in line


def test_auto_takes_it_on_cuda_and_its_twin_in_an_exported_module(described, monkeypatch):
    monkeypatch.setattr(cuda_scan, "reason", lambda device, *_: None if device == "gpu" else "not here")
    arrays, given = CASES["all options"]

    def run(arrays):
        return scan(arrays, "auto", **given)

    assert cuda_launch.TARGET in lowered(run, arrays).as_text()
    assert cuda_launch.TARGET not in jax.export.export(jax.jit(run), platforms=["cuda"])(arrays).mlir_module()
    with pytest.raises(ValueError, match="kernel 'cuda' runs on an NVIDIA GPU only, and is not exported"):
        jax.export.export(jax.jit(lambda arrays: scan(arrays, **given)), platforms=["cuda"])(arrays)
    with pytest.raises(ValueError, match="kernel 'cuda' runs on an NVIDIA GPU only"):
        jax.jit(lambda arrays: scan(arrays, **given)).trace(arrays).lower(lowering_platforms=("cpu",))


def test_states_are_kept_only_for_a_gradient(described):
    arrays, given = CASES["no option"]
    kept = "tensor<1x3x8x4xf32>"
    assert kept not in lowered(lambda arrays: scan(arrays, **given), arrays).as_text()
    assert kept in lowered(jax.grad(lambda arrays: scan(arrays, **given)[0].sum()), arrays).as_text()


def test_why_it_cannot_run(described):
    assert cuda_scan.reason("cpu") == "it runs on an NVIDIA GPU only"
    assert cuda_scan.reason("gpu", "float64").startswith("x is float64, and it computes float32")
    assert cuda_scan.reason("gpu", "float32", 257) == "d_state is 257, and it holds at most 256"
    assert cuda_scan.reason("gpu", "float32", 256) is None
    backend = mc.registry.get("jax")
    assert next(iter(backend.available_kernels("gpu")["selective_scan"])) == "cuda"


def test_without_a_gpu_it_is_refused():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="kernel 'cuda' cannot run here"):
        scan({name: jnp.asarray(value) for name, value in CASES["no option"][0].items()})


@pytest.mark.parametrize("cubin", [True, False])
@pytest.mark.parametrize("case", ["segments", "no option"])
def test_every_launch_gives_the_convolution_its_parameters(described, monkeypatch, cubin, case):
    monkeypatch.setattr(cuda_launch, "takes_cubin", lambda: cubin)
    monkeypatch.setattr(cuda_conv, "takes_cubin", lambda: cubin)
    arrays, given = CONV_CASES[case]
    made = calls(lowered(jax.value_and_grad(lambda arrays: conv(arrays, **given)[0].sum()), arrays).as_text())
    options = {"SILU", *(["HAS_RESTART", "HAS_BIAS"] if case == "segments" else [])}
    sizes = (*arrays["x"].shape, arrays["weight"].shape[1], "float32", frozenset(options), MULTIPROCESSORS)
    plans = [causal_conv.Conv(*sizes), causal_conv.Conv(*sizes, backward=True)]
    absent = [] if case == "segments" else ["bias", "restart"]
    for (_, operands, call, kernel), plan in zip(made, plans, strict=True):
        names = causal_conv.LAUNCHES[plan.kernel]
        assert kernel[1].decode() == plan.kernel
        assert (kernel[2] * 32, kernel[3]) == (plan.launch.threads, 0)
        assert [value for number, value in call if number in (2, 3, 4)] == [plan.launch.blocks, 1, 1]
        parameters = [fields(value)[0] for number, value in call if number == 5]
        pointers, numbers = parameters[: len(names)], parameters[len(names) :]
        assert [name for name, value in zip(names, pointers, strict=True) if value == (6, 0)] == absent
        assert numbers == [(3, size) for size in plan.sizes]
        assert len(operands) == len(names) - len(plan.shapes) - len(absent)
    assert {asked[0] for asked in described} == {causal_conv.conv_source()}
    assert [dict(asked[1]) for asked in described] == [plan.defines for plan in plans]
    assert {asked[2:] for asked in described} == {("sm_90", "CUBIN" if cubin else "PTX")}


def test_the_convolutions_arrays_are_in_the_kernels_order(described):
    arrays, given = CONV_CASES["segments"]
    text = lowered(jax.value_and_grad(lambda arrays: conv(arrays, **given)[0].sum()), arrays).as_text()
    plan = causal_conv.Conv(2, 40, 8, 4, "float32", frozenset(), MULTIPROCESSORS, backward=True)
    shapes = {"x": "2x40x8xf32", "taps": "4x8xf32", "bias": "8xf32", "state": "2x3x8xf32", "restart": "2x40xi1"}
    shapes |= dict.fromkeys(("y", "dy", "dx"), shapes["x"])
    shapes |= dict.fromkeys(("final_state", "dfinal_state", "dstate"), shapes["state"])
    shapes["sums"] = f"2x{plan.chunks}x5x8xf32"
    for kernel, names in causal_conv.LAUNCHES.items():
        line = next(line for line in text.splitlines() if f'name = "{kernel}"' in line)
        signature = line.rpartition(" : ")[2]
        assert re.findall(r"tensor<(\w+)>", signature) == [shapes[name] for name in names]


@pytest.mark.parametrize("case", TWINS)
def test_what_the_convolutions_kernel_does_not_hold_is_its_twins(described, case):
    arrays, given = CONV_CASES[case]
    assert cuda_launch.TARGET not in lowered(lambda arrays: conv(arrays, **given), arrays).as_text()


def test_auto_takes_the_convolution_on_cuda_and_its_twin_in_an_exported_module(described, monkeypatch):
    monkeypatch.setattr(cuda_scan, "reason", lambda device, *_: None if device == "gpu" else "not here")
    arrays, given = CONV_CASES["segments"]

    def run(arrays):
        return conv(arrays, "auto", **given)

    def named(arrays):
        return conv(arrays, **given)

    assert cuda_launch.TARGET in lowered(run, arrays).as_text()
    assert cuda_launch.TARGET not in jax.jit(run).trace(arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert cuda_launch.TARGET not in lowered(lambda arrays: conv(arrays, "shifted", **given), arrays).as_text()
    assert cuda_launch.TARGET not in jax.export.export(jax.jit(run), platforms=["cuda"])(arrays).mlir_module()
    with pytest.raises(ValueError, match="kernel 'cuda' runs on an NVIDIA GPU only, and is not exported"):
        jax.export.export(jax.jit(named), platforms=["cuda"])(arrays)
    with pytest.raises(ValueError, match="kernel 'cuda' runs on an NVIDIA GPU only"):
        jax.jit(named).trace(arrays).lower(lowering_platforms=("cpu",))
