"""Held-out data: what is predicted, what an evaluation leaves alone, and what a resumed run holds out."""

import functools
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import batches, registry
from mamba_core.evaluation import HeldOut
from mamba_core.registry import installed
from mamba_core.weights.formats import CheckpointError

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16, d_state=2)
SETTINGS = mc.TrainSettings(steps=4, batch_size=2, length=8, warmup_steps=1, learning_rate=1e-2)
DATA = np.random.default_rng(0).integers(0, 16, 120)
HELD = np.random.default_rng(1).integers(0, 16, 44)  # six windows in three batches; the last window counts three


@pytest.fixture(params=installed())
def name(request):
    return request.param


@pytest.fixture
def model():
    return mc.build(CONFIG, backend=installed()[0])


def losses(history):
    return {entry["step"]: entry["held_out_loss"] for entry in history if "held_out_loss" in entry}


@pytest.mark.parametrize("tokens", [9, 10, 16, 17, 18, 33, 44])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_token_but_the_first_is_predicted_once(tokens, batch_size):
    seen, shapes = [], set()
    held = HeldOut(np.arange(tokens), length=8, batch_size=batch_size, steps=1, every=0)
    for rows, counts in held.batches():
        shapes |= {(rows.shape, counts.shape)}
        seen += rows[:, 1:][counts].tolist()
        # In a window of consecutive tokens, which may be any but the last in training too.
        assert (np.diff(rows) == 1).all()
    assert seen == list(range(1, tokens))
    assert shapes == {((batch_size, 9), (batch_size, 8))}


@pytest.mark.parametrize("every", [0, 1, 3, 7, 50])
def test_an_evaluation_is_due_at_each_interval_and_at_the_end(every):
    held = HeldOut(DATA, length=8, batch_size=2, steps=20, every=every)
    assert [done for done in range(1, 21) if held.due(done)] == sorted({*range(every or 20, 21, every or 20), 20})


def test_the_mean_is_over_tokens(model):
    """Not over batches, whose last one counts fewer."""

    class Counting:
        def evaluate(self, tokens, counts):
            return float(tokens[:, 1:][counts].sum())

    for batch_size in (1, 2, 5):
        held = HeldOut(HELD, length=8, batch_size=batch_size, steps=1, every=0)
        assert held.loss(Counting(), lambda: False) == HELD[1:].mean()


def test_by_default_there_is_one_at_each_tenth_and_at_the_end(model):
    settings = mc.TrainSettings(steps=25, batch_size=1, length=4, warmup_steps=1)
    assert list(losses(mc.train(model, DATA, settings, held_out=HELD))) == [*range(2, 25, 3), 24]


def noisy(model, rate):
    """The model with a projection that drops inputs in training, and draws a number and counts at every call."""
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj = KINDS[model.backend]()(mixer.in_proj, rate)
    return model


@functools.cache
def _noisy_torch():
    import torch

    class Noisy(torch.nn.Module):
        def __init__(self, inside, rate):
            super().__init__()
            self.inside, self.dropout = inside, torch.nn.Dropout(rate)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.inside(self.dropout(x)) * (1 + 0.01 * self.calls + 0.1 * torch.rand(()))

    return Noisy


@functools.cache
def _noisy_mlx():
    import mlx.core as mx
    import mlx.nn as nn

    class Noisy(nn.Module):
        def __init__(self, inside, rate):
            super().__init__()
            self.inside, self.dropout, self.calls = inside, nn.Dropout(rate), mx.zeros(())
            self.freeze(keys=["calls"], recurse=False)

        def __call__(self, x):
            self.calls = self.calls + 1
            return self.inside(self.dropout(x)) * (1 + 0.01 * self.calls + 0.1 * mx.random.uniform())

    return Noisy


@functools.cache
def _noisy_jax():
    import jax
    import jax.numpy as jnp
    from flax import nnx

    class Noisy(nnx.Module):
        def __init__(self, inside, rate):
            self.inside, self.rngs, self.calls = inside, nnx.Rngs(3), nnx.BatchStat(jnp.zeros(()))
            self.dropout = nnx.Dropout(rate, rngs=self.rngs)

        def __call__(self, x):
            self.calls[...] += 1
            noise = jax.random.uniform(self.rngs.noise())
            return self.inside(self.dropout(x)) * (1 + 0.01 * self.calls[...] + 0.1 * noise)

    return Noisy


