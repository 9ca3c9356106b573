"""The native scan under JAX: what the conformance suite and the tests of transformations do not ask."""

import concurrent.futures
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backends import native
from mamba_core.spec.tolerances import relative_l2

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
jnp = jax.numpy
if native.missing():
    pytest.skip(f"no native kernels: {native.missing()}", allow_module_level=True)

B, L, E, N = 2, 70, 10, 5
SHAPES = {"x": (B, L, E), "delta": (B, L, E), "A": (E, N), "B": (B, L, N), "C": (B, L, N), "D": (E,), "z": (B, L, E)}
SHAPES |= {"delta_bias": (E,), "initial_state": (B, E, N)}
KEPT_IN_FLOAT32 = ("A", "D", "delta_bias", "initial_state")


def arguments(dtype="float32", seed=0) -> dict:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    values["A"] = -np.exp(values["A"])
    return {name: jnp.asarray(value, "float32" if name in KEPT_IN_FLOAT32 else dtype) for name, value in values.items()}


def scan(arrays, kernel="native", **positions):
    return mc.selective_scan(**arrays, **positions, delta_softplus=True, return_final_state=True, kernel=kernel)


def loss(arrays, kernel="native", **positions):
    y, h = scan(arrays, kernel, **positions)
    return (y.astype("float32") ** 2).sum() + (h**2).sum()


def close(tree, other, limit=1e-5):
    for one, another in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert relative_l2(one, another) < limit


def test_it_is_what_auto_takes_on_a_cpu():
    text = jax.jit(lambda arrays: scan(arrays, "auto")).lower(arguments()).as_text()
    assert ("mamba_scan_forward_xla" in text) == (jax.default_backend() == "cpu")
    assert "mamba_scan_forward_xla" not in jax.jit(lambda a: scan(a, "auto")).lower(arguments("float16")).as_text()


@pytest.mark.parametrize("shared", [(), ("A", "D", "delta_bias"), tuple(SHAPES)[1:]])
def test_vmap_is_one_after_another_in_values_and_gradients(shared):
    """Also where some arguments are the same for all."""
    first, second = arguments(seed=0), arguments(seed=1)
    elements = [first, {name: first[name] if name in shared else value for name, value in second.items()}]
    axes = {name: None if name in shared else 0 for name in SHAPES}
    stacked = {name: first[name] if name in shared else jnp.stack([first[name], second[name]]) for name in SHAPES}
    mask = jnp.asarray(np.random.default_rng(2).random((B, L)) < 0.7)

    for function in (lambda arrays: scan(arrays, mask=mask), jax.grad(lambda arrays: loss(arrays, mask=mask))):
        results = jax.jit(jax.vmap(function, in_axes=(axes,)))(stacked)
        for index, element in enumerate(elements):
            close(jax.tree.map(lambda value, index=index: value[index], results), function(element), 1e-6)


def test_calls_from_other_threads_at_once():
    """Long enough to overlap."""
    many = [
        {name: jnp.tile(value, (1, 30, 1)) if value.shape[:2] == (B, L) else value for name, value in arrays.items()}
        for arrays in (arguments(seed=seed) for seed in range(8))
    ]
    gradient = jax.jit(jax.grad(loss))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        close(list(pool.map(gradient, many)), [jax.grad(loss)(arrays, "chunked") for arrays in many])


def test_bfloat16_results_and_gradients_have_the_inputs_dtypes():
    arrays = arguments("bfloat16")
    y, h = scan(arrays)
    assert (y.dtype, h.dtype) == ("bfloat16", "float32")
    gradients = jax.grad(loss)(arrays)
    assert {name: str(value.dtype) for name, value in gradients.items()} == {
        name: str(value.dtype) for name, value in arrays.items()
    }
    wanted = jax.grad(loss)({name: value.astype("float32") for name, value in arrays.items()})
    for name, value in gradients.items():
        assert relative_l2(value.astype("float32"), wanted[name]) < 2e-2, name


def test_second_derivatives_are_those_of_its_plain_twin():
    """In reverse mode over reverse, and forward over reverse as `jax.hessian` has it."""
    arrays = arguments()
    direction = arguments(seed=1)["delta"]

    def seconds(kernel):
        gradient = jax.grad(lambda delta: loss(arrays | {"delta": delta}, kernel))
        along = jax.grad(lambda delta: (gradient(delta) * direction).sum())
        return along(arrays["delta"]), jax.jvp(gradient, (arrays["delta"],), (direction,))[1]

    close(seconds("native"), seconds("chunked"))


