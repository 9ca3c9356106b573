"""Labelled tasks, and those with one output a row, on every architecture: values, losses, gradients, training."""

import functools

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import architectures, tasks
from mamba_core.spec.init import initial_values
from mamba_core.spec.losses import IGNORED
from mamba_core.spec.reference import ReferenceModel

from . import models
from .assertions import assert_close, assert_zero
from .cases import bases
from .heads import FIRST, KINDS, LABELLED, LENGTH, MASK, OF_ALL, PAIRS, arguments, batch_of, config_of

SETTINGS = mc.TrainSettings(steps=12, warmup_steps=1, learning_rate=2e-2, weight_decay=0.0)


@pytest.fixture(params=bases(), scope="module")
def architecture(request):
    return request.param


@pytest.fixture(params=KINDS, scope="module")
def kind(request):
    return request.param


@pytest.fixture(params=LABELLED, scope="module")
def labelled(request):
    return request.param


@functools.cache
def values(architecture, kind):
    return dict(initial_values(config_of(architecture, kind), 1))


@functools.cache
def reference(architecture, kind):
    return ReferenceModel(config_of(architecture, kind), values(architecture, kind))


@models.by_backend
def built(backend, architecture, kind, dtype="float32"):
    return backend.build(config_of(architecture, kind), values(architecture, kind).items(), dtype=dtype)


def compiled_for(backend, chosen: bool) -> None:
    """Skips on JAX, which compiles each program that a test makes, what is not chosen."""
    if backend.name == "jax" and not chosen:
        pytest.skip("JAX compiles few of these")


def cut(batch, rows, where=slice(None)):
    """Some rows and positions of what a model is called with."""
    return {
        name: value[rows, where] if value.shape[1:2] == (LENGTH,) else value[rows]
        for name, value in batch.items()
        if name != "targets"
    }


def called(backend, model, batch, state=None, **further):
    given = {name: backend.from_numpy(value, device=model.device) for name, value in arguments(batch).items()}
    return model(backend.from_numpy(batch["inputs"], device=model.device), state, **given, **further)


@pytest.mark.parametrize(("architecture", "kind"), PAIRS)
def test_every_node_equals_the_reference(backend, architecture, kind):
    batch, model, observed, expected = batch_of(architecture, kind), built(backend, architecture, kind), {}, {}
    wanted = reference(architecture, kind)(batch["inputs"], observe=expected.__setitem__, **arguments(batch))
    out = called(backend, model, batch, observe=lambda node, value: observed.update({node: backend.to_numpy(value)}))
    assert list(observed) == list(expected)
    last = list(expected)[-1]
    for node, value in expected.items():
        assert_close(observed[node], value, "float32", "value" if node == last else "node", node)
    assert type(out) is type(wanted)
    assert out._fields[0] == type(out)._fields[0]
    np.testing.assert_array_equal(backend.to_numpy(out[0]), observed[last])
    models.assert_states(backend, config_of(architecture, kind), out.state, wanted.state, "after the last position")


def test_each_row_alone(backend, kind):
    """A row without its padding, on either side, has the output and the loss of the padded one; one of padding none."""
    batch, model = batch_of(FIRST, kind), built(backend, FIRST, kind)
    whole = backend.to_numpy(called(backend, model, batch)[0])
    alone = cut(batch, slice(1, 2), slice(2, 6))
    assert alone.pop("mask").all()
    found = backend.to_numpy(called(backend, model, alone)[0])
    padded = whole[1:2] if tasks.of(model.config).pools else whole[1:2, 2:6]
    assert_close(found, padded, "float32", "value", "the row alone")
    if not tasks.of(model.config).pools:
        assert_zero(whole[~MASK], "what is masked")


def test_what_is_masked_changes_nothing(backend, kind):
    batch, model = dict(batch_of(FIRST, kind)), built(backend, FIRST, kind)
    whole = backend.to_numpy(called(backend, model, batch)[0])
    others = {name: value[::-1] for name, value in cut(batch, slice(None)).items() if name != "mask"}
    for name, value in others.items():
        if value.shape[1:2] == (LENGTH,):
            batch[name] = np.where(MASK.reshape(*MASK.shape, *(1,) * (value.ndim - 2)), batch[name], value)
    assert not np.array_equal(batch["inputs"], batch_of(FIRST, kind)["inputs"])
    np.testing.assert_array_equal(backend.to_numpy(called(backend, model, batch)[0])[:3], whole[:3])


@pytest.mark.parametrize(("architecture", "labelled"), [pair for pair in PAIRS if pair[1] in LABELLED])
def test_the_loss_and_its_gradients_equal_the_reference(backend, architecture, labelled):
    compiled_for(backend, architecture == FIRST or labelled == OF_ALL[0])
    batch, model = batch_of(architecture, labelled), built(backend, architecture, labelled)
    loss, gradients = backend.loss_and_gradients(model, batch)
    expected, wanted = reference_loss(architecture, labelled)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert set(gradients) == set(wanted)
    for name, value in wanted.items():
        assert_close(gradients[name] * 10, value * 10, "float32", "gradient", name)


