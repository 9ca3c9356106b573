"""JAX's transformations on the model as it comes."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.call import Call
from mamba_core.spec.tolerances import relative_l2
from tests.unit.transforms import CONFIG, MASK, SEGMENTS, plain, scan_arguments

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
export = pytest.importorskip("jax.export")
jnp = jax.numpy

PLATFORMS = ("cpu", "cuda", "tpu")


def close(tree, other, limit=1e-5):
    """Whether two trees of arrays agree, each array to a relative L2 error."""
    for one, another in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert relative_l2(one, another) < limit


def loss(model, ids):
    return (model(ids).logits ** 2).sum()


def stack(*trees):
    return jax.tree.map(lambda *values: jnp.stack(values), *trees)


def test_jit_and_grad():
    model, ids, logits = plain("jax")
    assert relative_l2(nnx.jit(lambda model, ids: model(ids).logits)(model, ids), logits) < 1e-6
    close(nnx.jit(nnx.grad(loss))(model, ids), nnx.grad(loss)(model, ids))


def test_eval_shape():
    model, ids, _ = plain("jax")
    graph, parameters = nnx.split(model)
    shapes = jax.eval_shape(lambda parameters, ids: nnx.merge(graph, parameters)(ids), parameters, ids)
    assert jax.tree.map(lambda value: (value.shape, value.dtype), shapes) == jax.tree.map(
        lambda value: (value.shape, value.dtype), model(ids)
    )


def test_remat():
    model, ids, _ = plain("jax")
    graph, parameters = nnx.split(model)
    gradients = nnx.grad(loss)(model, ids)
    close(jax.grad(jax.checkpoint(lambda parameters: loss(nnx.merge(graph, parameters), ids)))(parameters), gradients)
    close(nnx.grad(nnx.remat(loss))(model, ids), gradients)


def test_remat_of_blocks_keeps_less_for_the_gradient():
    config = mc.MambaConfig(d_model=16, n_layer=6, vocab_size=16)
    model, ids = mc.build(config, backend="jax"), jnp.zeros((1, 512), jnp.int32)

    def scratch(remat):
        """Bytes beside the arguments and the results."""
        model.remat = remat
        graph, parameters = nnx.split(model)
        gradient = jax.jit(jax.grad(lambda parameters: loss(nnx.merge(graph, parameters), ids)))
        return gradient.lower(parameters).compile().memory_analysis().temp_size_in_bytes

    assert scratch(True) < scratch(False) / 2


def test_vmap_over_rows_states_models_and_gradients():
    model, ids, _ = plain("jax")
    graph, parameters = nnx.split(model)
    mask, segments = jnp.asarray(MASK), jnp.asarray(SEGMENTS)

    def row(ids, mask, segments):
        return model(ids[None], mask=mask[None], segment_ids=segments[None]).logits[0]

    close(jax.jit(jax.vmap(row))(ids, mask, segments), model(ids, mask=mask, segment_ids=segments).logits, 1e-6)
    states = [model(ids[:, :length]).state for length in (3, 20)]
    outputs = jax.jit(jax.vmap(lambda state: model(ids, state)))(stack(*states))
    close(outputs, stack(*(model(ids, state) for state in states)), 1e-6)
    models = [mc.build(CONFIG, backend="jax", seed=seed) for seed in range(3)]
    stacked = stack(*(nnx.split(other)[1] for other in models))
    outputs = jax.jit(jax.vmap(lambda parameters: nnx.merge(graph, parameters)(ids).logits))(stacked)
    close(outputs, jnp.stack([other(ids).logits for other in models]), 1e-6)
    gradient = jax.jit(jax.grad(lambda parameters, ids: loss(nnx.merge(graph, parameters), ids)))
    samples = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(parameters, ids[:, None])
    close(samples, stack(*(gradient(parameters, ids[index : index + 1]) for index in range(len(ids)))))


def test_scan_over_layers_in_values_and_gradients():
    """The blocks' parameters and states stacked, and one block compiled for all."""
    model, ids, _ = plain("jax")
    before = model(ids[:, :7]).state
    graph = nnx.split(model.backbone.layers[0])[0]

    def scanned(model):
        def layer(residual, inputs):
            parameters, state = inputs
            return nnx.merge(graph, parameters)(residual, state, Call())

        blocks = stack(*(nnx.split(block)[1] for block in model.backbone.layers))
        residual = model.backbone.embeddings(ids)
        residual, after = jax.lax.scan(layer, residual, (blocks, stack(*before.layers)))
        return model.head(model.backbone.norm_f(residual)), after

    logits, after = scanned(model)
    wanted = model(ids, before)
    close((logits, after), (wanted.logits, stack(*wanted.state.layers)), 1e-6)
    gradients = nnx.grad(lambda model: (scanned(model)[0] ** 2).sum())(model)
    close(gradients, nnx.grad(lambda model: (model(ids, before).logits ** 2).sum())(model))


