"""The native kernels under JAX: what the conformance suite and the tests of transformations do not ask."""

import concurrent.futures
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mamba_core as mc
from mamba_core.backends.native import abi, library
from mamba_core.spec.tolerances import relative_l2, tolerance

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
jnp = jax.numpy
if library.missing():
    pytest.skip(f"no native kernels: {library.missing()}", allow_module_level=True)

from mamba_core.backend import LayerState  # noqa: E402 (after the packages that it needs)
from mamba_core.backends.jax import decoding, programs  # noqa: E402
from mamba_core.backends.jax.mixers import Options, s6  # noqa: E402
from mamba_core.backends.jax.ops.linear import product_of_one  # noqa: E402

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
    kept = f"tensor<{library.count_boundaries(B, L, E, N)}xf32>"
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
    assert backend.available_kernels("tpu")["selective_scan"]["native"] == "it runs on a CPU only"
    assert list(backend.available_kernels("tpu")["selective_scan"])[1:3] == ["pallas", "associative"]
    assert next(iter(backend.available_kernels("cpu")["selective_scan"].items())) == ("native", None)


def python(code: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_the_library_others_take_its_place():
    code = """
        import jax.numpy as jnp, mamba_core as mc
        from mamba_core.backends.jax.ops.selective_scan import kernels
        ones = jnp.ones((1, 3, 2))
        arrays = (ones, ones, -jnp.ones((2, 2)), ones, ones)
        print(kernels("cpu")["native"], mc.selective_scan(*arrays).shape, sep="; ")
        model = mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=8), backend="jax", device="cpu")
        print(model.kernels["selective_scan"], model(jnp.ones((1, 3), int)).logits.shape)
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


def words(*values):
    return np.array(values, np.int64)


def test_a_call_with_other_arguments_is_an_error():
    """Of every kind that the handlers look at, though our own calls never are so."""
    product_of_one(jnp.ones((1, 2)), jnp.ones((3, 2)), transposed=False, kernel="auto")  # registers the handler
    struct = abi.LinearStep(b=1, inputs=2, outputs=3, threads=1)
    x, weight, y = (getattr(abi.LinearStep, name).offset // 8 for name in ("x", "matrix", "y"))
    structs = np.frombuffer(bytes(struct), np.int64).copy()
    structs[[x, weight, y]] = 0, 1, 2
    given = {"structs": structs, "pointers": words(x, weight, y), "count": words(1)}

    def call(attributes):
        result = jax.ShapeDtypeStruct((1, 3), "float32")
        arrays = jnp.ones((1, 2)), jnp.ones((3, 2))
        return jax.block_until_ready(jax.ffi.ffi_call("mamba_linear_step_xla", result)(*arrays, **attributes))

    np.testing.assert_array_equal(call(given), np.full((1, 3), 2.0))
    beyond, below = structs.copy(), structs.copy()
    beyond[y], below[y] = 3, -1
    for wrong in (
        *({name: value for name, value in given.items() if name != missing} for missing in given),
        given | {"structs": structs.astype(np.int32)},
        given | {"count": np.int64(1)},
        given | {"count": words(1, 1)},
        given | {"structs": beyond},
        given | {"structs": below},
        given | {"pointers": words(x, weight, len(structs))},
        given | {"pointers": words(x, weight, -1)},
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: a native kernel was called with other"):
            call(wrong)


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
    assert "no memory for the workspace of a native kernel" in python(code, JAX_PLATFORMS="cpu")


causal_conv = mc.registry.get("jax").op("causal_conv").causal_conv


def conv_arguments(seed=0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"x": (B, L, E), "weight": (E, 3), "bias": (E,), "initial_state": (B, 2, E)}
    return {name: jnp.asarray(rng.normal(size=shape), "float32") for name, shape in shapes.items()}


def conv_loss(arrays, kernel="native", **positions):
    y, h = causal_conv(**arrays, **positions, activation="silu", return_final_state=True, kernel=kernel)
    return (y**2).sum() + (h**3).sum()


def test_the_convolution_has_kernels_of_its_own():
    def kernels(kernel, dtype="float32"):
        x = conv_arguments()["x"].astype(dtype)
        run = jax.jit(lambda x: causal_conv(x, conv_arguments()["weight"], kernel=kernel))
        return "mamba_conv_forward_xla" in run.lower(x).as_text()

    assert kernels("auto") == (jax.default_backend() == "cpu")
    assert kernels("native")
    assert not any(map(kernels, ("shifted", "plain")))
    assert not kernels("auto", "float16")
    with pytest.raises(ValueError, match="no kernel 'abacus'"):
        kernels("abacus")
    with pytest.raises(ValueError, match="x is float16, and it computes"):
        kernels("native", "float16")
    model = mc.build(CONFIG, backend="jax", kernels="chunked")
    assert "mamba_conv" not in jax.jit(lambda ids: model(ids).logits).lower(jnp.ones((1, 5), int)).as_text()


def test_the_convolution_differentiated_twice_and_mapped():
    arrays, direction = conv_arguments(), conv_arguments(1)
    positions = {
        "mask": jnp.asarray(np.random.default_rng(2).random((B, L)) < 0.7),
        "segment_ids": jnp.arange(L)[None].repeat(B, 0) // 7,
    }

    def derivatives(kernel):
        gradient = jax.grad(lambda arrays: conv_loss(arrays, kernel, **positions))
        mapped = jax.vmap(gradient)(jax.tree.map(lambda *pair: jnp.stack(pair), arrays, direction))
        return gradient(arrays), jax.jvp(gradient, (arrays,), (direction,))[1], mapped

    close(derivatives("native"), derivatives("plain"))


CONFIG = mc.MambaConfig(d_model=20, n_layer=3, vocab_size=29, d_state=5, initializer_range=0.5)


def stepping(config=CONFIG, batch=2, **settings):
    """(model, ids (b, 1), state before them, logits and state of the plain operations)."""
    model = mc.build(config, backend="jax", device="cpu", **settings)
    plain = mc.build(config, backend="jax", device="cpu", **settings | {"kernels": "sequential"})
    ids = jnp.arange(2 * batch).reshape(batch, 2) % 29
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda zero: jnp.asarray(rng.normal(size=zero.shape), zero.dtype), plain.init_state(batch))
    return model, ids[:, :1], state, jax.jit(plain)(ids[:, :1], state)


def calls(function, *arguments) -> set[str]:
    """The library's functions of one position that it is compiled to call."""
    text = jax.jit(function).lower(*arguments).as_text()
    return {name for name in ("mamba_steps", "linear_step") if f"mamba_{name}_xla" in text}


BOTH = {"mamba_steps", "linear_step"}


def same(out, wanted, dtype="float32"):
    limit = tolerance(dtype, "node")
    for value, plain in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
        assert (value.shape, value.dtype) == (plain.shape, plain.dtype)
        assert relative_l2(value.astype("float32"), plain.astype("float32")) < limit


fields = st.fixed_dictionaries(
    {
        "d_model": st.integers(1, 40),
        "expand": st.sampled_from((1, 1.5, 2, 3.3)),
        "d_state": st.integers(1, 40),
        "d_conv": st.integers(1, 5),
        "dt_rank": st.integers(1, 20),
        "bias": st.booleans(),
        "conv_bias": st.booleans(),
        "norm_eps": st.sampled_from((1e-5, 0.3)),
        "residual_in_fp32": st.booleans(),
        "tie_embeddings": st.booleans(),
    }
)


# Few, because each compiles anew.
@settings(max_examples=6)
@given(fields, st.integers(1, 8), st.sampled_from(("float32", "bfloat16")), st.sampled_from(("auto", "native")))
def test_a_step_is_that_of_the_plain_operations(fields, batch, dtype, kernels):
    config = mc.MambaConfig(n_layer=2, vocab_size=29, initializer_range=0.5, **fields)
    model, ids, state, wanted = stepping(config, batch, dtype=dtype, kernels=kernels)
    assert calls(model, ids, state) == BOTH
    same(jax.jit(model)(ids, state), wanted, dtype)


def test_a_step_without_jit():
    model, ids, state, wanted = stepping()
    same(model(ids, state), wanted)


def test_a_step_of_the_layers_alone():
    config = mc.MambaConfig(d_model=20, n_layer=3, task="layers")
    model, plain = (mc.build(config, backend="jax", device="cpu", kernels=name) for name in ("auto", "sequential"))
    x, state = jnp.arange(40.0).reshape(2, 1, 20), plain(jnp.ones((2, 3, 20))).state
    assert calls(model, x, state) == {"mamba_steps"}
    same(model(x, state), plain(x, state))


def replaced(model):
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    mixer = model.backbone.layers[1].mixer
    doubled = nnx.eval_shape(lambda: Doubled(20, 80, use_bias=False, rngs=nnx.Rngs(0)))
    doubled.kernel = mixer.in_proj.kernel
    mixer.in_proj = doubled


def adapted(model):
    linear = model.backbone.layers[1].mixer.in_proj
    model.backbone.layers[1].mixer.in_proj = nnx.LoRA(20, 4, 80, base_module=linear, rngs=nnx.Rngs(0))
    model.backbone.layers[1].mixer.in_proj.lora_b[...] += 1.0


def another_product(model):
    linear = model.backbone.layers[1].mixer.in_proj
    linear.dot_general = lambda *arguments, **options: 2 * jax.lax.dot_general(*arguments, **options)


def narrowed(model):
    model.backbone.layers[1].mixer.D = nnx.Param(2 * model.backbone.layers[1].mixer.D[...].astype("bfloat16"))


def another_bias(model):
    mixer = model.backbone.layers[1].mixer
    kernel = mixer.x_proj.kernel
    mixer.x_proj = nnx.Linear(40, 12, rngs=nnx.Rngs(0))
    mixer.x_proj.kernel, mixer.x_proj.bias = kernel, nnx.Param(jnp.ones(12))


def another_block(model):
    class Doubled(type(model.backbone.layers[1])):
        def __call__(self, *arguments):
            residual, state = super().__call__(*arguments)
            return 2 * residual, state

    model.backbone.layers[1].__class__ = Doubled


@pytest.mark.parametrize("change", [replaced, adapted, another_product, narrowed, another_bias, another_block])
def test_a_changed_block_computes_what_it_was_changed_to(change):
    unchanged, ids, state, _ = stepping()
    model, plain = both(change)
    assert ways(model) == ["native_step", "plain", "native_step"]
    assert calls(model, ids, state) == BOTH
    same(model(ids, state), plain(ids, state))
    assert relative_l2(model(ids, state).logits, unchanged(ids, state).logits) > 1e-3


def ways(model) -> list[str]:
    """The way of each run of layers, in a step."""
    return [way for _, _, way, _ in mc.registry.get("jax").explain(model, 2, 1)]


def both(change):
    """The native model and that of the plain operations, both changed."""
    models = [mc.build(CONFIG, backend="jax", device="cpu", kernels=kernels) for kernels in ("auto", "sequential")]
    for model in models:
        change(model)
    return models


def test_each_norm_has_its_own_eps():
    _, ids, state, _ = stepping()
    model, plain = both(lambda model: setattr(model.backbone.layers[1].norm, "eps", 3.0))
    assert calls(model, ids, state) == BOTH
    same(model(ids, state), plain(ids, state))


class Normed(nnx.Module):
    """Mamba-1's mixer, with norms without weight of dt, B and C."""

    def __init__(self, old, eps):
        s6.add_parameters(self, CONFIG, Options("float32", old.kernels, nnx.Rngs(0)))
        nnx.update(self, nnx.state(old))
        self.eps = eps

    def __call__(self, hidden, state, call):
        x, z = s6.project_in(self, hidden, call)
        x, conv = s6.convolve(self, x, state, call)
        dt, B, C = s6.norm_selection(*s6.select(self, x, call), self.eps, call)
        delta, bias = s6.step_sizes(self, dt, call)
        y, ssm = s6.recur(self, x, delta, B, C, z, bias, state, call)
        return self.out_proj(y), LayerState(conv, ssm)

    def native_step(self):
        return s6.native_operands(self, self.eps)


def with_norms(*eps):
    """A change: the mixers of the layers with an eps norm dt, B and C."""

    def change(model):
        for block, of_block in zip(model.backbone.layers, eps, strict=True):
            if of_block is not None:
                block.mixer = Normed(block.mixer, of_block)

    return change


@pytest.mark.parametrize("eps", [(1e-6, 1e-6, 1e-6), (None, 0.3, None), (1e-6, 3.0, 0.01)])
def test_each_mixer_norms_dt_b_and_c_with_its_own_eps(eps):
    """In one call of the library, whether or not the other blocks of the run norm theirs."""
    unchanged, ids, state, _ = stepping()
    model, plain = both(with_norms(*eps))
    assert ways(model) == ["native_step"]
    assert calls(model, ids, state) == BOTH
    wanted = plain(ids, state)
    same(jax.jit(model)(ids, state), wanted)
    assert relative_l2(wanted.logits, unchanged(ids, state).logits) > 1e-3

    def gradient(model):
        return jax.grad(lambda layers: model(ids, state._replace(layers=layers)).logits.var())(state.layers)

    close(gradient(model), gradient(plain), 1e-4)


@pytest.mark.parametrize("eps", [0.0, -1.0, 1e-39])
def test_an_eps_that_says_no_norm_to_the_library_is_left_to_the_plain_way(eps):
    _, ids, state, _ = stepping()
    model, plain = both(with_norms(None, eps, None))
    assert ways(model) == ["native_step", "plain", "native_step"]
    np.testing.assert_allclose(model(ids, state).logits, plain(ids, state).logits, rtol=1e-4, atol=1e-5)


def test_a_subclass_of_a_mixer_that_norms_is_left_to_the_plain_way():
    model, _ = both(with_norms(1e-6, 1e-6, 1e-6))
    model.backbone.layers[0].mixer.__class__ = type("Changed", (Normed,), {})
    assert ways(model) == ["plain", "native_step"]


def test_an_adapted_head_is_called():
    config = mc.MambaConfig(d_model=20, n_layer=1, vocab_size=32, tie_embeddings=False)
    model, ids, state, wanted = stepping(config)
    head = nnx.eval_shape(lambda: nnx.LoRALinear(20, 32, lora_rank=2, use_bias=False, rngs=nnx.Rngs(0)))
    head.kernel = model.lm_head.kernel
    head.lora.lora_a, head.lora.lora_b = nnx.Param(jnp.ones((20, 2))), nnx.Param(jnp.ones((2, 32)))
    model.lm_head = head
    assert calls(model, ids, state) == {"mamba_steps"}
    assert relative_l2(model(ids, state).logits, wanted.logits) > 1e-3


PLAIN = {
    "a mask": lambda model, ids, state: model(ids, state, mask=ids >= 0),
    "segments": lambda model, ids, state: model(ids, state, segment_ids=ids * 0),
    "observed": lambda model, ids, state: model(ids, state, observe=lambda name, value: None),
    "two positions": lambda model, ids, state: model(ids.repeat(2, 1), state),
    "no position": lambda model, ids, state: model(ids[:, :0], state),
}


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
def test_plain_operations_where_a_step_is_not_all(call):
    model, ids, state, _ = stepping()
    assert "mamba_steps" not in calls(lambda ids, state: call(model, ids, state), ids, state)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernels": "chunked"},
        {"dtype": "float16"},
        {"batch": 9},
        {"config": mc.MiniMambaConfig(d_model=20, n_layer=3, vocab_size=29, bias=True)},
    ],
)
def test_plain_operations_for_another_model(settings):
    model, ids, state, wanted = stepping(**settings)
    assert "mamba_steps" not in calls(model, ids, state)
    same(model(ids, state), wanted, settings.get("dtype", "float32"))


