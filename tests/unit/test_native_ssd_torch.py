"""Mamba-2 on PyTorch takes the native step of its blocks, and only where it computes what the model would."""

import copy
import dataclasses

import pytest

import mamba_core as mc
from mamba_core.backends.native import library
from mamba_core.spec.tolerances import relative_l2
from tests.conformance.assertions import assert_close
from tests.conformance.cases.mamba2 import CONFIGS

torch = pytest.importorskip("torch")

from mamba_core.backends.torch import explain, private, quantize  # noqa: E402

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")
ODD = dataclasses.replace(CONFIGS["odd"], n_layer=3)


def pair(config=ODD, **settings):
    """(the model, the same in plain operations)."""
    torch.manual_seed(0)
    models = [mc.build(config, backend="torch", device="cpu", **settings | {"kernels": k}) for k in ("auto", "plain")]
    with torch.no_grad():
        for name, value in models[0].named_parameters():
            # Ones and zeros would hide what is left out.
            if name.endswith((".D", "norm.weight", ".bias")):
                value.normal_(0.5)
            # Within the limits of a step size.
            if name.endswith("dt_bias"):
                value.normal_(-2.0, 0.3)
        models[1].load_state_dict(models[0].state_dict())
    return models


def tokens(config, b, l):
    return torch.arange(b * l).reshape(b, l) % config.vocab_size


def assert_same(models, batch=2, dtype="float32", steps=1):
    """That positions after a prompt of the plain model are alike on both."""
    model, plain = models
    ids = tokens(model.config, batch, 4 + steps)
    with torch.no_grad():
        state = plain(ids[:, :4]).state
        found, wanted = (stepped(each, ids[:, 4:], state) for each in (model, plain))
    for value, other in zip(found, wanted, strict=True):
        assert (value.shape, value.dtype) == (other.shape, other.dtype)
        assert_close(value.float().numpy(), other.float().numpy(), dtype, "node", "result")


def stepped(model, ids, state):
    """Logits and states of a position after the other."""
    for column in range(ids.shape[1]):
        out = model(ids[:, column : column + 1], state)
        state = out.state
    return private.tree_leaves(out)


