"""Training on examples with targets: what a batch is, held-out examples, checkpoints, and what is refused."""

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import batches, registry
from mamba_core.spec.reference import ReferenceModel

BACKEND = registry.get(registry.installed()[0])
CONFIG = mc.MambaConfig(
    d_model=8, n_layer=1, vocab_size=16, d_state=2, task="sequence_classification", task_options={"pooling": "mean"}
)
SETTINGS = mc.TrainSettings(steps=12, batch_size=4, warmup_steps=2, learning_rate=3e-2)
RNG = np.random.default_rng(0)
INPUTS = RNG.integers(0, 16, (22, 6)).astype(np.int32)
MASK = np.arange(6) < RNG.integers(1, 7, 22)[:, None]
# Whether an even token is in it.
TARGETS = ((INPUTS % 2 == 0) & MASK).sum(1) > MASK.sum(1) / 2
DATA = {"inputs": INPUTS, "targets": TARGETS.astype(np.int32), "mask": MASK}


def test_every_example_comes_before_one_comes_again():
    data = batches.read("the data", DATA, CONFIG)
    found = [data.batch(SETTINGS, step) for step in range(11)]
    for first in (0, 11):
        rows = np.concatenate([batch["inputs"] for batch in found])[2 * first : 2 * first + 22]
        np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(INPUTS, axis=0))
    assert not np.array_equal(found[0]["inputs"], data.batch(SETTINGS, 11)["inputs"])
    where = [np.flatnonzero((row == INPUTS).all(1))[0] for row in found[3]["inputs"]]
    for name, array in DATA.items():
        np.testing.assert_array_equal(found[3][name], array[where])


def test_a_classifier_is_trained_and_its_run_resumed(tmp_path):
    """In one run and in two, to the same bits; the loss on held-out examples is the reference's."""
    kept, resumed = tmp_path / "whole", tmp_path / "parts"
    model = mc.build(CONFIG, backend=BACKEND.name, seed=1)
    settings = {"held_out": 0.4, "evaluate_every": 6}
    history = mc.train(model, DATA, SETTINGS, checkpoint=kept, **settings)
    assert history[-1]["held_out_loss"] < 0.8 * history[0]["loss"]
    reference = ReferenceModel(CONFIG, dict(BACKEND.parameters(model)))
    ends = {name: array[-9:] for name, array in DATA.items()}
    logits = reference(ends["inputs"], mask=ends["mask"]).logits
    expected, _ = reference.task.loss(CONFIG, logits, ends["targets"], ends["mask"])
    assert history[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-5)
    first = mc.build(CONFIG, backend=BACKEND.name, seed=1)
    stops = iter([False] * 8 + [True] * 9)
    mc.train(first, DATA, SETTINGS, checkpoint=resumed, stop=lambda: next(stops), **settings)
    again = mc.load(resumed, backend=BACKEND.name)
    assert again.config == CONFIG
    history_again = mc.train(again, DATA, SETTINGS, resume=resumed, evaluate_every=6)
    assert history_again == history
    for name, value in BACKEND.parameters(again).items():
        np.testing.assert_array_equal(value, BACKEND.parameters(model)[name])
    with pytest.raises(ValueError, match="other data"):
        mc.train(mc.load(kept, backend=BACKEND.name), DATA | {"targets": 1 - DATA["targets"]}, SETTINGS, resume=kept)


def test_examples_that_do_not_fit_are_refused():
    model = mc.build(CONFIG, backend=BACKEND.name, seed=1)
    wrong = {
        "the data, of which batches are made: the batch is ndarray; expected a mapping or a tuple": INPUTS,
        r"the data, .*: targets has shape \(21,\); expected \(b,\) = \(22,\)": (INPUTS, TARGETS[:-1].astype(int)),
        "the data, .*: targets holds 0 to 2; expected 0 to 1": (INPUTS, TARGETS.astype(int) * 2),
        "the data, .*: targets is bool; expected integers": (INPUTS, TARGETS),
    }
    for message, data in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            mc.train(model, data, SETTINGS)