def test_gradients_through_a_step_are_those_of_the_plain_operations():
    """Of the parameters and of the state, once and twice."""
    model, ids, state, _ = stepping()
    plain = mc.build(CONFIG, backend="jax", device="cpu", kernels="sequential")

    def gradients(model):
        graph, parameters = nnx.split(model)

        def loss(parameters, layers):
            out = nnx.merge(graph, parameters)(ids, state._replace(layers=layers))
            return (out.logits**2).mean() + sum((layer.ssm**2).mean() for layer in out.state.layers)

        gradient = jax.grad(loss, argnums=(0, 1))
        at = (parameters, state.layers)
        return gradient(*at), jax.jvp(lambda layers: gradient(parameters, layers), at[1:], at[1:])[1]

    close(gradients(model), gradients(plain))


def test_vmap_of_a_step_over_states_and_over_models():
    model, ids, state, _ = stepping()
    other = mc.build(CONFIG, backend="jax", device="cpu", seed=1)
    graph, first = nnx.split(model)
    twice = jax.tree.map(lambda *pair: jnp.stack(pair), first, nnx.split(other)[1])
    states = jax.tree.map(lambda value: jnp.stack([value, value / 2]), state)

    over_states = jax.jit(jax.vmap(lambda state: model(ids, state)))(states)
    over_models = jax.jit(jax.vmap(lambda values: nnx.merge(graph, values)(ids, state)))(twice)
    for index, (its_state, its_model) in enumerate(((state, model), (jax.tree.map(lambda v: v / 2, state), other))):
        close(jax.tree.map(lambda value, index=index: value[index], over_states), model(ids, its_state), 1e-6)
        close(jax.tree.map(lambda value, index=index: value[index], over_models), its_model(ids, state), 1e-6)


