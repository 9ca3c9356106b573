"""One position in one native call: the block and the head against the reference, and when a model uses them."""

import ctypes
import dataclasses
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mamba_core as mc
from mamba_core.backend import LayerState, State
from mamba_core.backends.native import abi, library
from mamba_core.spec.reference import ReferenceModel
from tests.conformance.assertions import assert_close
from tests.unit.native_arrays import widths

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")
every_width = pytest.mark.parametrize("width", widths())
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

options = st.fixed_dictionaries(
    {
        "d_model": st.integers(1, 40),
        "expand": st.sampled_from((1, 1.5, 2, 3.3)),
        "d_state": st.integers(1, 64),
        "d_conv": st.integers(1, 4),
        "dt_rank": st.integers(1, 20),
        "bias": st.booleans(),
        "conv_bias": st.booleans(),
        "norm_eps": st.sampled_from((1e-5, 0.3)),
    }
)
# 15 rows are every size of the groups that rows are computed in.
rows = st.integers(1, 8) | st.just(15)
orders = st.booleans()
dtypes = st.sampled_from(list(DTYPES))


class Case:
    """A block with drawn parameters, named as they end, and what one position of it is given."""

    def __init__(self, fields, b, dtype, residual_dtype, seed=0):
        self.config = mc.MambaConfig(n_layer=1, vocab_size=1, task="layers", **fields)
        self.b, self.dtype, self.residual_dtype = b, DTYPES[dtype], DTYPES[residual_dtype]
        self.rng = np.random.default_rng(seed)
        d, e, n, k = self.config.d_model, self.config.d_inner, self.config.d_state, self.config.d_conv
        self.names = mc.spec.params.parameter_table(self.config)
        self.parameters = {name: self.parameter(entry) for name, entry in self.names.items()}
        self.residual = self.draw((b, 1, d), self.residual_dtype)
        self.state = LayerState(self.draw((b, k - 1, e), self.dtype), self.draw((b, e, n), np.float32))

    def draw(self, shape, dtype, scale=1.0):
        return (self.rng.normal(size=shape) * scale).astype(dtype)

    def parameter(self, entry):
        scale = 1.0 if len(entry.shape) == 1 else entry.shape[-1] ** -0.5
        return self.draw(entry.shape, np.float32 if entry.float32 else self.dtype, scale)

    def reference(self):
        """(residual, state) in float64."""
        state = State((self.state,), np.zeros(self.b, np.int32))
        out = ReferenceModel(self.config, self.parameters)(self.residual.astype(np.float64), state)
        return out.hidden, out.state.layers[0]

    def reference_with_norms(self, eps, weights=(1.0, 1.0, 1.0)):
        """(residual, state) in float64, by NumPy: with dt, B and C normed where eps is above 0."""
        c, prefix = self.config, "backbone.layers.0."
        own = {name.removeprefix(prefix): value.astype(np.float64) for name, value in self.parameters.items()}
        residual, conv_state, ssm_state = (value.astype(np.float64) for value in (self.residual[:, 0], *self.state))

        def norm(x, eps):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

        def project(x, name):
            return x @ own[f"mixer.{name}.weight"].T + own.get(f"mixer.{name}.bias", 0.0)

        def silu(x):
            return x / (1.0 + np.exp(-x))

        x, z = np.split(project(norm(residual, c.norm_eps) * own["norm.weight"], "in_proj"), 2, -1)
        window = np.concatenate([conv_state, x[:, None]], 1)
        taps = own["mixer.conv1d.weight"][:, 0]
        x = silu(np.einsum("bke,ek->be", window, taps) + own.get("mixer.conv1d.bias", 0.0))
        mixed = np.split(project(x, "x_proj"), [c.dt_rank_size, c.dt_rank_size + c.d_state], -1)
        if eps > 0:
            mixed = [norm(part, eps) * weight for part, weight in zip(mixed, weights, strict=True)]
        dt, B, C = mixed
        step = np.logaddexp(0.0, project(dt, "dt_proj"))
        decay = np.exp(-step[..., None] * np.exp(own["mixer.A_log"]))
        h = decay * ssm_state + (step * x)[..., None] * B[:, None]
        y = ((h * C[:, None]).sum(-1) + own["mixer.D"] * x) * silu(z)
        return (residual + project(y, "out_proj"))[:, None], LayerState(window[:, 1:], h)

    def native(self, width=0, threads=1, transposed=False, in_place=False, **more):
        """(residual, state); in_place: in the memory of those before. more: fields of the struct."""
        c, kept = self.config, []

        def at(array):
            if array is None:
                return None
            kept.append(np.ascontiguousarray(array))
            return kept[-1].ctypes.data

        def own(name):
            return self.parameters.get(f"backbone.layers.0.{name}")

        def weight(name):
            value = own(f"mixer.{name}.weight").reshape(own(f"mixer.{name}.weight").shape[0], -1)
            return at(value.T if transposed else value)

        def matrix(name):
            return abi.Matrix(weight(name), at(own(f"mixer.{name}.bias")))

        given = self.residual, *self.state
        results = [value.copy() if in_place else np.empty_like(value) for value in given]
        given = results if in_place else given
        step = abi.MambaStep(
            *(self.b, c.d_model, c.d_inner, c.d_state, c.d_conv, c.dt_rank_size),
            *(self.dtype != np.float32, self.residual_dtype != np.float32, transposed, threads, width),
            c.norm_eps,
            *(at(value) for value in (*given, own("norm.weight"))),
            *(matrix(name) for name in ("in_proj", "conv1d", "x_proj", "out_proj")),
            weight("dt_proj"),
            *(at(own(f"mixer.{name}")) for name in ("dt_proj.bias", "A_log", "D")),
            *(result.ctypes.data for result in results),
            **{name: at(value) if isinstance(value, np.ndarray) else value for name, value in more.items()},
        )
        library.mamba_steps((abi.MambaStep * 1)(step))
        return results[0], LayerState(*results[1:])


