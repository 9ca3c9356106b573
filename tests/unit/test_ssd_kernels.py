"""The C++ kernel of the ssd as each framework has it: where it is the default, its transformations, what it refuses."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")
BACKENDS = ("torch", "mlx", "jax")
NAMES = ("x", "dt", "A", "B", "C", "D", "z")
CONFIG = mc.Mamba2Config(d_model=16, n_layer=2, vocab_size=29, headdim=8, d_state=4, initializer_range=0.3)


def arrays(length=70, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    drawn = {"x": (2, length, 4, 5), "dt": (2, length, 4), "A": (4,), "B": (2, length, 2, 3), "C": (2, length, 2, 3)}
    drawn |= {"D": (4,), "z": (2, length, 4, 5)}
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in drawn.items()}
    return list((values | {"A": -np.exp(values["A"])}).values())


def call(kernel):
    """y of the arguments in the order of NAMES."""
    return lambda *values: mc.ssd(**dict(zip(NAMES, values, strict=True)), dt_softplus=True, kernel=kernel)


def close(found, wanted, limit=1e-5):
    for one, other in zip(found, wanted, strict=True):
        assert relative_l2(np.asarray(one, float), np.asarray(other, float)) < limit


def backend_of(name):
    if missing := registry.missing_packages(name):
        pytest.skip(f"{', '.join(missing)} not installed")
    return registry.get(name)


@pytest.mark.parametrize("name", BACKENDS)
def test_it_is_the_default_on_a_cpu_and_what_a_bare_name_means(name):
    backend_of(name)
    for kernels in ("auto", "native"):
        assert mc.build(CONFIG, backend=name, device="cpu", kernels=kernels).kernels["ssd"] == "native"
    assert mc.build(CONFIG, backend=name, device="cpu", kernels={"ssd": "chunked"}).kernels["ssd"] == "chunked"


@pytest.mark.parametrize("name", BACKENDS)
def test_auto_computes_with_it(name, monkeypatch):
    """Bit for bit, which another kernel does not give; and a float16 x is computed by another."""
    backend = backend_of(name)
    with backend.on_device("cpu"):
        for dtype, same in (("float32", "native"), ("bfloat16", "native"), ("float16", "chunked")):
            values = [backend.from_numpy(value, dtype, "cpu") for value in arrays()]
            found, wanted = (backend.to_numpy(call(kernel)(*values)) for kernel in ("auto", same))
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_another_dtype_is_told_what_it_computes(name):
    backend = backend_of(name)
    with (
        backend.on_device("cpu"),
        pytest.raises(ValueError, match="x is float16, and it computes float32 and bfloat16"),
    ):
        call("native")(*(backend.from_numpy(value, "float16", "cpu") for value in arrays()))


def test_torch_compiles_exports_and_maps_it():
    torch = pytest.importorskip("torch")
    values = [torch.from_numpy(value) for value in arrays()]
    wanted = call("native")(*values)
    for value in values:
        value.requires_grad_()
    gradients = torch.autograd.grad(call("native")(*values).square().sum(), values)

    def run(*given):
        """Without the look-up of the backend, which the compiler cannot trace."""
        return op(**dict(zip(NAMES, given, strict=True)), dt_softplus=True, kernel="native")

    op = registry.get("torch").op("ssd").ssd
    torch.compiler.reset()
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(*values)
    close([y.detach()], [wanted], 1e-7)
    close(torch.autograd.grad(y.square().sum(), values), gradients, 1e-6)

    class Module(torch.nn.Module):
        def forward(self, *given):
            return run(*given)

    sizes = {1: torch.export.Dim("length", min=2)}
    shapes = tuple(sizes if value.ndim > 2 else None for value in values)
    program = torch.export.export(Module(), tuple(values), dynamic_shapes=(shapes,))
    longer = [torch.from_numpy(value) for value in arrays(131)]
    close([program.module()(*longer).detach()], [call("native")(*longer)], 1e-7)

    stacked = [
        torch.stack([one.detach(), other])
        for one, other in zip(values, map(torch.from_numpy, arrays(seed=1)), strict=True)
    ]
    mapped = torch.func.vmap(torch.func.grad(lambda *given: call("native")(*given).square().sum()))(*stacked)
    close([mapped[0]], [gradients[0]], 1e-6)
    with pytest.raises(NotImplementedError, match='kernel="plain"'):
        torch.func.jvp(call("native"), tuple(stacked[k][0] for k in range(7)), tuple(stacked[k][1] for k in range(7)))


def test_torch_reads_slices_of_a_wider_array_where_they_lie():
    torch = pytest.importorskip("torch")
    values = [torch.from_numpy(value) for value in arrays()]
    wide = torch.cat([values[0].flatten(2), values[3].flatten(2), values[1]], dim=-1).requires_grad_()
    x, B, dt = wide.split((20, 6, 4), dim=-1)
    given = [x.unflatten(-1, (4, 5)), dt, values[2], B.unflatten(-1, (2, 3)), *values[4:]]
    y = call("native")(*given)
    close([y.detach()], [call("native")(*values)], 1e-7)
    y.sum().backward()  # from one number for all of y
    whole = [value.clone().requires_grad_() for value in values]
    call("native")(*whole).backward(torch.ones_like(y))
    close([wide.grad[..., :20], wide.grad[..., 26:]], [whole[0].grad.flatten(2), whole[1].grad], 1e-7)


def test_jax_maps_it_and_differentiates_its_twin_twice():
    jax = pytest.importorskip("jax")
    one, other = ([jax.numpy.asarray(value) for value in arrays(seed=seed)] for seed in (0, 1))

    def loss(kernel):
        return lambda *values: (call(kernel)(*values) ** 2).sum()

    gradient = jax.grad(loss("native"), argnums=tuple(range(7)))
    stacked = [jax.numpy.stack(pair) for pair in zip(one, other, strict=True)]
    mapped = jax.jit(jax.vmap(gradient))(*stacked)
    close([value[1] for value in mapped], gradient(*other), 1e-6)

    def second(kernel):
        first = jax.grad(lambda dt: loss(kernel)(one[0], dt, *one[2:]))
        return jax.grad(lambda dt: (first(dt) * other[1]).sum())(one[1])

    close([second("native"), second("chunked")], [second("sequential")] * 2)


def test_jax_keeps_boundaries_for_a_gradient_only_and_exports_the_twin():
    jax = pytest.importorskip("jax")
    values = [jax.numpy.asarray(value) for value in arrays()]
    kept = f"tensor<{library.count_ssd_boundaries(2, 70, 4, 5, 3)}xf32>"
    run, gradient = jax.jit(call("auto")), jax.jit(jax.grad(lambda *given: call("auto")(*given).sum()))
    assert "mamba_ssd_forward_xla" in run.lower(*values).as_text()
    assert kept not in run.lower(*values).as_text()
    assert kept in gradient.lower(*values).as_text()
    exported = jax.export.export(run, platforms=("cpu", "cuda"))(*values)
    assert "mamba_ssd" not in str(exported.mlir_module())
    close([exported.call(*values)], [run(*values)], 1e-6)
    with pytest.raises(ValueError, match="on a CPU only, and is not exported"):
        jax.export.export(jax.jit(call("native")))(*values)


def test_mlx_leaves_it_where_there_is_nothing_to_compute_with():
    mx = pytest.importorskip("mlx.core")
    values = [mx.array(value) for value in arrays()]
    with registry.get("mlx").on_device("cpu"):
        close([mx.compile(call("auto"))(*values)], [call("native")(*values)])
        with pytest.raises(ValueError, match=r"inside mx\.compile and mx\.vmap there is nothing to compute with"):
            mx.compile(call("native"))(*values)
        gradient = mx.grad(lambda dt: call("native")(values[0], dt, *values[2:]).square().sum())
        wanted = mx.grad(lambda dt: call("chunked")(values[0], dt, *values[2:]).square().sum())
        close([gradient(values[1])], [wanted(values[1])])
        with pytest.raises(NotImplementedError, match="first gradient in reverse mode only"):
            mx.grad(lambda dt: gradient(dt).sum())(values[1])
