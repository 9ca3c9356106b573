"""PyTorch's transformations on the model as it comes."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2
from tests.unit.transforms import CONFIG, MASK, SEGMENTS, plain, scan_arguments

torch = pytest.importorskip("torch")
rms_norm = pytest.importorskip("mamba_core.backends.torch.ops.rms_norm")
func = torch.func


def close(trees, others, limit=1e-5):
    """Whether two trees of tensors agree, each tensor to a relative L2 error."""
    trees, others = (torch.utils._pytree.tree_leaves(tree) for tree in (trees, others))
    assert len(trees) == len(others)
    for one, other in zip(trees, others, strict=True):
        assert relative_l2(one.detach(), other.detach()) < limit


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss_of(model):
    def loss(parameters, ids, **arguments):
        return func.functional_call(model, parameters, (ids,), arguments).logits.square().sum()

    return loss


def gradients_of(model, ids, **arguments):
    """By autograd, without a transformation."""
    loss = model(ids, **arguments).logits.square().sum()
    return dict(zip(parameters_of(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_forward_and_backward(dynamic):
    model, ids, logits = plain("torch")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    out = compiled(ids)
    assert relative_l2(out.logits.detach(), logits) < 1e-6
    out.logits.square().sum().backward()
    close([parameter.grad for parameter in model.parameters()], list(gradients_of(model, ids).values()))
    close(compiled(ids[:, :5], out.state), model(ids[:, :5], out.state), 1e-6)


def test_autocast_keeps_the_recurrence_in_float32():
    model, ids, logits = plain("torch")
    with torch.autocast(model.device, torch.bfloat16):
        out = model(ids)
    assert relative_l2(out.logits.detach().float(), logits) < 2e-2
    assert out.state.layers[0].ssm.dtype == torch.float32
    out.logits.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_module_conveniences():
    model, ids, _ = plain("torch")
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    half = mc.build(CONFIG, backend="torch", device="cpu").to(torch.bfloat16)
    kept = {name for name, value in half.named_parameters() if value.dtype == torch.float32}
    assert {name.rpartition("mixer.")[2] for name in kept} == {"A_log", "D", "dt_proj.bias"}
    assert half.dtype == "bfloat16"
    wanted = mc.build(CONFIG, backend="torch", device="cpu", dtype="bfloat16")(ids.cpu()).logits
    assert torch.equal(half(ids.cpu()).logits, wanted)


@pytest.mark.parametrize("kernels", ["auto", "sequential"])
def test_func_grad_is_that_of_autograd(kernels):
    model, ids, _ = plain("torch", kernels=kernels)
    mask, segments = torch.tensor(MASK).to(ids.device), torch.tensor(SEGMENTS).to(ids.device)
    gradients = func.grad(loss_of(model))(parameters_of(model), ids, mask=mask, segment_ids=segments)
    close(gradients, gradients_of(model, ids, mask=mask, segment_ids=segments))


@pytest.mark.parametrize("kernels", ["auto", "sequential"])
def test_func_vmap_over_rows_states_and_models(kernels):
    model, ids, logits = plain("torch", kernels=kernels)
    mask, segments = torch.tensor(MASK).to(ids.device), torch.tensor(SEGMENTS).to(ids.device)

    def row(ids, mask, segments):
        return model(ids[None], mask=mask[None], segment_ids=segments[None]).logits[0]

    close(func.vmap(row)(ids, mask, segments), model(ids, mask=mask, segment_ids=segments).logits, 1e-6)
    states = [model(ids[:, :length]).state for length in (3, 20)]
    stacked = torch.utils._pytree.tree_map(lambda *values: torch.stack(values), *states)
    close(
        func.vmap(lambda state: model(ids, state).logits)(stacked),
        torch.stack([model(ids, state).logits for state in states]),
        1e-6,
    )
    models = [mc.build(CONFIG, backend="torch", kernels=kernels, seed=seed) for seed in range(3)]
    parameters, _ = func.stack_module_state(models)
    outputs = func.vmap(lambda parameters: func.functional_call(model, parameters, (ids,)).logits)(parameters)
    close(outputs, torch.stack([other(ids).logits for other in models]), 1e-6)
    assert relative_l2(outputs[0].detach(), logits) < 1e-6


@pytest.mark.parametrize("kernels", ["auto", "sequential"])
def test_func_gradients_of_each_sample(kernels):
    model, ids, _ = plain("torch", kernels=kernels)
    samples = func.vmap(func.grad(loss_of(model)), in_dims=(None, 0))(parameters_of(model), ids[:, None])
    for index in range(len(ids)):
        close({name: value[index] for name, value in samples.items()}, gradients_of(model, ids[index : index + 1]))


def test_func_jacrev():
    model, ids, _ = plain("torch")
    parameters = parameters_of(model)

    def some_logits(parameters):
        return func.functional_call(model, parameters, (ids,)).logits[0, -1, :3]

    jacobian = func.jacrev(some_logits)(parameters)
    for index in range(3):
        wanted = torch.autograd.grad(model(ids).logits[0, -1, index], list(model.parameters()))
        close([jacobian[name][index] for name in parameters], wanted)


def test_func_vmap_over_nothing_is_refused():
    model, ids, _ = plain("torch")
    with pytest.raises(ValueError, match="length 0; expected at least one"):
        func.vmap(lambda row: model(row[None]).logits)(ids[:0])


def forward_mode(model, ids):
    parameters = parameters_of(model)
    return func.jvp(lambda parameters: loss_of(model)(parameters, ids), (parameters,), (parameters,))[1]


def dual_level(model, ids):
    with torch.autograd.forward_ad.dual_level():
        dual = {name: torch.autograd.forward_ad.make_dual(v, v.clone()) for name, v in parameters_of(model).items()}
        return torch.autograd.forward_ad.unpack_dual(loss_of(model)(dual, ids)).tangent


def hessian_in_a_parameter(model, ids):
    parameters, name = parameters_of(model), "backbone.layers.0.mixer.A_log"
    return func.hessian(lambda value: loss_of(model)(parameters | {name: value}, ids))(parameters[name])


@pytest.mark.parametrize("transform", [forward_mode, dual_level])
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_is_sequential_s_alone(transform, compiled):
    """Both ways of forward mode, also inside a compiled function; an operator without a rule would give a number."""
    model, ids, _ = plain("torch", kernels="sequential")
    # The loss is differentiated along the parameters themselves.
    wanted = sum((parameters_of(model)[name] * g).sum() for name, g in gradients_of(model, ids).items())
    assert relative_l2(transform(model, ids), wanted.detach()) < 1e-5
    model, ids, _ = plain("torch")
    torch.compiler.reset()
    run = torch.compile(transform, backend="eager") if compiled else transform
    with pytest.raises(NotImplementedError, match='kernels="plain"'):
        run(model.requires_grad_(False), ids)


def test_hessian_is_sequential_s_alone():
    model, ids, _ = plain("torch", kernels="sequential")
    hessian = hessian_in_a_parameter(model, ids[:, :6]).flatten(2).flatten(0, 1)
    assert relative_l2(hessian, hessian.mT) < 1e-4
    model, ids, _ = plain("torch")
    with pytest.raises(NotImplementedError, match='kernels="plain"'):
        hessian_in_a_parameter(model, ids[:, :6])


def test_second_derivative():
    arrays = [torch.tensor(value, requires_grad=True) for value in scan_arguments().values()]

    def run(*arrays, kernel="sequential"):
        x, delta, A, B, C = arrays
        return mc.selective_scan(x, delta, -A.exp(), B, C, delta_softplus=True, kernel=kernel)

    assert torch.autograd.gradgradcheck(run, arrays)
    first = torch.autograd.grad(run(*arrays, kernel="chunked").sum(), arrays[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match='kernel="plain"'):
        first.sum().backward()


def test_export_of_any_batch_and_length():
    model, ids, _ = plain("torch")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    exported = torch.export.export(model, (ids,), dynamic_shapes=({0: batch, 1: length},)).module()
    long = torch.tensor(np.random.default_rng(3).integers(0, 29, (3, 150))).to(ids)
    for given in (ids, ids[:, :2], long):
        close(exported(given), model(given), 1e-6)


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    model, ids, _ = plain("torch")
    state = model(ids).state
    torch.export.save(torch.export.export(model, (ids, state)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    close(loaded(ids, state), model(ids, state), 1e-6)


def test_export_with_a_state():
    model, ids, _ = plain("torch")
    state = model(ids[:, :7]).state
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    rows = torch.utils._pytree.tree_map(lambda _: {0: batch}, state)
    exported = torch.export.export(model, (ids, state), dynamic_shapes=({0: batch, 1: length}, rows)).module()
    close(exported(ids, state), model(ids, state), 1e-6)
    ids = ids.repeat(2, 1)[:3, :9]
    state = model(ids).state
    close(exported(ids, state), model(ids, state), 1e-6)


def test_export_with_mask_and_segments_is_trainable():
    model, ids, _ = plain("torch")
    arguments = {"mask": torch.tensor(MASK).to(ids.device), "segment_ids": torch.tensor(SEGMENTS).to(ids.device)}
    exported = torch.export.export(model, (ids,), arguments).module()
    out = exported(ids, **arguments)
    close(out, model(ids, **arguments), 1e-6)
    out.logits.square().sum().backward()
    gradients = {name: value.grad for name, value in exported.named_parameters()}
    wanted = gradients_of(model, ids, **arguments)
    close([gradients[name] for name in wanted], list(wanted.values()))


def test_checkpoint_keeps_the_gradient():
    model, ids, _ = plain("torch")
    logits = torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False).logits
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    close(gradients, list(gradients_of(model, ids).values()))


def test_remat_keeps_less_for_the_gradient():
    model, ids, _ = plain("torch")

    def kept(remat):
        """How many numbers."""
        sizes, model.remat = [], remat
        with torch.autograd.graph.saved_tensors_hooks(lambda value: sizes.append(value.numel()), lambda value: value):
            model(ids)
        return sum(sizes)

    assert kept(True) < kept(False) / 2


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(library.missing() is not None, reason="needs the native library")
def test_without_a_gradient_whoever_watches_sees_the_operators(monkeypatch):
    """Nobody else does: then they are called as functions, and the norms are computed by one that is no operator."""
    norms, add_norm = [], rms_norm.KERNELS["native"]
    monkeypatch.setitem(rms_norm.KERNELS, "native", lambda *given: norms.append(given) or add_norm(*given))
    model = mc.build(CONFIG, backend="torch", kernels="native")
    ids = torch.arange(6)[None] % CONFIG.vocab_size
    with torch.no_grad():
        expected = model(ids).logits
        assert len(norms) == CONFIG.n_layer + 1
        with Seen() as seen:
            close(model(ids).logits, expected)
        assert len(norms) == CONFIG.n_layer + 1
    assert {"mamba_core::native_conv", "mamba_core::native_scan"} <= seen.names
    x, *others = map(torch.rand, ((2, 5, 3), (2, 5, 3), (3, 4), (2, 5, 4), (2, 5, 4)))
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: mc.selective_scan(x, *others, kernel="native"), (x,))
        assert torch.equal(traced(2 * x), 2 * traced(x))