@every_width
@given(options, rows, dtypes, dtypes, orders, st.sampled_from((1, 2, 3)), st.integers(0, 99))
def test_a_step_is_the_reference(width, fields, b, dtype, residual_dtype, transposed, threads, seed):
    case = Case(fields, b, dtype, residual_dtype, seed)
    before = [value.copy() for value in (case.residual, *case.state)]
    residual, state = case.native(width, threads, transposed)
    wanted, wanted_state = case.reference()
    # All is float32 inside, and so what is not rounded to bfloat16 in the end is as good as float32.
    assert_close(residual, wanted, residual_dtype, "value", "residual")
    assert_close(state.conv, wanted_state.conv, dtype, "value", "conv state")
    assert_close(state.ssm, wanted_state.ssm, "float32", "value", "ssm state")
    for value, kept in zip((case.residual, *case.state), before, strict=True):
        np.testing.assert_array_equal(value, kept)


def assert_norms(case, selection_eps, weighted=False, **how):
    """That a step with these norms is the float64 one. Nothing but its results is rounded to bfloat16."""
    sizes, weights = (
        {"dt_norm": case.config.dt_rank_size} | dict.fromkeys(("B_norm", "C_norm"), case.config.d_state),
        {},
    )
    if weighted:
        weights = {name: case.draw(size, case.dtype) for name, size in sizes.items()}
    residual, state = case.native(selection_eps=selection_eps, **weights, **how)
    given = [value.astype(np.float64) for value in weights.values()] or (1.0, 1.0, 1.0)
    wanted, wanted_state = case.reference_with_norms(selection_eps, given)
    told = {"selection_eps": selection_eps} | how
    assert_close(residual, wanted, str(case.residual.dtype), "value", "residual", **told)
    assert_close(state.conv, wanted_state.conv, str(case.state.conv.dtype), "value", "conv state", **told)
    assert_close(state.ssm, wanted_state.ssm, "float32", "value", "ssm state", **told)


