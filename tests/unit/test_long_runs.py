"""Commands that work for long: what ends them keeps the work, what they write is tried first, and they say how far."""

import importlib
import json
import shlex
import signal

import pytest

import mamba_core as mc
from mamba_core import training
from mamba_core.cli import main
from mamba_core.registry import installed

pytest.importorskip("rich")
train_command = importlib.import_module("mamba_core.cli.train")
STEPS = 6


@pytest.fixture
def command(tmp_path):
    """The command line of a run, without its --out."""
    (tmp_path / "a.py").write_text("def main():\n    return 1\n" * 40)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 8, "n_layer": 1, "vocab_size": 256, "d_state": 2}))
    files = ["--data", str(tmp_path / "a.py"), "--config", str(tmp_path / "config.json")]
    sizes = ["--steps", str(STEPS), "--batch-size", "1", "--length", "8", "--warmup-steps", "2"]
    return ["train", "--backend", installed()[0], *files, *sizes]


@pytest.fixture
def interrupted(monkeypatch):
    """Sends signals to this process during one step of a run: a function of them and of the step."""

    def send(step, *signals):
        real = train_command._Pace.after

        def after(self, steps):
            if steps == step:
                for each in signals:
                    signal.raise_signal(each)
            return real(self, steps)

        monkeypatch.setattr(train_command._Pace, "after", after)

    return send


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_that_goes_on_exactly(command, interrupted, number, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main([*command, "--out", str(whole), "--json"]) == 0
    expected = lines(capsys.readouterr().out)[-1]["history"]
    before = signal.getsignal(number)
    interrupted(4, number)
    assert main([*command, "--out", str(stopped), "--json"]) == 128 + number
    shown = capsys.readouterr()
    assert signal.getsignal(number) is before
    assert lines(shown.out)[-1]["history"] == expected[:4]
    assert f"stopped after step 4 of {STEPS}; go on with: mamba-core train" in shown.err
    resume = shlex.split(shown.err.partition("go on with: ")[2])
    assert resume[0] == "mamba-core"
    assert main([*resume[1:], "--backend", installed()[0], "--json"]) == 0
    assert lines(capsys.readouterr().out)[-1]["history"] == expected
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def test_a_second_signal_ends_it_at_once(command, interrupted, tmp_path):
    interrupted(4, signal.SIGINT, signal.SIGINT)
    assert main([*command, "--out", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


def test_a_signal_in_the_last_step_ends_nothing(command, interrupted, tmp_path):
    interrupted(STEPS, signal.SIGTERM)
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0


def test_json_has_a_line_for_every_interval(command, tmp_path, capsys):
    assert main([*command, "--out", str(tmp_path / "out"), "--json", "--log-every", "2"]) == 0
    *steps, last = lines(capsys.readouterr().out)
    assert [entry["step"] for entry in steps] == [1, 3, 5]
    assert all({"loss", "learning_rate", "tokens_per_second", "seconds_left"} <= entry.keys() for entry in steps)
    assert steps[-1]["seconds_left"] == 0
    assert [entry["loss"] for entry in steps] == [last["history"][at]["loss"] for at in (1, 3, 5)]
    assert main([*command, "--out", str(tmp_path / "other"), "--log-every", "0"]) == 2


def test_square_brackets_are_text(command, tmp_path, capsys):
    out = tmp_path / "a[" / "x]"
    assert main([*command, "--out", str(out)]) == 0
    assert str(out) in "".join(capsys.readouterr().out.split("\n"))
    assert main(["inspect", str(out)]) == 0


def test_training_tries_its_target_first(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "batch", lambda *_: pytest.fail("a step was made"))
    (tmp_path / "file").write_text("")
    assert main([*command, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["convert", "parity", "bench"])
def test_reports_are_tried_first(name, tmp_path, monkeypatch, capsys):
    """Of a target below a file."""
    file = tmp_path / "file"
    file.write_text("")
    model = mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=24), backend=installed()[0])
    mc.save(model, tmp_path / "model")
    arguments = {
        "convert": [
            str(tmp_path / "model"),
            str(tmp_path / "out"),
            "--to",
            "mamba_ssm",
            "--report",
            str(file / "a.json"),
        ],
        "parity": [str(tmp_path / "model"), "--out", str(file / "a")],
        "bench": ["--quick", "--case", "model", "--out", str(file / "a.json")],
    }[name]
    module = importlib.import_module(f"mamba_core.cli.{name}")
    work = {"convert": "convert", "parity": "parity", "bench": "_measure"}[name]
    monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("the work was begun"))
    assert main([name, *arguments]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
