"""Each framework's own transformations on the model as it comes."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.spec.tolerances import relative_l2

CONFIG = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=29, d_state=4, initializer_range=0.3)
IDS = np.random.default_rng(0).integers(0, 29, (2, 20)).astype(np.int32)


def plain(name):
    """(model, ids, logits) of a backend, without any transformation."""
    if missing := registry.missing_packages(name):
        pytest.skip(f"{', '.join(missing)} not installed")
    backend = registry.get(name)
    model = mc.build(CONFIG, backend=name)
    ids = backend.from_numpy(IDS, device=model.device)
    return model, ids, backend.to_numpy(model(ids).logits)


def test_torch_compile_fullgraph_forward_and_backward():
    torch = pytest.importorskip("torch")
    model, ids, logits = plain("torch")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(ids)
    assert relative_l2(out.logits.detach().numpy(), logits) < 1e-6
    out.logits.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert relative_l2(gradient, parameter.grad) < 1e-5
    more = compiled(ids[:, :5], out.state)
    assert relative_l2(more.logits.detach(), model(ids[:, :5], out.state).logits.detach()) < 1e-6


def test_torch_autocast_keeps_the_recurrence_in_float32():
    torch = pytest.importorskip("torch")
    model, ids, logits = plain("torch")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
    assert relative_l2(out.logits.detach().float(), logits) < 2e-2
    assert out.state.layers[0].ssm.dtype == torch.float32
    out.logits.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_torch_module_conveniences():
    torch = pytest.importorskip("torch")
    model, ids, _ = plain("torch")
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    half = mc.build(CONFIG, backend="torch", device="cpu").to(torch.bfloat16)
    kept = {name for name, value in half.named_parameters() if value.dtype == torch.float32}
    assert {name.rpartition("mixer.")[2] for name in kept} == {"A_log", "D", "dt_proj.bias"}
    assert half.dtype == "bfloat16"
    wanted = mc.build(CONFIG, backend="torch", device="cpu", dtype="bfloat16")(ids.cpu()).logits
    assert torch.equal(half(ids.cpu()).logits, wanted)


def test_torch_second_derivative():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 5, 2), "delta": (1, 5, 2), "A": (2, 3), "B": (1, 5, 3), "C": (1, 5, 3)}
    arrays = [torch.tensor(rng.normal(size=shape), requires_grad=True) for shape in shapes.values()]

    def run(*arrays, kernel="sequential"):
        x, delta, A, B, C = arrays
        return mc.selective_scan(x, delta, -A.exp(), B, C, delta_softplus=True, kernel=kernel)

    assert torch.autograd.gradgradcheck(run, arrays)
    first = torch.autograd.grad(run(*arrays, kernel="chunked").sum(), arrays[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="sequential"):
        first.sum().backward()


def test_jax_jit_grad_vmap_and_split():
    jax = pytest.importorskip("jax")
    nnx = pytest.importorskip("flax.nnx")
    model, ids, logits = plain("jax")
    assert relative_l2(nnx.jit(lambda model, ids: model(ids).logits)(model, ids), logits) < 1e-6

    def loss(model, ids):
        return (model(ids).logits ** 2).sum()

    gradients = nnx.jit(nnx.grad(loss))(model, ids)
    plainly = nnx.grad(loss)(model, ids)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(plainly), strict=True):
        assert relative_l2(one, other) < 1e-5
    graph, state = nnx.split(model)
    rows = jax.vmap(lambda row: nnx.merge(graph, state)(row[None]).logits[0])(ids)
    assert relative_l2(rows, logits) < 1e-6
    remat = jax.grad(jax.checkpoint(lambda state: loss(nnx.merge(graph, state), ids)))(state)
    for one, other in zip(jax.tree.leaves(remat), jax.tree.leaves(plainly), strict=True):
        assert relative_l2(one, other) < 1e-5
    shapes = jax.eval_shape(lambda state: nnx.merge(graph, state)(ids), state)
    assert shapes.logits.shape == logits.shape


def test_jax_optimizer():
    optax = pytest.importorskip("optax")
    nnx = pytest.importorskip("flax.nnx")
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
def test_jax_lowers_for_cpu_cuda_and_tpu(kernel):
    jax = pytest.importorskip("jax")
    from jax import export

    def loss(x, delta, A, B, C):
        y, h = mc.selective_scan(x, delta, A, B, C, delta_softplus=True, return_final_state=True, kernel=kernel)
        return (y**2).sum() + h.sum()

    shapes = {"x": (2, 300, 8), "delta": (2, 300, 8), "A": (8, 4), "B": (2, 300, 4), "C": (2, 300, 4)}
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes.values()]
    lowered = export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))), platforms=["cpu", "cuda", "tpu"])(*arrays)
    assert set(lowered.platforms) == {"cpu", "cuda", "tpu"}


def test_jax_second_derivative_of_every_kernel():
    """Against differences of the first, in float32."""
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 5, 2), "delta": (1, 5, 2), "A": (2, 3), "B": (1, 5, 3), "C": (1, 5, 3)}
    x, delta, A, B, C = (rng.normal(size=shape).astype(np.float32) for shape in shapes.values())
    direction = rng.normal(size=delta.shape).astype(np.float32)

    def gradient(delta, kernel):
        def loss(delta):
            y = mc.selective_scan(jax.numpy.asarray(x), delta, -np.exp(A), B, C, delta_softplus=True, kernel=kernel)
            return (y**2).sum()

        return jax.grad(loss)(delta)

    for kernel in ("chunked", "associative", "sequential"):
        second = jax.grad(lambda delta, kernel=kernel: (gradient(delta, kernel) * direction).sum())(delta)
        step = 1e-2 * direction
        difference = (gradient(delta + step, kernel) - gradient(delta - step, kernel)) / 2e-2
        # The Hessian is symmetric, so that along the direction both are the same product.
        assert relative_l2(second, difference) < 1e-3, kernel


def test_mlx_compile_value_and_grad_and_update():
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    optim = pytest.importorskip("mlx.optimizers")
    model, ids, logits = plain("mlx")
    compiled = mx.compile(lambda ids: model(ids).logits, inputs=model.state)
    assert relative_l2(np.array(compiled(ids)), logits) < 1e-6

    def loss(model, ids):
        return nn.losses.cross_entropy(model(ids[:, :-1]).logits, ids[:, 1:], reduction="mean")

    optimizer = optim.Adam(1e-2)
    losses = []
    for _ in range(8):
        value, gradients = nn.value_and_grad(model, loss)(model, ids)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.3
    before = np.array(compiled(ids))
    assert relative_l2(before, logits) > 1e-2, "the compiled function sees the new parameters"


def test_mlx_quantised_model_still_generates():
    nn = pytest.importorskip("mlx.nn")
    config = mc.MambaConfig(d_model=64, n_layer=2, vocab_size=256, initializer_range=0.3)
    if missing := registry.missing_packages("mlx"):
        pytest.skip(f"{', '.join(missing)} not installed")
    model = mc.build(config, backend="mlx")
    wanted = np.array(model(registry.get("mlx").from_numpy(IDS)).logits)
    nn.quantize(model, group_size=32, bits=8)
    assert relative_l2(np.array(model(registry.get("mlx").from_numpy(IDS)).logits), wanted) < 0.05
    assert len(mc.generate(model, "def ", max_new_tokens=5).tokens[0]) == 5


@pytest.mark.parametrize("transform", ["vmap", "jvp", "second derivative"])
def test_mlx_transformations_that_chunked_refuses(transform):
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 5, 2), "delta": (1, 5, 2), "A": (2, 3), "B": (1, 5, 3), "C": (1, 5, 3)}
    arrays = [mx.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes.values()]

    def run(x, kernel):
        _, delta, A, B, C = arrays
        return mc.selective_scan(x, delta, -mx.exp(A), B, C, delta_softplus=True, kernel=kernel).square().sum()

    def transformed(kernel):
        function = {
            "vmap": lambda: mx.vmap(lambda x: run(x, kernel))(arrays[0][None]),
            "jvp": lambda: mx.jvp(lambda x: run(x, kernel), [arrays[0]], [arrays[0]]),
            "second derivative": lambda: mx.grad(lambda x: mx.grad(lambda x: run(x, kernel))(x).sum())(arrays[0]),
        }[transform]
        mx.eval(function())

    transformed("sequential")
    with pytest.raises((NotImplementedError, ValueError), match="sequential"):
        transformed("chunked")