# One or two numbers can both be almost zero. Their norm would then magnify what float32 rounds.
several = st.tuples(options, st.integers(3, 40), st.integers(3, 40)).map(
    lambda drawn: drawn[0] | {"dt_rank": drawn[1], "d_state": drawn[2]}
)


@every_width
@given(several, rows, dtypes, dtypes, orders, st.sampled_from((1, 2, 3)), st.sampled_from((1e-6, 0.3)))
def test_a_step_norms_dt_b_and_c(width, fields, b, dtype, residual_dtype, transposed, threads, eps):
    case = Case(fields, b, dtype, residual_dtype)
    assert_norms(case, eps, width=width, threads=threads, transposed=transposed)


@every_width
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "states"), [(1, 1), (1, 17), (7, 1), (13, 21), (17, 15), (33, 31)])
def test_norms_of_odd_ranks_and_states_in_every_batch(width, transposed, dtype, rank, states):
    for b in range(1, 9):
        case = Case({"d_model": 19, "dt_rank": rank, "d_state": states}, b, dtype, "float32", seed=b)
        assert_norms(case, 0.1, weighted=b % 2 == 0, width=width, transposed=transposed)


# Enough for every thread that is asked for to be started.
LARGE = {"d_model": 256, "d_state": 16, "expand": 2.01}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_without_an_eps_nothing_is_normed(transposed, dtype, eps):
    case = Case(LARGE, 3, dtype, "float32")
    plain, plain_state = case.native(transposed=transposed)
    same, same_state = case.native(transposed=transposed, selection_eps=eps)
    for value, wanted in zip((same, *same_state), (plain, *plain_state), strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_the_reference_with_norms_is_the_reference_where_there_are_none():
    case = Case(LARGE, 3, "bfloat16", "float32")
    (found, found_state), (wanted, wanted_state) = case.reference_with_norms(0.0), case.reference()
    for value, other in zip((found, *found_state), (wanted, *wanted_state), strict=True):
        assert_close(value, other, "float64", "value", "reference")


@every_width
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(width, transposed, dtype):
    case = Case(LARGE, 2, dtype, "float32")
    one, one_state = case.native(width, 1, transposed)
    assert_close(one, case.reference()[0], "float32", "value", "residual")
    for threads in (2, 3):
        for _ in range(20):
            other, other_state = case.native(width, threads, transposed)
            for value, wanted in zip((other, *other_state), (one, *one_state), strict=True):
                np.testing.assert_array_equal(value, wanted)


@every_width
@pytest.mark.parametrize("transposed", [False, True])
def test_results_in_place_of_what_they_replace(width, transposed):
    case = Case(LARGE, 3, "bfloat16", "float32")
    (there, states), (here, own_states) = (case.native(width, 2, transposed, in_place) for in_place in (False, True))
    for value, wanted in zip((here, *own_states), (there, *states), strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_is_that_row_alone(transposed):
    case = Case(LARGE, 15, "float32", "float32")
    together, _ = case.native(transposed=transposed)
    for row in (0, 8, 12, 14):
        alone = Case(LARGE, 1, "float32", "float32")
        alone.parameters, alone.residual = case.parameters, case.residual[row : row + 1]
        alone.state = LayerState(*(value[row : row + 1] for value in case.state))
        np.testing.assert_array_equal(alone.native(transposed=transposed)[0][0], together[row])


def linear(x, weight, bias, width=0, threads=1, transposed=False):
    """x (b, in) times the transpose of weight (out, in), and a bias (out,)."""
    stored = np.ascontiguousarray(weight.T if transposed else weight)
    y = np.empty((len(x), len(weight)), np.float32)
    matrix = abi.Matrix(stored.ctypes.data, None if bias is None else bias.ctypes.data)
    sizes, settings = (*x.shape, len(weight)), (x.dtype != np.float32, transposed, threads, width)
    library.linear_step(abi.LinearStep(*sizes, *settings, x.ctypes.data, matrix, y.ctypes.data))
    return y


def drawn_linear(b, inputs, outputs, dtype):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(DTYPES[dtype]) for shape in ((b, inputs), (outputs, inputs), (outputs,))]


@every_width
@given(rows, st.integers(1, 200), st.integers(1, 300), st.booleans(), dtypes, orders, st.sampled_from((1, 2, 3)))
def test_a_linear_step_is_the_product(width, b, inputs, outputs, biased, dtype, transposed, threads):
    x, weight, bias = drawn_linear(b, inputs, outputs, dtype)
    y = linear(x, weight, bias if biased else None, width, threads, transposed)
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T + (bias.astype(np.float64) if biased else 0.0)
    assert_close(y, wanted, "float32", "value", "y")


@every_width
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_change_no_bit_of_a_product(width, transposed):
    x, weight, bias = drawn_linear(3, 300, 4501, "bfloat16")
    one = linear(x, weight, bias, width, 1, transposed)
    for threads in (2, 3):
        np.testing.assert_array_equal(linear(x, weight, bias, width, threads, transposed), one)


def test_a_workspace_beyond_memory_is_an_error():
    huge = abi.LinearStep(2**20, 2**30, 1)
    with pytest.raises(MemoryError, match="workspace"):
        library.linear_step(huge)


def test_the_structs_are_as_long_as_they_are_in_c():
    """Six and three sizes, five and four settings, floats and pointers, each part filled up to eight bytes."""
    assert ctypes.sizeof(abi.MambaStep) == 6 * 8 + 6 * 4 + (4 + 4 * 2 + 4 + 3 + 3) * 8 + 8
    assert abi.MambaStep.selection_eps.offset == ctypes.sizeof(abi.MambaStep) - 8
    assert ctypes.sizeof(abi.LinearStep) == 3 * 8 + 4 * 4 + 4 * 8


CONFIG = mc.MambaConfig(d_model=20, n_layer=3, vocab_size=29, d_state=5, initializer_range=0.5)
PROMPTS = [[1, 2, 3], [7], [4, 5, 6, 7, 8]]


@pytest.fixture
def calls(monkeypatch):
    """The names of the library's functions that a torch model called."""
    pytest.importorskip("torch")
    from mamba_core.backends.torch.kernels import native_step

    called = []
    for name in ("mamba_steps", "linear_step"):
        function = getattr(native_step.library, name)
        monkeypatch.setattr(native_step.library, name, lambda *a, f=function, n=name: (called.append(n), f(*a))[1])
    return called


def stepping(config=CONFIG, batch=2, **settings):
    """(model, ids (b, 1), state before them, logits and state of the plain operations)."""
    import torch

    model = mc.build(config, backend="torch", device="cpu", **settings)
    ids = torch.arange(2 * batch).reshape(batch, 2) % 29
    state = model(ids).state
    out = mc.build(config, backend="torch", device="cpu", **settings | {"kernels": "sequential"})(ids[:, :1], state)
    return model, ids[:, :1], torch.utils._pytree.tree_map(torch.detach, state), out


ALL_NATIVE = ["mamba_steps", "linear_step"]


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"kernels": "native"}])
@pytest.mark.parametrize("fields", [{}, {"bias": True, "conv_bias": False, "tie_embeddings": False, "d_conv": 1}])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_model_steps_natively(calls, settings, fields, mode):
    import torch

    config = mc.MambaConfig(**{"d_model": 20, "n_layer": 3, "vocab_size": 29, "initializer_range": 0.5} | fields)
    model, ids, state, wanted = stepping(config, **settings)
    with getattr(torch, mode)():
        out = model(ids, state)
    assert calls == ALL_NATIVE
    dtype = settings.get("dtype", "float32")
    for value, plain in zip(torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(wanted), strict=True):
        assert (value.shape, value.dtype) == (plain.shape, plain.dtype)
        assert_close(value.float().numpy(), plain.detach().float().numpy(), dtype, "node", "result")