def test_an_exported_step_is_that_of_the_plain_operations():
    model, ids, state, wanted = stepping()
    exported = jax.export.export(jax.jit(model), platforms=("cpu", "cuda", "tpu"))(ids, state)
    assert "_xla" not in exported.mlir_module()
    same(exported.call(ids, state), wanted)
    assert "_xla" not in jax.jit(model).trace(ids, state).lower(lowering_platforms=("cuda",)).as_text()

    batch = jax.export.symbolic_shape("b, 1")
    any_batch = jax.export.export(jax.jit(lambda ids: model(ids).logits))(jax.ShapeDtypeStruct(batch, ids.dtype))
    close(any_batch.call(ids), model(ids).logits)

    model = mc.build(CONFIG, backend="jax", device="cpu", kernels="native")
    with pytest.raises(ValueError, match="on a CPU only, and is not exported"):
        jax.export.export(jax.jit(model))(ids, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_copies_neither_weights_nor_states(dtype):
    """Each weight is read once a token, which is all the time that a token takes."""
    model = mc.build(CONFIG, backend="jax", device="cpu", dtype=dtype)
    graph, parameters, others = programs.divided(model)
    methods, policy = programs.methods_in(graph), mc.sampling.Sampling()
    prompts, mask, state = jnp.ones((1, 16), int), jnp.ones((1, 16), bool), model.init_state(1)
    prefilled, _ = decoding._prefill(graph, methods, parameters, others, prompts, mask, state)
    carry = decoding._begin(prefilled, None, None, sampling=policy)
    executable = decoding._advance.lower(
        graph, methods, parameters, others, *decoding._divided(carry), None, 3, sampling=policy
    ).compile()
    compiled = executable.as_text()
    assert all(f"mamba_{name}_xla" in compiled for name in BOTH)
    for value in jax.tree.leaves((parameters, carry.state)):
        if value.ndim >= 2 and value.size > 100:
            made = re.escape(str(list(value.shape)).replace(" ", "")) + r"\S* (copy|transpose|fusion)\("
            assert not re.search(made, compiled), value.shape
    # The state's memory becomes that of the next.
    assert executable.memory_analysis().alias_size_in_bytes == sum(v.nbytes for v in jax.tree.leaves(carry.state))