def test_inputs_of_several_dtypes():
    arrays = arguments() | {"x": arguments()["x"].astype("bfloat16")}
    gradients = jax.grad(loss)(arrays)
    assert gradients["x"].dtype == "bfloat16"
    assert gradients["delta"].dtype == "float32"
    close(gradients["delta"], jax.grad(loss)(arrays, "chunked")["delta"], 1e-2)


def test_boundaries_are_kept_only_for_a_gradient():
    kept = f"tensor<{native.count_boundaries(B, L, E, N)}xf32>"
    assert kept not in jax.jit(scan).lower(arguments()).as_text()
    assert kept in jax.jit(jax.grad(loss)).lower(arguments()).as_text()


def test_it_refuses_what_it_cannot_compute():
    with pytest.raises(ValueError, match="x is float16, and it computes float32 and bfloat16; these can: chunked"):
        scan(arguments("float16"))
    with pytest.raises(ValueError, match="cannot run here"):
        mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=8), backend="jax", dtype="float16", kernels="native")
    with pytest.raises(ValueError, match="on a CPU only, and is not exported"):
        jax.export.export(jax.jit(scan))(arguments())
    with pytest.raises(ValueError, match="on a CPU only, and is not exported"):
        jax.jit(scan).trace(arguments()).lower(lowering_platforms=("cuda",))


def test_other_devices_are_told_why_not():
    backend = mc.registry.get("jax")
    assert backend.kernels("tpu")["native"] == "it runs on a CPU only"
    assert next(iter(backend.kernels("tpu"))) == "associative"
    assert next(iter(backend.kernels("cpu").items())) == ("native", None)


def python(code: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_the_library_others_take_its_place():
    code = """
        import jax.numpy as jnp, mamba_core as mc
        from mamba_core.backends.jax.scan import kernels
        ones = jnp.ones((1, 3, 2))
        arrays = (ones, ones, -jnp.ones((2, 2)), ones, ones)
        print(kernels("cpu")["native"], mc.selective_scan(*arrays).shape, sep="; ")
        model = mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=8), backend="jax", device="cpu")
        print(model.kernels, model(jnp.ones((1, 3), int)).logits.shape)
        try:
            mc.selective_scan(*arrays, kernel="native")
        except ValueError as error:
            print(error)
    """
    why = "switched off by MAMBA_CORE_NATIVE=0"
    assert python(code, MAMBA_CORE_NATIVE="0", JAX_PLATFORMS="cpu").splitlines() == [
        f"{why}; (1, 3, 2)",
        "chunked (1, 3, 8)",
        f"kernel 'native' cannot run here: {why}; these can: chunked, associative, sequential",
    ]


def test_a_call_with_other_arguments_is_an_error():
    """Of every kind that the handlers look at, though our own calls never are so."""
    scan(arguments())  # registers the handler
    given = {"delta_softplus": np.int32(0), "threads": np.int32(1)}
    arrays = list((arguments() | {"mask": jnp.ones((B, L), bool), "restart": jnp.zeros((B, L), bool)}).values())
    results = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((B, L, E), (B, E, N), (0,))]

    def call(arrays, results, attributes):
        return jax.ffi.ffi_call("mamba_scan_forward_xla", results)(*arrays, **attributes)

    assert len(call(arrays, results, given)) == 3
    for wrong in (
        (arrays[:-1], results, given),
        (arrays, results[:-1], given),
        (arrays, results[1:] + results[:1], given),
        ([arrays[0][..., None], *arrays[1:]], results, given),
        ([arrays[0], arrays[1][:, 1:], *arrays[2:]], results, given),
        ([arrays[0], arrays[1].astype("bfloat16"), *arrays[2:]], results, given),
        ([*arrays[:9], arrays[9].astype("float32"), arrays[10]], results, given),
        (arrays, results, {"threads": np.int32(1)}),
        (arrays, results, given | {"threads": np.float32(2)}),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: the native scan was called with other"):
            jax.block_until_ready(call(*wrong))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_no_memory_is_an_error():
    """One channel of four million states: its workspace is 50 times the arrays."""
    code = """
        import resource, jax, jax.numpy as jnp, mamba_core as mc
        ones = jnp.ones((1, 1, 2**22))
        arrays = (ones[..., :1], ones[..., :1], -ones[0], ones, ones)
        run = jax.jit(lambda *arrays: mc.selective_scan(*arrays, kernel="native")).lower(*arrays).compile()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
        try:
            run(*arrays).block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            print(str(error).splitlines()[0])
    """
    assert "no memory for the workspace of the native scan" in python(code, JAX_PLATFORMS="cpu")