class Adapted:
    """What takes a Linear's place, as an adapter does."""

    def __new__(cls, linear):
        import torch

        class Adapter(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.base = linear
                self.weight, self.bias = linear.weight, linear.bias

            def forward(self, x):
                return 2 * self.base(x)

        return Adapter()


def replaced(model):
    model.backbone.layers[1].mixer.in_proj = Adapted(model.backbone.layers[1].mixer.in_proj)


def hooked(model):
    model.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda module, given, result: 2 * result)


def hooked_before(model):
    model.backbone.layers[1].norm.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def hooked_mixer(model):
    model.backbone.layers[1].mixer.register_forward_hook(lambda module, given, result: (2 * result[0], result[1]))


def hooked_block(model):
    model.backbone.layers[1].register_forward_hook(lambda module, given, result: (2 * result[0], result[1]))


def patched(model):
    linear = model.backbone.layers[1].mixer.out_proj
    linear.forward = lambda x, forward=linear.forward: 2 * forward(x)


def subclassed(model):
    import torch

    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), named=None):
            if function is not torch.nn.functional.linear:
                return super().__torch_function__(function, types, arguments, named)
            x, weight, bias = arguments
            return 2 * function(x, weight.as_subclass(torch.Tensor), bias)

    linear = model.backbone.layers[1].mixer.in_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Doubled), requires_grad=False)