def ways(model, batch=2):
    return [run[:3] for run in explain(model, batch, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_every_batch(name, dtype):
    models = pair(CONFIGS[name], dtype=dtype)
    for batch in range(1, 9):
        assert ways(models[0], batch) == [(0, CONFIGS[name].n_layer - 1, "native_step")]
        assert_same(models, batch, dtype, steps=3 if batch == 2 else 1)
    assert ways(models[0], 9)[0][2] != "native_step"


def doubled(module):
    """A copy of a class whose result is twice as large."""

    class Doubled(type(module)):
        def forward(self, *arguments):
            result = super().forward(*arguments)
            return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    return Doubled


def subclassed(*path):
    def change(mixer):
        module = mixer.get_submodule(".".join(path))
        module.__class__ = doubled(module)

    return change


def hooked(*path):
    def double(module, given, result):
        return (2 * result[0], result[1]) if isinstance(result, tuple) else 2 * result

    return lambda mixer: mixer.get_submodule(".".join(path)).register_forward_hook(double)


def assigned(path, name, value):
    return lambda mixer: setattr(mixer.get_submodule(path), name, value)


def of_one_group(mixer):
    mixer.norm.groups = 1


def narrowed(name):
    def change(mixer):
        parameter = getattr(mixer, name)
        parameter.data = parameter.data.bfloat16().float().to(torch.float64)

    return change


def strided(mixer):
    mixer.out_proj.weight = torch.nn.Parameter(mixer.out_proj.weight.detach().T.contiguous().T)


def patched(mixer):
    mixer.norm.forward = lambda y, z, forward=mixer.norm.forward: 2 * forward(y, z)


CHANGES = {
    **{f"subclassed {'.'.join(path) or 'mixer'}": subclassed(*path) for path in ((), ("in_proj",), ("norm",))},
    **{f"hooked {'.'.join(path) or 'mixer'}": hooked(*path) for path in ((), ("out_proj",), ("conv1d",), ("norm",))},
    "patched norm": patched,
    "a norm of one group": of_one_group,
    "no bias of dt": lambda mixer: setattr(mixer, "dt_bias", None),
    "A_log in float64": narrowed("A_log"),
    "a transposed weight": strided,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_mixer_computes_what_it_was_changed_to(change):
    models, unchanged = pair(), pair()[0]
    for model in models:
        change(model.backbone.layers[1].mixer)
    assert [run[2] == "native_step" for run in ways(models[0])] == [True, False, True]
    assert explain(models[0], 2, 1)[1][3]["native_step"]
    assert_same(models)
    with torch.no_grad():
        found, before = (model(tokens(ODD, 2, 1)).logits for model in (models[0], unchanged))
    same = change in (strided, CHANGES["A_log in float64"])
    assert (relative_l2(found, before) < 1e-6) == same


def test_a_quantised_mixer_is_called():
    models = pair(dataclasses.replace(CONFIGS["base"], d_model=128, headdim=16))
    assert ways(models[0]) == [(0, 1, "native_step")]
    models = [quantize(model, bits=8) for model in models]
    assert ways(models[0])[0][2] != "native_step"
    assert_same(models)


def test_a_limit_that_is_none_is_refused():
    model, _ = pair()
    model.backbone.layers[1].mixer.dt_limit = (0.5, 0.1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"dt_limit is \(0.5, 0.1\)"):
        model(tokens(ODD, 2, 1))


def test_every_block_has_its_own_numbers():
    """In one call: the eps of both norms, the limit, the side of the gate, D a head or a channel, no norm."""
    models = pair()
    for model in models:
        first, second, third = model.backbone.layers
        first.norm.eps, first.mixer.norm.eps, first.mixer.norm.norm_before_gate = 3.0, 0.5, False
        second.mixer.dt_limit, second.mixer.norm.eps = (0.0, float("inf")), 2.0
        third.mixer.norm = None
        third.mixer.D = torch.nn.Parameter(torch.arange(1.0, 1.0 + len(third.mixer.A_log)))
    assert ways(models[0]) == [(0, 2, "native_step")]
    assert_same(models)


def test_blocks_of_several_kinds_are_cut_into_runs():
    """Mamba-1's between Mamba-2's, and a block of other sizes after them."""
    mamba = mc.MambaConfig(d_model=ODD.d_model, n_layer=1, vocab_size=ODD.vocab_size, residual_in_fp32=False)
    inside, narrow = pair(mamba), pair(dataclasses.replace(ODD, d_state=2))
    models, ids = pair(dataclasses.replace(ODD, n_layer=5)), tokens(ODD, 2, 1)
    states = []
    for model, other, third in zip(models, inside, narrow, strict=True):
        layers = model.backbone.layers
        layers[2], layers[4] = other.backbone.layers[0], third.backbone.layers[1]
        fresh = [each.init_state(2).layers for each in (model, other, third)]
        states.append((*fresh[0][:2], fresh[1][0], fresh[0][3], fresh[2][1]))
    state = models[0].init_state(2)._replace(layers=states[0])
    with torch.no_grad():
        found, wanted = (private.tree_leaves(model.backbone(ids, state, call())) for model in models)
    for value, other in zip(found, wanted, strict=True):
        assert_close(value.numpy(), other.numpy(), "float32", "node", "result")


def call():
    from mamba_core.backends.torch.positions import call_of

    return call_of(None, None, length=1)


def test_a_copy_and_a_saved_model_step_alike():
    models = pair()
    models[0] = copy.deepcopy(models[0])
    assert ways(models[0]) == [(0, 2, "native_step")]
    assert_same(models)


def test_a_compiled_model_steps_natively(monkeypatch):
    pytest.importorskip("torch", minversion="2.13", reason="older compilers take the plain operations")
    from mamba_core.backends.torch.kernels import native_ssd_step

    steps, called = native_ssd_step.library.ssd_steps, []
    monkeypatch.setattr(native_ssd_step.library, "ssd_steps", lambda given: (called.append(len(given)), steps(given)))
    models = pair()
    torch.compiler.reset()
    models[0].forward = torch.compile(models[0].forward, fullgraph=True, backend="aot_eager")
    assert_same(models)
    assert called == [3]


def test_vmap_over_states():
    (model, plain), ids = pair(), tokens(ODD, 2, 1)
    with torch.no_grad():
        states = [plain(ids).state, plain(tokens(ODD, 2, 3)).state]
        stacked = private.tree_map(lambda *values: torch.stack(values), *states)
        together = torch.func.vmap(lambda state: model(ids, state).logits)(stacked)
        for logits, state in zip(together, states, strict=True):
            assert_close(logits.numpy(), plain(ids, state).logits.numpy(), "float32", "node", "logits")


def test_tokens_are_those_of_the_plain_operations():
    prompts, drawn = [[1, 2, 3], [7], [4, 5, 6]], {"temperature": 1.0, "seed": 3}
    found, wanted = (mc.generate(model, prompts, max_new_tokens=16, **drawn).tokens for model in pair())
    assert found == wanted
    assert len({token for row in found for token in row}) > 3
