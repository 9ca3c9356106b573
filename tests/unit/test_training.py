"""The schedule, and what is refused before a step is made or a file is touched."""

import dataclasses
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.registry import installed
from mamba_core.weights.formats import CheckpointError

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16, d_state=2)
SETTINGS = mc.TrainSettings(steps=3, batch_size=2, length=8, warmup_steps=1)
DATA = np.arange(100) % 16


@pytest.fixture
def model():
    return mc.build(CONFIG, backend=installed()[0])


def test_schedule():
    settings = mc.TrainSettings(steps=110, warmup_steps=10, learning_rate=1.0, final_fraction=0.1)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(9) == pytest.approx(1.0)
    assert settings.rate(10) == pytest.approx(1.0)
    assert settings.rate(35) == pytest.approx(0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2)
    assert settings.rate(60) == pytest.approx(0.55)
    assert settings.rate(110) == pytest.approx(0.1)
    assert settings.rate(500) == pytest.approx(0.1)
    assert mc.TrainSettings(warmup_steps=0, learning_rate=1.0).rate(0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("steps", 1.5), ("batch_size", 0), ("length", -1), ("warmup_steps", -5), ("learning_rate", 0.0),
        ("learning_rate", float("nan")), ("beta1", 1.0), ("beta2", -0.1), ("weight_decay", -1.0), ("clip_norm", 0.0),
        ("weight_decay", float("nan")), ("final_fraction", 2.0), ("seed", True),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        mc.TrainSettings(**{name: value})


@pytest.mark.parametrize("data", [DATA + 0.5, DATA.reshape(10, 10), [1.0, 2.0], DATA + 1, DATA - 1])
def test_data_that_does_not_fit_is_refused(model, data):
    with pytest.raises(ValueError, match="the data"):
        mc.train(model, data, SETTINGS)


def test_a_folder_of_something_else_is_not_overwritten(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists"):
        mc.train(model, DATA, SETTINGS, checkpoint=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.fixture
def run(model, tmp_path):
    """A finished run; resuming it makes no further step but checks everything."""
    mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run")
    return tmp_path / "run"


def resume(run, model=None, data=DATA, settings=SETTINGS):
    model = model or mc.load(run, backend=installed()[0])
    return mc.train(model, data, settings, resume=run)


def test_a_checkpoint_that_a_killed_process_moved_away_is_found(run):
    aside = run.with_name(f".{run.name}.0123abcd.old")
    model = mc.load(run, backend=installed()[0])
    run.rename(aside)
    with pytest.raises(CheckpointError, match="exists; resume the run in it"):
        mc.train(model, DATA, SETTINGS, checkpoint=run)
    run.rename(aside)
    assert len(resume(run, model)) == 3


def test_only_the_same_run_is_resumed(run):
    assert len(resume(run)) == 3
    with pytest.raises(ValueError, match=r"trained with learning_rate=0\.001, not 0\.5"):
        resume(run, settings=dataclasses.replace(SETTINGS, learning_rate=0.5))
    with pytest.raises(ValueError, match="other data"):
        resume(run, data=DATA[::-1])
    with pytest.raises(ValueError, match="the model is not the one in"):
        resume(run, model=mc.build(CONFIG, backend=installed()[0], seed=9))
    with pytest.raises(ValueError, match="another config"):
        resume(run, model=mc.build(dataclasses.replace(CONFIG, d_state=4), backend=installed()[0]))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda log: log["history"].pop(),
        lambda log: log.pop("settings"),
        lambda log: log.update(history={}),
        lambda log: log["history"].reverse(),
        lambda log: log["history"][1].update(step=1.0),
        lambda log: log["history"][1].pop("learning_rate"),
        lambda log: log["history"][1].update(gradient_norm=[1.0]),
        lambda log: log["history"][1].update(loss=float("nan")),
        lambda log: log["history"][1].update(loss=10**400),
        lambda log: log["history"].__setitem__(0, "loss"),
    ],
    ids=[
        *(
            "short",
            "no settings",
            "no list",
            "backwards",
            "a fraction",
            "no rate",
            "a list",
            "no number",
            "huge",
            "no entry",
        ),
    ],
)
def test_a_broken_log_is_refused(run, break_it):
    log = json.loads((run / "training.json").read_text())
    break_it(log)
    (run / "training.json").write_text(json.dumps(log))
    with pytest.raises(CheckpointError):
        resume(run)


def test_a_broken_optimizer_is_refused(run):
    from safetensors.numpy import load_file, save_file

    file = run / "optimizer.safetensors"
    stored = load_file(file)
    save_file({name: value for name, value in stored.items() if name != "m.backbone.norm_f.weight"}, file)
    with pytest.raises(CheckpointError, match="norm_f"):
        resume(run)
    save_file(stored | {"v.backbone.norm_f.weight": np.zeros((1, 8), np.float32)}, file)
    with pytest.raises(CheckpointError, match="shapes"):
        resume(run)


def test_the_tokenizer_stays_with_the_model(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    mc.train(model, DATA, SETTINGS, checkpoint=tmp_path / "run", tokenizer=tmp_path / "tokenizer.json")
    loaded = mc.load(tmp_path / "run", backend=installed()[0])
    mc.save(loaded, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match="tokenizer"):
        mc.generate(loaded, "text")