def narrowed(model):
    model.backbone.layers[1].mixer.D.data = model.backbone.layers[1].mixer.D.data.bfloat16()


def strided(model):
    import torch

    linear = model.backbone.layers[1].mixer.out_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous().T)


@pytest.mark.parametrize(
    "change",
    [replaced, hooked, hooked_before, hooked_mixer, hooked_block, patched, subclassed, narrowed, strided],
    ids=lambda f: f.__name__,
)
def test_a_changed_block_computes_what_it_was_changed_to(calls, change):
    import torch

    _, ids, state, _ = stepping()
    model, other = both(change)
    with torch.no_grad():
        logits, wanted = model(ids, state).logits, other(ids, state).logits
    # The blocks before and after it still step natively; what it has of linear layers may be native products.
    assert (calls[0], calls[-2:], calls.count("mamba_steps")) == ("mamba_steps", ALL_NATIVE, 2)
    assert_close(logits.numpy(), wanted.numpy(), "float32", "node", "logits")


def both(change):
    """The native model and that of the plain operations, both changed."""
    models = [mc.build(CONFIG, backend="torch", device="cpu", kernels=kernels) for kernels in ("auto", "sequential")]
    for model in models:
        change(model)
    return models


def test_each_norm_has_its_own_eps(calls):
    import torch

    _, ids, state, _ = stepping()
    model, plain = both(lambda model: setattr(model.backbone.layers[1].norm, "eps", 3.0))
    with torch.no_grad():
        assert_close(model(ids, state).logits.numpy(), plain(ids, state).logits.numpy(), "float32", "node", "logits")
    assert calls == ALL_NATIVE


def test_a_layer_of_another_size_is_not_taken_for_one_of_the_first_s(calls):
    import torch

    narrow = mc.build(dataclasses.replace(CONFIG, expand=1), backend="torch", device="cpu")
    _, ids, state, _ = stepping()
    layers = (state.layers[0], narrow.init_state(2).layers[1], state.layers[2])
    model, plain = both(lambda model: model.backbone.layers.__setitem__(1, narrow.backbone.layers[1]))
    with torch.no_grad():
        logits = [each(ids, state._replace(layers=layers)).logits.numpy() for each in (model, plain)]
    assert_close(*logits, "float32", "node", "logits")
    # One call for each run of layers of one size; the other model has the narrow layer, too, with its own kernels.
    assert calls == ["mamba_steps"] * 3 + ["linear_step", "mamba_steps"]