@functools.cache
def reference_loss(architecture, kind):
    batch, model = batch_of(architecture, kind), reference(architecture, kind)
    output = model(batch["inputs"], **arguments(batch))[0]
    loss, doutput = model.task.loss(model.config, output, batch["targets"], batch["mask"])
    gradients, _ = model.vjp(doutput, batch["inputs"], **arguments(batch))
    return loss, {name: gradients[name] for name in model.parameters}


def test_the_head_is_trained(backend, labelled):
    """The first loss is the reference's, and so is the gradient's norm; the loss falls; evaluating changes no bit."""
    compiled_for(backend, labelled == "quantiles")
    batch, config = batch_of(FIRST, labelled), config_of(FIRST, labelled)
    model = backend.build(config, values(FIRST, labelled).items())
    trainer = backend.trainer(model, SETTINGS)
    expected, gradients = reference_loss(FIRST, labelled)
    assert trainer.evaluate(batch) == pytest.approx(expected, rel=1e-5)
    loss, norm = trainer.step(batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert norm == pytest.approx(np.sqrt(sum((value**2).sum() for value in gradients.values())), rel=1e-4)
    for _ in range(SETTINGS.steps - 1):
        last, _ = trainer.step(batch)
    assert last < 0.7 * loss
    changed = [
        name
        for name, value in backend.parameters(model).items()
        if not np.array_equal(value, values(FIRST, labelled)[name])
    ]
    assert set(changed) == set(gradients)


def test_the_last_position_of_a_sequence_in_pieces(backend, architecture):
    """Its output is that of the whole."""
    if not architectures.traits(bases()[architecture]).steps:
        pytest.skip(f"{architecture} has no steps")
    compiled_for(backend, architecture == FIRST)
    batch, model = batch_of(architecture, "classes"), built(backend, architecture, "classes")
    first = called(backend, model, cut(batch, slice(0, 1), slice(0, 5)))
    second = called(backend, model, cut(batch, slice(0, 1), slice(5, 9)), first.state)
    whole = reference(architecture, "classes")(batch["inputs"], **arguments(batch)).logits[:1]
    assert_close(backend.to_numpy(second.logits), whole, "float32", "value", "the last piece")


def test_packed_sequences(backend, architecture):
    """Labels of tokens are those of each sequence alone; one output a row is refused."""
    compiled_for(backend, architecture == FIRST)
    inputs, ids = batch_of(architecture, "tokens")["inputs"], (np.arange(LENGTH) > 4).astype(np.int32)[None]
    given = {"segment_ids": backend.from_numpy(np.repeat(ids, len(inputs), 0))}
    native = backend.from_numpy(inputs)
    for kind in KINDS:
        if (
            not tasks.of(config_of(architecture, kind)).pools
            or tasks.of(config_of(architecture, kind)).inputs != "input_ids"
        ):
            continue
        with pytest.raises(ValueError, match=r"one output a row|cannot separate packed sequences"):
            built(backend, architecture, kind)(native, **given)
    if architectures.traits(bases()[architecture]).packs:
        found = backend.to_numpy(built(backend, architecture, "tokens")(native, **given).logits)
        alone = [reference(architecture, "tokens")(inputs[:, part]).logits for part in (slice(0, 5), slice(5, 9))]
        assert_close(found, np.concatenate(alone, 1), "float32", "value", "the packed logits")


@pytest.mark.parametrize("kind", OF_ALL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(backend, kind, dtype):
    compiled_for(backend, dtype == "bfloat16")
    batch, model = batch_of(FIRST, kind), built(backend, FIRST, kind, dtype)
    found = backend.to_numpy(called(backend, model, batch)[0])
    assert found.dtype.name == ("float32" if tasks.of(model.config).float32 else dtype)
    wanted = reference(FIRST, kind)(batch["inputs"], **arguments(batch))[0]
    assert_close(found, wanted, dtype, "value", "output")


def test_a_batch_that_does_not_fit_is_refused(backend):
    model, batch = built(backend, FIRST, "classes"), batch_of(FIRST, "classes")
    wrong = {
        r"targets holds 0 to 3; expected 0 to 2, or -100": {"targets": np.array([0, 3, 1, 1])},
        r"targets has shape \(3,\); expected \(b,\) = \(4,\)": {"targets": np.array([0, 1, 1])},
        r"targets is float32; expected integers": {"targets": np.zeros(4, np.float32)},
        r"no target of the batch counts": {"targets": np.full(4, IGNORED)},
        r"the batch has inputs, mask, targets, labels; expected inputs and targets": {"labels": np.zeros(4)},
        r"input_ids holds ids outside 0\.\.": {"inputs": batch["inputs"] + 1000},
        r"mask has shape \(1, 9\); expected \(b, l\) = \(4, 9\)": {"mask": batch["mask"][:1]},
        r"one output a row": {"segment_ids": np.zeros((4, 9), np.int32)},
    }
    for message, other in wrong.items():
        with pytest.raises((ValueError, TypeError), match=message):
            backend.loss_and_gradients(model, batch | other)
    with pytest.raises(TypeError, match="the batch is ndarray; expected a mapping or a tuple"):
        backend.loss_and_gradients(model, batch["inputs"])