# Each of one class, so that JAX compiles it once.
KINDS = {"torch": _noisy_torch, "mlx": _noisy_mlx, "jax": _noisy_jax}


def seeded(name):
    """The random numbers that do not belong to a model."""
    if name == "torch":
        import torch

        torch.manual_seed(0)
    if name == "mlx":
        import mlx.core as mx

        mx.random.seed(0)
    return mc.build(CONFIG, backend=name, device="cpu")


def test_an_evaluation_changes_no_later_step(name):
    """Neither random numbers, nor modes, nor what a layer counts."""
    runs = []
    for every in (None, 1, 3):
        evaluated = {} if every is None else {"held_out": HELD, "evaluate_every": every}
        runs.append(mc.train(noisy(seeded(name), 0.5), DATA, SETTINGS, **evaluated))
    steps = [[{key: entry[key] for key in ("loss", "gradient_norm")} for entry in run] for run in runs]
    assert steps[0] == steps[1] == steps[2]
    assert [list(losses(run)) for run in runs] == [[], [0, 1, 2, 3], [2, 3]]
    assert losses(runs[1])[2] == losses(runs[2])[2]


def modes(model):
    """Of the modules that have one; some may be in evaluation form while others train."""
    if model.backend == "jax":
        return [model.backbone.layers[0].mixer.in_proj.dropout.deterministic]
    return [module.training for module in model.modules()]


def test_dropout_does_not_act_and_modes_stay(name):
    tokens, counts = next(HeldOut(HELD, 8, 2, 1, 0).batches())
    found = []
    for rate in (0.5, 0.0):
        model = noisy(seeded(name), rate)
        model.backbone.norm_f.eval()
        trainer, before = registry.get(name).trainer(model, SETTINGS), modes(model)
        found += [trainer.evaluate(tokens, counts) for _ in range(2)]
        assert modes(model) == before
        assert len(set(before)) == 2 or name == "jax"
    assert len(set(found)) == 1


def test_a_model_s_own_call_is_called(name):
    model = seeded(name)
    kind, method = type(model), {"torch": "forward"}.get(name, "__call__")

    def call(self, *arguments, **named):
        output = getattr(kind, method)(self, *arguments, **named)
        return output._replace(logits=output.logits * 0)

    model.__class__ = type("Even", (kind,), {method: call})
    history = mc.train(model, DATA, SETTINGS, held_out=HELD, evaluate_every=0)
    assert losses(history) == {3: pytest.approx(np.log(model.config.padded_vocab_size))}


def test_a_fraction_is_the_end_of_the_data_and_is_never_trained_on(model, monkeypatch):
    data, seen, real = np.concatenate([DATA % 8, HELD]), [], batches.batch
    monkeypatch.setattr(batches, "batch", lambda *given: seen.append(real(*given)) or seen[-1])
    monkeypatch.setattr(HeldOut, "loss", lambda held, *_: seen.append(held.data) or 1.0)
    mc.train(model, data, SETTINGS, held_out=len(HELD) / len(data), evaluate_every=0)
    np.testing.assert_array_equal(seen.pop(), HELD)
    assert len(seen) == SETTINGS.steps
    assert all(tokens.max() < 8 for tokens in seen)


def test_a_resumed_run_holds_out_the_same_and_may_be_evaluated_otherwise(tmp_path):
    name = installed()[0]
    whole = mc.train(mc.build(CONFIG, backend=name), DATA, SETTINGS, held_out=0.25, evaluate_every=1)
    made = []
    kept = {"checkpoint": tmp_path / "run", "held_out": 0.25, "log": made.append, "stop": lambda: len(made) == 2}
    mc.train(mc.build(CONFIG, backend=name), DATA, SETTINGS, **kept)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["held_out_tokens"] == 30

    def resumed(**settings):
        return mc.train(mc.load(tmp_path / "run", backend=name), DATA, SETTINGS, resume=tmp_path / "run", **settings)

    assert resumed() == whole
    assert resumed(held_out=0.25) == whole
    assert [entry["loss"] for entry in resumed(held_out=HELD)] == [entry["loss"] for entry in whole]
    assert list(losses(resumed(evaluate_every=3))) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="held out the last 30 of its data, not 60"):
        resumed(held_out=0.5)