def test_an_adapted_head_is_called(calls):
    import torch

    model, ids, state, _ = stepping(mc.MambaConfig(d_model=20, n_layer=3, vocab_size=29, tie_embeddings=False))
    with torch.no_grad():
        once = model(ids, state).logits
        model.lm_head = Adapted(model.lm_head)
        twice = model(ids, state).logits
    assert calls == [*ALL_NATIVE, "mamba_steps"]
    assert_close(twice.numpy(), 2 * once.numpy(), "float32", "node", "logits")


PLAIN = {
    "a mask": lambda model, ids, state: model(ids, state, mask=ids >= 0),
    "segments": lambda model, ids, state: model(ids, state, segment_ids=ids * 0),
    "observed": lambda model, ids, state: model(ids, state, observe=lambda name, value: None),
    "two positions": lambda model, ids, state: model(ids.repeat(1, 2), state),
    "no position": lambda model, ids, state: model(ids[:, :0], state),
}


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
def test_plain_operations_where_a_step_is_not_all(calls, call):
    import torch

    model, ids, state, _ = stepping()
    with torch.no_grad():
        call(model, ids, state)
    assert "mamba_steps" not in calls


@pytest.mark.parametrize(
    "settings",
    [
        {"kernels": "chunked"},
        {"dtype": "float16"},
        {"batch": 9},
        {"config": mc.MiniMambaConfig(d_model=20, n_layer=3, vocab_size=29, bias=True)},
    ],
)
def test_plain_operations_for_another_model(calls, settings):
    import torch

    model, ids, state, wanted = stepping(**settings)
    with torch.no_grad():
        out = model(ids, state)
    assert "mamba_steps" not in calls
    assert_close(out.logits.numpy(), wanted.logits.detach().numpy(), settings.get("dtype", "float32"), "node", "logits")


def test_plain_operations_with_derivatives_autocast_or_without_the_library(calls, monkeypatch):
    import torch

    from mamba_core.backends.torch.kernels import native_tensors

    model, ids, state, _ = stepping()
    assert model(ids, state).logits.requires_grad
    forward_ad = torch.autograd.forward_ad
    with torch.no_grad(), forward_ad.dual_level():
        state_dual = state._replace(
            layers=tuple(layer._replace(ssm=forward_ad.make_dual(layer.ssm, layer.ssm)) for layer in state.layers)
        )
        assert forward_ad.unpack_dual(model(ids, state_dual).logits).tangent is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids, state)
    monkeypatch.setattr(native_tensors, "MISSING", "not built")
    with torch.no_grad():
        model(ids, state)
    assert calls == []


def test_changed_values_count_at_once(calls):
    import torch

    model, ids, state, _ = stepping()
    with torch.no_grad():
        before = model(ids, state).logits
        weight = model.backbone.layers[0].mixer.out_proj.weight
        weight.data = weight.data.clone().zero_()
        model.backbone.layers[1].mixer.D.mul_(3.0)
        after = model(ids, state).logits
        wanted = stepping_plain(model, ids, state)
    assert not torch.equal(before, after)
    assert_close(after.numpy(), wanted.numpy(), "float32", "node", "logits")
    model.to(torch.bfloat16)
    with torch.no_grad():
        state = model.init_state(2)
        logits, wanted = model(ids, state).logits, stepping_plain(model, ids, state)
    assert_close(logits.numpy(), wanted.numpy(), "bfloat16", "node", "logits")
    assert calls.count("mamba_steps") == 3


def stepping_plain(model, ids, state):
    """By the plain operations, which are what takes a mask."""
    return model(ids, state, mask=ids >= 0).logits


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_steps_natively(calls, dynamic):
    torch = pytest.importorskip("torch", minversion="2.13", reason="older compilers take the plain operations")
    model, ids, state, wanted = stepping()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        out = compiled(ids, state)
        assert calls == ALL_NATIVE
        assert_close(compiled(ids[:1], model(ids[:1]).state).logits.shape, (1, 1, 32), "float64", "value", "shape")
    assert_close(out.logits.numpy(), wanted.logits.detach().numpy(), "float32", "node", "logits")