def test_optimizer():
    model, ids, _ = plain("jax")
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, ids):
        def loss(model):
            logits = model(ids[:, :-1]).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer, ids)) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("kernel", ["auto", "chunked", "associative", "sequential"])
def test_scan_lowers_for_cpu_cuda_and_tpu(kernel):
    def loss(x, delta, A, B, C):
        y, h = mc.selective_scan(x, delta, A, B, C, delta_softplus=True, return_final_state=True, kernel=kernel)
        return (y**2).sum() + h.sum()

    shapes = {"x": (2, 300, 8), "delta": (2, 300, 8), "A": (8, 4), "B": (2, 300, 4), "C": (2, 300, 4)}
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes.values()]
    lowered = export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))), platforms=PLATFORMS)(*arrays)
    assert set(lowered.platforms) == set(PLATFORMS)


def exported(function, *arguments):
    """The function lowered for all platforms, written to bytes and read back."""
    pytest.importorskip("flatbuffers")
    lowered = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert tuple(lowered.platforms) == PLATFORMS
    return export.deserialize(lowered.serialize())


def test_export_of_the_model_with_a_state():
    """Parameters and state go in as leaves, for which the file needs no types of flax or ours."""
    model, ids, _ = plain("jax")
    graph, parameters = nnx.split(model)
    state = model(ids[:, :7]).state
    leaves, tree = jax.tree.flatten((parameters, state))

    def forward(leaves, ids):
        parameters, state = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(nnx.merge(graph, parameters)(ids, state))

    close(exported(forward, leaves, ids).call(leaves, ids), model(ids, state), 1e-6)


def test_export_of_the_gradient():
    model, ids, _ = plain("jax")
    graph, parameters = nnx.split(model)
    leaves, tree = jax.tree.flatten(parameters)

    def gradient(leaves, ids):
        return jax.grad(lambda leaves: loss(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), ids))(leaves)

    close(exported(gradient, leaves, ids).call(leaves, ids), nnx.grad(loss)(model, ids))


@pytest.mark.parametrize(("kernels", "shape"), [("auto", "b, 20"), ("sequential", "b, l")])
def test_export_of_any_batch_and_for_sequential_any_length(kernels, shape):
    model, ids, logits = plain("jax", kernels=kernels)
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), ids.dtype)
    forward = exported(lambda ids: model(ids).logits, symbolic)
    assert relative_l2(forward.call(ids), logits) < 1e-6
    ids = ids[:1] if kernels == "auto" else ids[:1, :9]
    assert relative_l2(forward.call(ids), model(ids).logits) < 1e-6


def test_second_derivative_of_every_kernel():
    """Against differences of the first, in float32."""
    x, delta, A, B, C = (value.astype(np.float32) for value in scan_arguments().values())
    direction = np.random.default_rng(1).normal(size=delta.shape).astype(np.float32)

    def gradient(delta, kernel):
        def loss(delta):
            y = mc.selective_scan(jnp.asarray(x), delta, -np.exp(A), B, C, delta_softplus=True, kernel=kernel)
            return (y**2).sum()

        return jax.grad(loss)(delta)

    for kernel in (
        name for name, reason in registry.get("jax").available_kernels()["selective_scan"].items() if reason is None
    ):
        second = jax.grad(lambda delta, kernel=kernel: (gradient(delta, kernel) * direction).sum())(delta)
        step = 1e-2 * direction
        difference = (gradient(delta + step, kernel) - gradient(delta - step, kernel)) / 2e-2
        # The Hessian is symmetric, so that along the direction both are the same product.
        assert relative_l2(second, difference) < 1e-3, kernel


@pytest.mark.parametrize("kernels", ["auto", "sequential"])
def test_forward_mode_is_refused_by_jax(kernels):
    """Its error names forward mode: the convolution and the fast scans have gradients by hand."""
    model, ids, _ = plain("jax", kernels=kernels)
    graph, parameters = nnx.split(model)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda parameters: loss(nnx.merge(graph, parameters), ids), (parameters,), (parameters,))
