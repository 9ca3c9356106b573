"""Linear layers in MLX on a CPU by NumPy and the native library: what they compute, and where MLX's own are taken."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mamba_core.backends.mlx import layers  # noqa: E402
from mamba_core.backends.mlx.kernels import numpy_linear  # noqa: E402

CONFIG = mc.MambaConfig(d_model=20, n_layer=2, vocab_size=29, d_state=5, initializer_range=0.5)
LINEARS = 4 * CONFIG.n_layer
TOLERANCE = {mx.float32: 1e-6, mx.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On every system, and for products of any size."""
    monkeypatch.setattr(numpy_linear, "NUMPY_IS_FASTER", True)
    monkeypatch.setattr(numpy_linear, "LEAST", 0)
    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def calls(monkeypatch):
    """Which functions computed products."""
    called = []
    for name in ("_product", "_few"):
        function = getattr(numpy_linear, name)
        monkeypatch.setattr(numpy_linear, name, lambda *a, f=function, n=name: (called.append(n), f(*a))[1])
    return called


def layer(inputs, outputs, dtype=mx.float32, bias=True):
    made = nn.Linear(inputs, outputs, bias=bias)
    made.set_dtype(dtype)
    return made


def float64(value):
    return np.array(value.astype(mx.float32), np.float64)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(3,), (2, 5), (1,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_are_the_product_s(calls, dtype, rows, bias, strided):
    mx.random.seed(0)
    made, wide, dy = layer(7, 5, dtype, bias), mx.random.normal((*rows, 9)).astype(dtype), mx.random.normal((*rows, 5))
    dy = dy.astype(dtype)

    def run(wide, weight):
        made.weight = weight
        return layers.linear(made, wide[..., 1:8] if strided else wide[..., :7], "auto")

    (y,), (dwide, dweight) = mx.vjp(run, (wide, made.weight), (dy,))
    few = dtype == mx.bfloat16 and np.prod(rows) <= numpy_linear.FEW_ROWS and library.missing() is None
    assert calls == ["_few" if few else "_product", "_product", "_product"]
    assert (y.dtype, dwide.dtype, dweight.dtype) == (dtype,) * 3
    x = float64(wide)[..., 1:8] if strided else float64(wide)[..., :7]
    wanted = x @ float64(made.weight).T + (float64(made.bias) if bias else 0)
    dx = np.zeros(wide.shape)
    dx[..., slice(1, 8) if strided else slice(0, 7)] = float64(dy) @ float64(made.weight)
    for got, value in (
        (y, wanted),
        (dwide, dx),
        (dweight, float64(dy).reshape(-1, 5).T @ x.reshape(-1, 7)),
    ):
        assert relative_l2(float64(got), value) < TOLERANCE[dtype]


@pytest.mark.parametrize("tied", [False, True])
def test_all_products_of_a_model(calls, tied):
    config = mc.MambaConfig(d_model=20, n_layer=2, vocab_size=29, initializer_range=0.5, tie_embeddings=tied)
    model, ids = mc.build(config, backend="mlx", device="cpu"), mx.arange(26).reshape(2, 13)
    logits = model(ids).logits
    assert calls == ["_product"] * (LINEARS + 1)
    plain = mc.build(config, backend="mlx", device="cpu", kernels="sequential")(ids).logits
    assert len(calls) == LINEARS + 1
    assert relative_l2(np.array(logits), np.array(plain)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding(calls, dtype):
    model = mc.build(CONFIG, backend="mlx", device="cpu", dtype=dtype)
    result = mc.generate(model, [[1, 2, 3]], max_new_tokens=4, temperature=0.0)
    native_here = dtype == "bfloat16" and library.missing() is None
    # Of the prompt, of few rows too and in float32 with x and z apart in the last block, and of three steps.
    assert calls == ["_few" if native_here else "_product"] * (4 * (LINEARS + 1) + (dtype == "float32"))
    plain = mc.build(CONFIG, backend="mlx", device="cpu", dtype=dtype, kernels="sequential")
    assert result.tokens == mc.generate(plain, [[1, 2, 3]], max_new_tokens=4, temperature=0.0).tokens


def test_few_products_are_not_worth_it(calls, monkeypatch):
    monkeypatch.setattr(numpy_linear, "LEAST", 3 * 20 * 5)
    made = layer(20, 5)
    layers.linear(made, mx.ones((3, 20)), "auto")
    layers.linear(made, mx.ones((2, 20)), "auto")
    assert calls == ["_product"]


def test_where_mlx_computes_it(calls, monkeypatch):
    made, x = layer(20, 5), mx.random.normal((3, 20))
    wanted = np.array(made(x))

    def check(y):
        assert relative_l2(np.array(y), wanted) < 1e-6

    check(layers.linear(made, x, "plain"))
    check(mx.compile(lambda x: layers.linear(made, x, "auto"))(x))
    check(mx.vmap(lambda x: layers.linear(made, x, "auto"))(x))
    monkeypatch.setattr(numpy_linear, "NUMPY_IS_FASTER", False)
    check(layers.linear(made, x, "auto"))
    assert calls == []


def test_by_name_where_it_cannot_compute():
    made, x = layer(20, 5), mx.random.normal((3, 20))
    with pytest.raises(ValueError, match=r"mx\.compile"):
        mx.compile(lambda x: layers.linear(made, x, "numpy"))(x)
    with pytest.raises(ValueError, match="x is float16 and the weight float32"):
        layers.linear(made, x.astype(mx.float16), "numpy")
    with pytest.raises(ValueError, match="linear has no kernel 'native'"):
        layers.linear(made, x, "native")


def test_another_module_in_a_layer_s_place(calls):
    made = nn.QuantizedLinear.from_linear(layer(64, 5), group_size=32, bits=8)
    x = mx.random.normal((3, 64))
    np.testing.assert_array_equal(np.array(layers.linear(made, x, "auto")), np.array(made(x)))
    assert calls == []


def test_other_derivatives_are_refused():
    made, x = layer(20, 5), mx.random.normal((3, 20))
    with pytest.raises(NotImplementedError, match="plain"):
        mx.jvp(lambda x: layers.linear(made, x, "auto"), (x,), (x,))
    with pytest.raises(NotImplementedError, match="plain"):
        mx.grad(lambda x: mx.grad(lambda x: (layers.linear(made, x, "auto") ** 2).sum())(x).sum())(x)


def test_a_wrong_width_is_mlx_s_error():
    with pytest.raises(ValueError, match="matmul"):
        layers.linear(layer(20, 5), mx.zeros((3, 19)), "auto")