def test_a_step_of_any_batch_is_exported():
    import torch

    model, ids, state, wanted = stepping()
    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, torch.utils._pytree.tree_map(lambda _: {0: batch}, state))
    with torch.no_grad():
        exported = torch.export.export(model, (ids, state), dynamic_shapes=shapes).module()
        assert_close(exported(ids, state).logits.numpy(), wanted.logits.detach().numpy(), "float32", "node", "logits")
        assert exported(ids[:1].repeat(11, 1), model.init_state(11)).logits.shape[0] == 11


def test_vmap_over_states(calls):
    import torch

    model, ids, state, _ = stepping()
    with torch.no_grad():
        states = [state, model(ids, state).state]
        stacked = torch.utils._pytree.tree_map(lambda *values: torch.stack(values), *states)
        together = torch.func.vmap(lambda state: model(ids, state).logits)(stacked)
        for logits, each in zip(together, states, strict=True):
            assert_close(logits.numpy(), stepping_plain(model, ids, each).numpy(), "float32", "node", "logits")
    assert "mamba_steps" in calls


GENERATE = """
    import mamba_core as mc
    config = mc.MambaConfig(d_model=20, n_layer=3, vocab_size=29, d_state=5, initializer_range=0.5)
    model = mc.build(config, backend="torch", device="cpu")
    print(mc.generate(model, [[1, 2, 3], [7], [4, 5, 6, 7, 8]], max_new_tokens=24).tokens)
"""


@pytest.mark.parametrize("native_library", ["", "0"])
def test_greedy_tokens_are_those_of_the_plain_operations(calls, native_library, monkeypatch):
    import textwrap

    tokens = mc.generate(mc.build(CONFIG, backend="torch", device="cpu"), PROMPTS, max_new_tokens=24).tokens
    assert calls.count("mamba_steps") == 23
    monkeypatch.setenv("MAMBA_CORE_NATIVE", native_library)
    code = textwrap.dedent(GENERATE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == repr(tokens), done.stderr


@pytest.mark.parametrize("shape", [(1, 16), (1, 48), (1, 1, 64), (1, 3, 2, 32)])
def test_a_head_of_another_width_is_the_plain_operations_to_refuse_or_compute(shape):
    import torch

    model, *_ = stepping()
    with torch.no_grad():
        try:
            logits = model.head(torch.ones(shape))
        except RuntimeError as error:
            assert "shapes cannot be multiplied" in str(error)  # noqa: PT017 (it may compute as well)
        else:
            wanted = torch.ones(shape) @ model.backbone.embeddings.weight.T
            assert_close(logits.numpy(), wanted.numpy(), "float32", "value", "logits")


def test_a_hook_of_all_modules_is_called(calls):
    import torch

    model, ids, state, _ = stepping()
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            model(ids, state)
    finally:
        handle.remove()
    assert "MambaMixer" in seen
    assert calls.count("mamba_steps") == 0


@pytest.mark.parametrize("name", ["initial_state", "D", "z", "delta_bias", "A"])
@pytest.mark.parametrize("kernel", ["native", "chunked"])
def test_an_argument_elsewhere_is_refused(name, kernel):
    import torch

    from mamba_core.backends.torch.ops.selective_scan import selective_scan

    shapes = {"x": (1, 5, 3), "delta": (1, 5, 3), "A": (3, 2), "B": (1, 5, 2), "C": (1, 5, 2), "D": (3,)}
    shapes |= {"z": (1, 5, 3), "delta_bias": (3,), "initial_state": (1, 3, 2)}
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"{name} is on meta; expected cpu"):
        selective_scan(**tensors | {name: tensors[name].to("meta")}, kernel=kernel)
