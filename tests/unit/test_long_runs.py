"""Commands that work for long: what ends them keeps the work, what they write is tried first, and they say how far."""

import errno
import importlib
import json
import re
import shlex
import signal
import sys

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import batches, cli, runs, training
from mamba_core.cli import main
from mamba_core.registry import installed
from mamba_core.tokenizer import ByteTokenizer

pytest.importorskip("rich")
train_command = importlib.import_module("mamba_core.cli.train")
pace = importlib.import_module("mamba_core.cli.pace")
STEPS = 6


@pytest.fixture
def command(tmp_path):
    """The command line of a run, without its --out."""
    (tmp_path / "a b.py").write_text("def main():\n    return 1\n" * 40)
    (tmp_path / "held out.py").write_text("def other():\n    return 2\n" * 3)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 8, "n_layer": 1, "vocab_size": 256, "d_state": 2}))
    files = ["--data", str(tmp_path / "a b.py"), "--config", str(tmp_path / "config.json")]
    sizes = ["--steps", str(STEPS), "--batch-size", "1", "--length", "8", "--warmup-steps", "2"]
    return ["train", "--backend", installed()[0], *files, *sizes]


@pytest.fixture(autouse=True)
def own_signals():
    """Python's own handlers, also where the tests were started with signals ignored, as a shell's `&` and nohup do."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {each: signal.signal(each, handler) for each, handler in own.items()}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def interrupted(monkeypatch):
    """Sends signals to this process during one step of a run: a function of them and of the step."""

    def send(step, *signals):
        real = train_command.Pace.after

        def after(self, steps):
            if steps == step:
                for each in signals:
                    signal.raise_signal(each)
            return real(self, steps)

        monkeypatch.setattr(train_command.Pace, "after", after)

    return send


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def during(monkeypatch):
    """Sends signals to this process whenever a function is called, before its work: of owner, name and signals."""

    def send(owner, name, *signals):
        real = getattr(owner, name)

        def call(*arguments, **named):
            for each in signals:
                signal.raise_signal(each)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    return send


def pasted(shown):
    """The arguments of the command line that resumes, as a shell takes them."""
    name, *arguments = shlex.split(shown.err.partition("go on with: ")[2])
    assert name == "mamba-core"
    return arguments


def held_out(tmp_path):
    return ["--held-out", str(tmp_path / "held out.py")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
    assert f"stopped: {stopped} holds step 4 of {STEPS}; go on with: mamba-core train" in shown.err
    assert main(pasted(shown)) == 0
    assert lines(capsys.readouterr().out)[-1]["history"] == expected
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(command, interrupted, second, tmp_path, capsys):
    interrupted(4, signal.SIGINT, second)
    assert main([*command, "--out", str(tmp_path / "out")]) == 128 + second
    assert not (tmp_path / "out").exists()
    assert "mamba-core: ended at once: no checkpoint was written" in capsys.readouterr().err


def test_a_signal_before_the_first_step_leaves_nothing(command, during, tmp_path, capsys):
    during(training.runs, "check_target", signal.SIGTERM)
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 128 + signal.SIGTERM
    shown = capsys.readouterr()
    assert lines(shown.out) == [{"checkpoint": None, "history": []}]
    assert "mamba-core: stopped: no checkpoint was written" in shown.err
    assert not (tmp_path / "out").exists()


def test_a_signal_before_the_first_step_of_a_resumed_run_changes_nothing(
    command, interrupted, during, tmp_path, capsys
):
    out = tmp_path / "out"
    interrupted(4, signal.SIGINT)
    assert main([*command, "--out", str(out), "--json"]) == 130
    stopped = pasted(capsys.readouterr())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "batch", lambda *_: pytest.fail("a step was made"))
        during(training.runs, "check_target", signal.SIGINT)
        assert main(stopped) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert pasted(capsys.readouterr()) == stopped


def test_a_signal_in_the_first_step_which_compiles_ends_after_it(command, during, tmp_path, capsys):
    during(batches, "batch", signal.SIGTERM)
    assert main([*command, "--out", str(tmp_path / "out")]) == 128 + signal.SIGTERM
    assert f"holds step 1 of {STEPS}; go on with" in capsys.readouterr().err


def test_a_signal_cuts_an_evaluation_short_which_is_made_later(command, during, tmp_path, capsys):
    evaluated = [*held_out(tmp_path), "--evaluate-every", "2", "--json"]
    assert main([*command, *evaluated, "--out", str(tmp_path / "whole")]) == 0
    expected = lines(capsys.readouterr().out)[-1]["history"]
    assert ["held_out_loss" in entry for entry in expected] == [False, True] * 3
    with pytest.MonkeyPatch.context() as patch:
        real = training.HeldOut.batches
        patch.setattr(training.HeldOut, "batches", lambda self: self._windows and sending(real(self)))

        def sending(batches):
            for each in batches:
                yield each
                signal.raise_signal(signal.SIGTERM)

        assert main([*command, *evaluated, "--out", str(tmp_path / "cut")]) == 128 + signal.SIGTERM
    shown = capsys.readouterr()
    assert f"holds step 2 of {STEPS}" in shown.err
    assert not any("held_out_loss" in entry for entry in lines(shown.out)[-1]["history"])
    assert main(pasted(shown)) == 0
    *made, last = lines(capsys.readouterr().out)
    assert last["history"] == expected
    assert [entry["step"] for entry in made] == [1, 3, 5]


def test_a_signal_that_cuts_the_last_evaluation_short_is_no_success(command, during, tmp_path, capsys):
    """Also where it comes before the first batch; the run that is resumed makes the evaluation alone."""
    out = tmp_path / "out"
    options = [*held_out(tmp_path), "--evaluate-every", "0", "--json"]
    during(training.HeldOut, "loss", signal.SIGTERM)
    assert main([*command, *options, "--out", str(out)]) == 128 + signal.SIGTERM
    shown = capsys.readouterr()
    assert f"stopped in the last evaluation: {out} holds step {STEPS} of {STEPS}; go on with: " in shown.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "batch", lambda *_: pytest.fail("a step was made"))
        patch.setattr(training.HeldOut, "loss", lambda *_: 0.5)
        assert main(pasted(shown)) == 0
    assert runs.read_progress(out)["history"][-1]["held_out_loss"] == 0.5


def test_a_signal_while_a_checkpoint_is_written_ends_with_it(command, during, tmp_path, capsys):
    during(training, "save_checkpoint", signal.SIGINT)
    assert main([*command, "--out", str(tmp_path / "out"), "--checkpoint-every", "2"]) == 130
    assert f"holds step 2 of {STEPS}" in capsys.readouterr().err


def test_a_second_signal_while_a_checkpoint_is_written_leaves_the_one_before(command, monkeypatch, tmp_path, capsys):
    real, saves = runs.save_file, []

    def save(*arguments):
        saves.append(arguments)
        if len(saves) == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(runs, "save_file", save)
    out = tmp_path / "out"
    assert main([*command, "--out", str(out), "--checkpoint-every", "2", "--json"]) == 128 + signal.SIGTERM
    shown = capsys.readouterr()
    assert f"mamba-core: ended at once: {out} holds step 2 of {STEPS}; go on with: " in shown.err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert main(pasted(shown)) == 0
    assert len(lines(capsys.readouterr().out)[-1]["history"]) == STEPS


def test_a_signal_that_was_ignored_stays_ignored(command, interrupted, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupted(4, signal.SIGHUP)
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("evaluated", [[], ["--held-out-fraction", "0.1"]])
def test_the_line_that_resumes_says_all_that_the_checkpoint_does_not(
    command, interrupted, evaluated, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    given = ["--out=-o [x]", "--dtype", "float32", "--kernels", "selective_scan=plain,linear=plain"]
    given += [*(evaluated or held_out(tmp_path)), "--evaluate-every", "4", "--checkpoint-every", "5"]
    given += ["--remat", "--log-every", "1", "--json", "--device", "cpu"]
    interrupted(3, signal.SIGINT)
    assert main([*command, *given]) == 130
    resume = pasted(capsys.readouterr())
    found, wanted = (vars(cli._parser(line).parse_args(line)) for line in (resume, [*command, *given]))
    said = {"config", "held_out_fraction", *train_command._DEFAULTS}  # by the checkpoint
    assert {key: value for key, value in found.items() if key not in said} == {
        key: value for key, value in wanted.items() if key not in said
    } | {"resume": True}
    assert main(resume) == 0
    assert "held_out_loss" in lines(capsys.readouterr().out)[-1]["history"][3]


class Leaving:
    """A standard output whose reader leaves, or whose disk is full, after some writes."""

    def __init__(self, path, writes, fault):
        self.file, self.writes, self.fault = path.open("w"), writes, fault

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise self.fault
        return self.file.write(text)

    def flush(self):
        if self.writes < 0:
            raise self.fault

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize(
    ("fault", "status"), [(BrokenPipeError(), 141), (OSError(errno.ENOSPC, "No space left on device"), 2)]
)
def test_a_run_whose_lines_nobody_takes_ends_with_a_checkpoint(command, fault, status, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "stdout", Leaving(tmp_path / "log", 4, fault))  # two lines, each with its end
    assert main([*command, "--out", str(out), "--json", "--log-every", "1"]) == status
    monkeypatch.undo()
    assert f"{out} holds step 3 of {STEPS}" in capsys.readouterr().err
    assert len(runs.read_progress(out)["history"]) == 3


def test_a_finished_run_says_so(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main([*command, "--out", str(out), "--held-out-fraction", "0.1"]) == 0
    shown = capsys.readouterr().out
    monkeypatch.setattr(training, "batch", lambda *_: pytest.fail("a step was made"))
    assert main(["train", "--data", command[4], "--out", str(out), "--resume"]) == 0
    again = capsys.readouterr()
    assert f"the run in {out} is finished: all its {STEPS} steps were made before" in again.err
    assert again.out == shown
    assert "held-out" in shown


def test_a_signal_in_the_last_step_ends_nothing(command, interrupted, tmp_path):
    interrupted(STEPS, signal.SIGTERM)
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0


def test_json_has_a_line_for_every_evaluation(command, tmp_path, capsys):
    """Beside those of the intervals; and nothing but JSON."""
    options = [*held_out(tmp_path), "--evaluate-every", "3", "--log-every", "2", "--json"]
    assert main([*command, "--out", str(tmp_path / "out"), *options]) == 0
    *steps, last = lines(capsys.readouterr().out)
    assert [entry["step"] for entry in steps] == [1, 2, 3, 5]
    assert [entry["step"] for entry in steps if "held_out_loss" in entry] == [2, 5]
    assert [entry.get("held_out_loss") for entry in last["history"]] == [
        entry.get("held_out_loss") for entry in (*[{}] * 2, steps[1], *[{}] * 2, steps[3])
    ]


def test_json_has_a_line_for_every_interval(command, tmp_path, capsys):
    assert main([*command, "--out", str(tmp_path / "out"), "--json", "--log-every", "2"]) == 0
    *steps, last = lines(capsys.readouterr().out)
    assert [entry["step"] for entry in steps] == [1, 3, 5]
    assert all({"loss", "learning_rate", "tokens_per_second", "seconds_left"} <= entry.keys() for entry in steps)
    assert steps[-1]["seconds_left"] == 0
    assert [entry["loss"] for entry in steps] == [last["history"][at]["loss"] for at in (1, 3, 5)]
    assert main([*command, "--out", str(tmp_path / "other"), "--log-every", "0"]) == 2


def test_square_brackets_are_text(command, tmp_path, capsys):
    """And what stands between colons: rich has pictures for some words. In one line, however long the path."""
    out = tmp_path / "a[" / "x]" / ":smile:" / "[bold]"
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"checkpoint {out}\n")
    other = out.parent / "[/red]"
    assert main(["inspect", str(out)]) == 0
    assert main(["convert", str(out), str(other), "--to", "mamba_ssm"]) == 0
    assert f"{other}\n" in capsys.readouterr().out
    report = out.parent / "[/]"
    assert main(["parity", str(out), "--backends", command[2], "--length", "4", "--out", str(report)]) == 0
    assert f"{report}/report.json, {report}/errors.png\n" in capsys.readouterr().out
    for refused in (
        ["generate", str(out / "[/x]"), "hi"],
        ["train", "--data", str(out / "[/x]"), "--out", str(report)],
    ):
        assert main(refused) == 2
        assert "[/x]" in capsys.readouterr().err


def test_the_progress_shows_the_loss_on_held_out_data(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    out = ["--out", str(tmp_path / "out")]
    assert main([*command, *out, *held_out(tmp_path), "--evaluate-every", "1"]) == 0
    found = r"loss \d+\.\d{4}, held-out \d+\.\d{4}, rate \S+e-04, [\d,]+ tokens/s, 0:00:00 left\n"
    assert re.search(found, capsys.readouterr().err)


def test_evaluations_are_timed_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    found = pace.Pace(mc.TrainSettings(steps=10, batch_size=2, length=5))
    for step in range(1, 5):
        now[0] += 1.0
        if step == 2:
            for done in range(3):
                found.evaluating(done, 2)
                now[0] += 4.0 * (done < 2)
        shown = found.after(step)
    # Six steps of a second, and for each a fourth of the eight seconds that an evaluation took in four steps.
    assert shown == {"tokens_per_second": 10.0, "seconds_left": 6 * (1 + 8 / 4)}


def test_held_out_files_are_not_trained_on(command, tmp_path, capsys):
    for data, other in (("a b.py", "a b.py"), ("", "held out.py"), ("a b.py", "")):
        files = ["--data", str(tmp_path / data), "--held-out", str(tmp_path / other)]
        assert main([*command, *files, "--out", str(tmp_path / "out")]) == 2
        assert "hold the same files" in capsys.readouterr().err
    files = ["--held-out", str(tmp_path / "held out.py"), "--held-out-fraction", "0.1"]
    with pytest.raises(SystemExit):
        main([*command, *files, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("given", ["--init", "--tokenizer"])
def test_text_is_read_by_the_tokenizer_of_the_weights(command, given, monkeypatch, tmp_path):
    """Unless another is given; ids need none."""
    read = []
    monkeypatch.setattr(train_command, "SubwordTokenizer", lambda path: read.append(path) or ByteTokenizer())
    mc.save(
        mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=256, d_state=2), backend=command[2]), tmp_path / "w"
    )
    for folder in ("w", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps(folder))
    options = [*command[:5], *command[7:], "--init", str(tmp_path / "w")]
    wanted = tmp_path / ("w" if given == "--init" else "other") / "tokenizer.json"
    options += ["--tokenizer", str(wanted)] if given == "--tokenizer" else []
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    assert read == [wanted]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == wanted.read_text()
    np.save(tmp_path / "ids.npy", np.arange(200) % 256)
    assert main([*options, "--data", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "of ids")]) == 0
    assert read == [wanted]


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