def test_a_run_that_held_out_nothing_is_not_resumed_as_if_it_had(model, tmp_path):
    mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="held out the last 0 of its data, not 30"):
        mc.train(model, DATA, SETTINGS, resume=tmp_path / "run", held_out=0.25)
    # An evaluation that is new is made at once.
    found = mc.train(model, DATA, SETTINGS, resume=tmp_path / "run", checkpoint=tmp_path / "run", held_out=HELD)
    assert list(losses(found)) == [3]
    assert json.loads((tmp_path / "run" / "training.json").read_text())["history"] == found


@pytest.mark.parametrize("at", [2, 4])
def test_an_evaluation_is_cut_short_and_made_when_the_run_is_resumed(at, tmp_path):
    """After the second update, and after the last."""
    name, batches = installed()[0], []
    settings = {"held_out": HELD, "evaluate_every": 2}
    whole = mc.train(mc.build(CONFIG, backend=name), DATA, SETTINGS, **settings)
    first = mc.train(
        mc.build(CONFIG, backend=name),
        DATA,
        SETTINGS,
        checkpoint=tmp_path / "run",
        evaluating=lambda done, total: batches.append((done, total)),
        stop=lambda: len(batches) == 2 * at - 2,
        **settings,
    )
    assert batches == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 3), (1, 3)][: 2 * at - 2]
    assert len(first) == at
    assert "held_out_loss" not in first[-1]
    logged = []
    found = mc.train(
        mc.load(tmp_path / "run", backend=name),
        DATA,
        SETTINGS,
        resume=tmp_path / "run",
        checkpoint=tmp_path / "run",
        log=logged.append,
        **settings,
    )
    assert found == whole
    assert logged == whole[at - 1 :]
    assert json.loads((tmp_path / "run" / "training.json").read_text())["history"] == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": HELD[:8]}, "the held-out data has 8 tokens; expected more than length=8"),
        ({"held_out": HELD + 1}, "the held-out data holds tokens 1 to 16; vocab_size is 16"),
        ({"held_out": HELD / 2}, "the held-out data is float64"),
        ({"held_out": 0.01}, "the held-out data has 1 tokens"),
        ({"held_out": 0.95}, "the data that is not held out has 6 tokens"),
        ({"held_out": 1.0}, "held_out is 1.0; expected an array of tokens, or a fraction of the data, between 0 and 1"),
        ({"held_out": float("nan")}, "held_out is nan"),
        ({"held_out": 50}, "held_out is 50"),
        ({"held_out": HELD, "evaluate_every": -1}, "evaluate_every is -1; expected an integer >= 0"),
        ({"evaluate_every": 2}, "evaluate_every is 2, but no data is held out"),
    ],
)
def test_what_cannot_be_held_out_is_refused_before_a_step(model, settings, message, monkeypatch):
    monkeypatch.setattr(batches, "batch", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=message):
        mc.train(model, DATA, SETTINGS, **settings)


def test_a_loss_that_is_not_finite_ends_the_run(model, monkeypatch):
    monkeypatch.setattr(HeldOut, "loss", lambda *_: float("nan"))
    with pytest.raises(FloatingPointError, match="the loss on held-out data is nan at step 3"):
        mc.train(model, DATA, SETTINGS, held_out=HELD, evaluate_every=0)


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_checkpoint(model, tmp_path, monkeypatch):
    trainer = type(registry.get(model.backend).trainer(model, SETTINGS))
    monkeypatch.setattr(trainer, "step", lambda *_: (1.0, float("inf")))
    with pytest.raises(FloatingPointError, match="the gradient's norm is inf at step 0"):
        mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run", checkpoint_every=1)
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_refused_before_a_step(model, tmp_path, monkeypatch):
    free = [0]
    monkeypatch.setattr("mamba_core.runs.shutil.disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    with pytest.raises(CheckpointError, match=r"a checkpoint takes 0 MB, and the disk has 0 MB left"):
        mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run")
    mc.train(model, DATA, SETTINGS)
    # What a checkpoint takes is near what is asked for: no less than its arrays, which are all but headers.
    sizes = sum(value.nbytes for value in registry.get(model.backend).parameters(model).values())
    free[0] = 3 * sizes
    mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run")
    free[0] -= 1
    with pytest.raises(CheckpointError, match="disk"):
        mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "other")


def test_a_tokenizer_that_goes_while_the_run_goes_is_kept(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    gone = {"tokenizer": tmp_path / "tokenizer.json", "log": lambda _: (tmp_path / "tokenizer.json").unlink(True)}
    mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run", **gone)
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "{}"
