"""Linear layers by oneDNN on a CPU: what they compute, and where torch's own are taken."""

from contextlib import contextmanager

import pytest

import mamba_core as mc
from mamba_core.spec.tolerances import relative_l2

torch = pytest.importorskip("torch")
if not torch.backends.mkldnn.is_available():
    pytest.skip("torch is built without oneDNN", allow_module_level=True)

from mamba_core.backends.torch import layers  # noqa: E402
from mamba_core.backends.torch.kernels import native_step, native_tensors, onednn_linear  # noqa: E402
from mamba_core.backends.torch.ops import linear  # noqa: E402

CONFIG = mc.MambaConfig(d_model=20, n_layer=2, vocab_size=29, d_state=5, initializer_range=0.5)
LINEARS = 4 * CONFIG.n_layer
IDS = torch.arange(26).reshape(2, 13)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """On any processor, and for products of any size."""
    monkeypatch.setattr(onednn_linear, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(onednn_linear, "LEAST", 0)
    monkeypatch.setattr(native_step, "MOST_ROWS", 0)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what was given to oneDNN."""
    called, to_mkldnn, direct = [], torch.Tensor.to_mkldnn, onednn_linear.ONEDNN_LINEAR
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda x: (called.append(tuple(x.shape)), to_mkldnn(x))[1])
    if direct is not None:
        counted = lambda x, *rest: (called.append(tuple(x.shape)), direct(x, *rest))[1]  # noqa: E731
        monkeypatch.setattr(onednn_linear, "ONEDNN_LINEAR", counted)
    return called


def built(kernels="auto", **settings):
    return mc.build(CONFIG, backend="torch", device="cpu", kernels=kernels, **settings)


@contextmanager
def plain():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn_linear, "ONEDNN_IS_FASTER", False)
        yield


def plain_logits(model):
    with plain():
        return model(IDS).logits


@pytest.mark.parametrize("rows", [(3,), (2, 5), (1,)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_are_those_of_the_plain_layer(calls, rows, biased, strided):
    torch.manual_seed(0)
    layer, wide = torch.nn.Linear(7, 5, bias=biased), torch.randn(*rows, 9, requires_grad=True)
    x = wide[..., 1:8] if strided else wide[..., :7].contiguous()
    y = layers.linear(layer, x, "auto")
    wanted, inputs, dy = layer(x), (wide, *layer.parameters()), torch.randn(*rows, 5)
    assert calls == [(*rows, 7)]
    assert y.layout is torch.strided
    assert relative_l2(y.detach().numpy(), wanted.detach().numpy()) < 1e-6
    pairs = zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(wanted, inputs, dy), strict=True)
    for got, its_wanted in pairs:
        assert relative_l2(got.numpy(), its_wanted.numpy()) < 1e-6


@pytest.mark.parametrize("rows", [(3,), (2, 5), (1,)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_values_without_a_gradient(calls, rows, biased, direct, monkeypatch):
    layer, wide = torch.nn.Linear(7, 5, bias=biased), torch.randn(*rows, 9)
    if not direct:
        monkeypatch.setattr(onednn_linear, "ONEDNN_LINEAR", None)
    elif onednn_linear.ONEDNN_LINEAR is None:
        pytest.skip("this torch has no such operator")
    by_inputs = layer.weight.detach().T.contiguous().T
    repeated = wide[..., :1].expand(*rows, 7)
    with torch.no_grad():
        for x in (wide[..., 1:8], wide[..., :7].contiguous(), repeated):
            for weight in (layer.weight, by_inputs):
                y = linear.linear(x, weight, layer.bias, kernel="auto")
                assert y.layout is torch.strided
                assert relative_l2(y.numpy(), torch.nn.functional.linear(x, weight, layer.bias).numpy()) < 1e-6
    assert calls == 6 * [(*rows, 7)]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_and_its_gradients(calls, remat, tied):
    config = mc.MambaConfig(d_model=20, n_layer=2, vocab_size=29, initializer_range=0.5, tie_embeddings=tied)
    model = mc.build(config, backend="torch", device="cpu")
    model.remat = remat
    logits = model(IDS).logits
    assert len(calls) == LINEARS + 1
    inputs, dy = list(model.parameters()), torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(logits, inputs, dy)
    with plain():  # what is recomputed, too
        wanted = model(IDS).logits
        wanted_gradients = torch.autograd.grad(wanted, inputs, dy)
    assert relative_l2(logits.detach().numpy(), wanted.detach().numpy()) < 1e-5
    for got, its_wanted in zip(gradients, wanted_gradients, strict=True):
        assert relative_l2(got.numpy(), its_wanted.numpy()) < 1e-5


def test_few_products_are_not_worth_it(calls, monkeypatch):
    monkeypatch.setattr(onednn_linear, "LEAST", 26 * 20 * 80)
    built()(IDS)
    assert calls == [(2, 13, 20)] * CONFIG.n_layer


def test_where_it_is_not_the_faster(calls, monkeypatch):
    monkeypatch.setattr(onednn_linear, "ONEDNN_IS_FASTER", False)
    built()(IDS)
    assert calls == []


def test_with_autocast():
    model = built()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS).logits
        assert torch.equal(logits, plain_logits(model))
    assert 1e-4 < relative_l2(logits.detach().numpy(), model(IDS).logits.detach().numpy()) < 1e-1


def test_half_precision_is_left_to_torch(calls):
    built(dtype="bfloat16")(IDS)
    assert calls == []


def test_derivatives_of_other_orders_and_modes(calls):
    model = built("sequential")
    parameters, call = dict(model.named_parameters()), torch.func.functional_call
    x = model.backbone.embeddings(IDS).detach()

    def loss(x):
        layer = model.backbone.layers[0].mixer.in_proj
        return layers.linear(layer, x, "plain").square().sum()

    assert torch.func.hessian(loss)(x[0, :1]).abs().sum() > 0
    second = x[0, :1].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(second), [second], create_graph=True)
    assert torch.autograd.grad(first.sum(), [second])[0].abs().sum() > 0
    torch.func.grad(lambda parameters: call(built(), parameters, (IDS,)).logits.sum())(parameters)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y = layers.linear(model.backbone.layers[0].mixer.in_proj, dual, "auto")
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert calls == []


def test_a_compiled_and_an_exported_model(calls):
    model = built()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_l2(compiled(IDS).logits.detach().numpy(), plain_logits(model).detach().numpy()) < 1e-6
    exported = torch.export.export(model, (IDS,)).module()
    assert relative_l2(exported(IDS).logits.detach().numpy(), plain_logits(model).detach().numpy()) < 1e-6
    assert calls == []


@pytest.mark.parametrize("when", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("globally", [False, True])
def test_hooks_are_called(calls, when, globally):
    layer, seen = torch.nn.Linear(20, 5), []
    register = getattr(torch.nn.modules.module if globally else layer, _name_of(when, globally))
    with register(lambda *_: seen.append(when)):
        layers.linear(layer, torch.randn(3, 20, requires_grad=True), "auto").sum().backward()
    assert seen == [when]
    assert calls == []


def _name_of(when, globally):
    return f"register_module_{when}_hook" if globally else f"register_{when}_hook"


def test_another_module_in_a_layer_s_place(calls):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Doubled(20, 5)
    x = torch.randn(3, 20)
    torch.testing.assert_close(
        layers.linear(layer, x, "auto"), 2 * torch.nn.functional.linear(x, layer.weight, layer.bias)
    )
    assert calls == []


def test_a_wrong_width_is_torch_s_error():
    with pytest.raises(RuntimeError, match=r"shape|size"):
        layers.linear(torch.nn.Linear(20, 5), torch.zeros(3, 19), "auto")


@pytest.mark.skipif(native_tensors.MISSING is not None, reason=f"native library: {native_tensors.MISSING}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 7), (8, 1, 7), (9, 1, 7), (2, 5, 7)])
def test_few_rows_are_multiplied_by_the_native_step(monkeypatch, shape, dtype):
    """Without a gradient; it reads the weight once."""
    rows, few = [], native_step.head
    monkeypatch.setattr(native_step, "MOST_ROWS", 8)
    monkeypatch.setattr(native_step, "head", lambda x, weight: (rows.append(len(x)), few(x, weight))[1])
    torch.manual_seed(0)
    x, layer = torch.randn(shape, dtype=dtype), torch.nn.Linear(7, 5, bias=False).to(dtype)
    wanted = torch.nn.functional.linear(x.double(), layer.weight.double())
    with torch.no_grad():
        y = layers.linear(layer, x)
    assert y.dtype == dtype
    assert relative_l2(y.double().numpy(), wanted.detach().numpy()) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert rows == ([len(x)] if len(x) <= 8 and shape[-2:-1] in ((1,), (3,)) else [])
    layers.linear(layer, x)
    assert len(rows) <= 1, "a gradient is recorded"
