"""Training of each task from files by one command: it learns, it resumes exactly, and its checkpoint is of use."""

import csv
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import datasets, registry
from mamba_core.cli import main
from mamba_core.datasets.base import predicted
from mamba_core.registry import installed

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
SIZES = {"d_model": 16, "n_layer": 1, "vocab_size": 256, "d_state": 4}
OF_IMAGES = SIZES | {"architecture": "vision_mamba", "task_options": {"image_size": 8, "patch_size": 4}}
OF_QUANTILES = SIZES | {"task": "forecasting", "task_options": {"quantiles": [0.1, 0.5, 0.9]}}
SERIES = ["--length", "12", "--horizon", "4", "--covariate-columns", "temp"]
# task -> config, options, and the metric that is to be better than the baseline's, 1 where more is better.
TASKS = {
    "sequence-classification": (SIZES, ["--length", "12"], "accuracy", 1),
    "token-classification": (SIZES, ["--length", "16"], "macro_f1", 1),
    "image-classification": (OF_IMAGES, [], "accuracy", 1),
    "forecasting": (OF_QUANTILES, SERIES, "mase", -1),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The data of each task, and its config."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = [rng.choice(["good", "fine"] if number % 3 else ["bad", "poor"]) for number in range(60)]
    rows = [["it was " + word, "pos" if number % 3 else "neg"] for number, word in enumerate(words)]
    _write(folder / "sequence-classification", ".csv", [["text", "label"], *rows])
    tagged = [{"words": ["a", name], "tags": ["O", "X" if name == "Ann" else "O"]} for name in ["Ann", "cat"] * 20]
    (folder / "token-classification.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    at = np.arange(160)
    load, temp = 50 + 9 * np.sin(at / 4) + rng.normal(0, 0.5, 160), np.cos(at / 4)
    values = [[f"{time}", "" if time % 17 == 5 else f"{load[time]:.3f}", f"{temp[time]:.3f}"] for time in at]
    _write(folder / "forecasting", ".csv", [["time", "load", "temp"], *values])
    for number in range(24):
        label, channel = ("red", 0) if number % 3 else ("blue", 2)
        pixels = rng.integers(0, 90, (10, 12, 3)).astype(np.uint8)
        pixels[..., channel] += 150
        (folder / "image-classification" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "image-classification" / label / f"{number}.png")
    found = {}
    for task, (config, *_) in TASKS.items():
        (folder / f"{task}.json").write_text(json.dumps(config))
        data = next(path for path in folder.iterdir() if path.stem == task and path.suffix != ".json")
        found[task] = data, folder / f"{task}.json"
    return found


def _write(path, kind, rows):
    with path.with_suffix(kind).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def command(files, task, out, backend, steps, *more):
    data, config = files[task]
    run = ["--task", task, "--data", data, "--config", config, "--out", out, "--backend", backend, "--device", "cpu"]
    settings = ["--steps", steps, "--batch-size", "8", "--learning-rate", "0.02", "--warmup-steps", "2", "--json"]
    return ["train", *map(str, [*run, *settings, *TASKS[task][1], *more])]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """task -> the checkpoint of its run, and what the command printed last."""
    found = {}

    def of(task, capsys):
        if task not in found:
            out = tmp_path_factory.mktemp("run") / "out"
            capsys.readouterr()
            steps = "20" if task != "forecasting" else "60"
            assert main(command(files, task, out, installed()[0], steps)) == 0
            found[task] = out, json.loads(capsys.readouterr().out.splitlines()[-1])
        return found[task]

    return of


@pytest.mark.parametrize("task", TASKS)
def test_it_learns_and_reports_what_the_checkpoint_gives(files, trained, task, capsys):
    out, told = trained(task, capsys)
    report, (_, _, metric, sign) = told["report"], TASKS[task]
    assert report == json.loads((out / "report.json").read_text())
    (baseline,) = (value for name, value in report["baseline"].items() if name.endswith(f"_{metric}"))
    assert sign * (report["metrics"][metric] - baseline) > 0
    for name in report["figures"]:
        assert Image.open(out / name).size[0] > 500
    assert ("forecast.png" in report["figures"]) == (task == "forecasting")
    # What was held out is read again of the files and the checkpoint alone.
    model = mc.load(out, backend=installed()[0], device="cpu")
    length = datasets.record_of(model.config)["length"]
    data = datasets.read(files[task][0], model.config, length=length, resume=True)
    again = data.metrics(predicted(model, data.held_out))
    assert {name: report["metrics"][name] for name in again} == pytest.approx(again, rel=1e-4)
    evaluated = [entry for entry in told["history"] if metric in entry]
    assert len(evaluated) == 10
    assert evaluated[-1][metric] == report["metrics"][metric]


def interrupted(line):
    """A run that is ended by the first checkpoint that it writes."""
    real = mc.training.save_checkpoint

    def save_and_interrupt(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mc.training, "save_checkpoint", save_and_interrupt)
        assert main(line) == 130


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_interrupted_ends_with_the_same_bits(files, task, tmp_path, capsys):
    """Its command line does not say again how the data is read."""
    whole, cut, backend = tmp_path / "whole", tmp_path / "cut", installed()[0]
    line = command(
        files, task, cut, backend, "6", "--checkpoint-every", "2", "--seed", "3", "--held-out-fraction", "0.3"
    )
    assert main([str(whole) if word == str(cut) else word for word in line]) == 0
    interrupted(line)
    assert not (cut / "report.json").exists()
    capsys.readouterr()
    assert main(["train", "--resume", "--data", str(files[task][0]), "--out", str(cut), "--backend", backend]) == 0
    assert "macro f1" in (shown := capsys.readouterr().out) or "mase" in shown
    for path in whole.iterdir():
        if path.suffix != ".png":
            assert path.read_bytes() == (cut / path.name).read_bytes(), path.name
    again = ["train", "--resume", "--data", str(files[task][0]), "--out", str(cut), "--task", "lm"]
    assert main(again) == 2
    assert "expected 'lm'" in capsys.readouterr().err


def test_every_backend_trains_on_the_same_examples_and_resumes(files, tmp_path, capsys):
    """Metrics too: the outputs for the held-out examples come in their order."""
    found, task = {}, "sequence-classification"
    for name in installed():
        whole, cut = tmp_path / name, tmp_path / f"{name} cut"
        assert main(command(files, task, whole, name, "3")) == 0
        found[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
        interrupted(command(files, task, cut, name, "3", "--checkpoint-every", "2"))
        resume = ["train", "--resume", "--data", files[task][0], "--out", cut, "--backend", name, "--device", "cpu"]
        assert main([*map(str, resume)]) == 0
        capsys.readouterr()
        for file in ("model.safetensors", "optimizer.safetensors", "training.json", "report.json"):
            assert (whole / file).read_bytes() == (cut / file).read_bytes(), (name, file)
    first = found[installed()[0]]
    for name, told in found.items():
        assert told["report"]["data"] == first["report"]["data"]
        for entry, wanted in zip(told["history"], first["history"], strict=True):
            assert entry == pytest.approx(wanted, rel=2e-3, abs=1e-5), name


def test_texts_and_images_are_classified_as_they_were_read(files, trained, tmp_path, capsys):
    out, _ = trained("sequence-classification", capsys)
    (tmp_path / "a.txt").write_text("it was poor\n")
    found = mc.classify_text(["it was good", "it was poor"], out, device="cpu")
    assert [[guess.label for guess in row] for row in found] == [["pos", "neg"], ["neg", "pos"]]
    line = ["classify", str(tmp_path / "a.txt"), "--text", "it was good", "--checkpoint", str(out), "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in told] == [str(tmp_path / "a.txt"), "it was good"]
    assert told[0]["classes"] == [guess._asdict() for guess in found[1]]
    # Beyond the length nothing is read.
    long, short = mc.classify_text(["it was good! but", "it was good!"], out)
    assert long == short
    out, _ = trained("image-classification", capsys)
    image = next((files["image-classification"][0] / "blue").iterdir())
    assert main(["classify", str(image), "--checkpoint", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["classes"][0]["label"] == "blue"


def test_texts_are_classified_by_the_tokens_of_training(tmp_path):
    """Bytes, which no file of a larger vocabulary tells, or those of a tokenizer, which the checkpoint keeps."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "good": 299, "bad": 257}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path / "a", ".csv", [["text", "label"], *[["good", "x"], ["bad", "y"]] * 4])
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"vocab_size": 300}))
    line = [
        "train",
        "--task",
        "sequence-classification",
        "--data",
        tmp_path / "a.csv",
        "--config",
        tmp_path / "config.json",
    ]
    found = {}
    for name, more in {"bytes": [], "words": ["--tokenizer", tmp_path / "tokenizer.json"]}.items():
        out = tmp_path / name
        assert main([*map(str, [*line, "--out", out, "--steps", 1, "--length", 4, *more])]) == 0
        found[name] = mc.classify_text("good", out, device="cpu")
        model = mc.load(out, backend=installed()[0], device="cpu")
        ids = np.array([[*b"good"] if name == "bytes" else [299]], np.int32)
        backend = registry.get(model.backend)
        logits = backend.to_numpy(backend.infer(model, ids).logits)[0].astype(float)
        wanted = dict(zip("xy", np.exp(logits) / np.exp(logits).sum(), strict=True))
        assert {guess.label: pytest.approx(guess.probability) for guess in found[name][0]} == wanted
    assert found["bytes"] != found["words"]
    mc.save(mc.build(mc.MambaConfig(**SIZES | {"vocab_size": 300}, task="sequence_classification")), tmp_path / "other")
    with pytest.raises(ValueError, match=r"the checkpoint has no tokenizer\.json; give tokenizer"):
        mc.classify_text("good", tmp_path / "other")


def test_a_series_is_forecast_by_its_checkpoint(files, trained, tmp_path, capsys):
    out, _ = trained("forecasting", capsys)
    data = files["forecasting"][0]
    line = ["forecast", "--checkpoint", str(out), "--data", str(data), "--out", str(tmp_path / "next.csv")]
    assert main(line) == 0
    with (tmp_path / "next.csv").open() as file:
        names, *rows = csv.reader(file)
    assert names == ["time", "load 0.1", "load 0.5", "load 0.9"]
    assert [row[0] for row in rows] == ["160", "161", "162", "163"]
    truth = 50 + 9 * np.sin(np.arange(160, 164) / 4)
    assert np.abs(np.array([float(row[2]) for row in rows]) - truth).max() < 4
    # Of a series that ends where a forecast of the held-out end began it is that forecast.
    model = mc.load(out, backend=installed()[0], device="cpu")
    read = datasets.read(data, model.config, length=12, resume=True)
    wanted = datasets.forecasting.in_units(read.config, predicted(model, read.held_out), quantiles=True)
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "past.csv").write_text("".join(lines[: 1 + read.end]))
    assert main([*line[:3], "--data", str(tmp_path / "past.csv")]) == 0
    found = [row.split(",") for row in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in found] == ["128", "129", "130", "131"]
    np.testing.assert_allclose(np.array(found, float)[:, 1:], wanted[0, :, 0], rtol=1e-5)


def test_what_a_checkpoint_is_not_for_is_refused(files, trained, tmp_path, capsys):
    text, series, images = (
        str(trained(task, capsys)[0]) for task in ("sequence-classification", "forecasting", "image-classification")
    )
    new = ["--out", str(tmp_path / "new"), "--steps", "1"]
    small = [*new, "--config", str(files["forecasting"][1])]
    (tmp_path / "other.csv").write_text("time,other\n1,2\n2,3\n")
    data, before = str(files["forecasting"][0]), str(tmp_path / "other.csv")
    for line, message in (
        (
            ["classify", "x", "--checkpoint", series],
            "classifying needs one of task 'image_classification' or 'sequence_class",
        ),
        (["classify", "--checkpoint", text], "nothing to classify; give files, or --text"),
        (["classify", "--text", "x", "--checkpoint", images], "--text is given, but the model is of task 'image_class"),
        (["classify", "--text", "x", "--checkpoint", text, "--top", "3"], "top is 3; expected an integer from 1 to 2"),
        (["classify", "--text", "", "--checkpoint", text], "text 0 is ''; expected one that is not empty"),
        (
            ["forecast", "--checkpoint", text, "--data", data],
            "without a forecast; a forecast needs one of task 'forecasting'",
        ),
        (["forecast", "--checkpoint", series, "--data", before], "has no column 'temp' (--covariate-columns)"),
        (["forecast", "--checkpoint", series, "--data", data, "--steps", "9"], "covariates 'temp' are not known after"),
        (["forecast", "--checkpoint", series, "--data", data, "--out", before], "exists"),
        (
            ["train", "--data", data, *new, "--init", text, "--task", "forecasting"],
            "config is of task 'sequence_class",
        ),
        (["train", "--data", data, *small, "--new-head"], "--new-head is given without --init"),
        (
            ["train", "--data", data, *small, "--task", "forecasting", "--tokenizer", "t"],
            "has no text; leave it out",
        ),
        (
            ["train", "--data", data, *small, "--task", "forecasting", "--text-column", "t"],
            "text_column given, but",
        ),
    ):
        capsys.readouterr()
        assert main(line) == 2, line
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_trained_weights_begin_a_run_of_another_task_or_of_other_labels(files, trained, tmp_path, capsys, monkeypatch):
    """The blocks are the checkpoint's, and what it has not is told."""
    backend = installed()[0]
    mc.save(mc.build(mc.MambaConfig(**SIZES), backend=backend), tmp_path / "lm")
    data = str(files["sequence-classification"][0])
    (tmp_path / "other.csv").write_text("text,label\n" + "a,u\nb,v\nc,w\n" * 4)
    text = trained("sequence-classification", capsys)[0]
    runs = (
        (tmp_path / "lm", ["--task", "sequence-classification", "--data", data]),
        (text, ["--new-head", "--data", str(tmp_path / "other.csv")]),
    )
    seen = []
    monkeypatch.setattr("mamba_core.cli.train.train", lambda model, *_, **__: seen.insert(0, model) or [])
    for source, more in runs:
        line = ["train", "--init", str(source), "--out", str(tmp_path / "out"), "--steps", "1", *more]
        with pytest.warns(UserWarning, match=r"'score.weight' begin with initial"):
            main(line)
        values = registry.get(backend).parameters(seen[0])
        for name, value in registry.get(backend).parameters(mc.load(source, backend=backend)).items():
            if name in values and name != "score.weight":
                np.testing.assert_array_equal(values[name], value)
    assert seen[0].config.task_options["labels"] == ("u", "v", "w")
    assert (
        main(["train", "--init", str(text), "--out", str(tmp_path / "new"), "--data", str(tmp_path / "other.csv")]) == 2
    )
    assert "labels that the model has not: 'u', 'v', 'w'" in capsys.readouterr().err


def test_the_help_has_every_task_and_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for tasks, options in datasets.options().items():
        assert f"data of --task {', '.join(name.replace('_', '-') for name in tasks)}:" in shown
        assert all(option.flag in shown for option in options)


# --- metrics of `mamba_core.train` -----------------------------------------------------------------


def dropping(name):
    """A model that leaves paths out in training."""
    config = mc.VisionMambaConfig(
        d_model=8, n_layer=2, d_state=2, drop_path_rate=0.9,
        task_options={"image_size": 4, "patch_size": 2, "num_classes": 2},
    )  # fmt: skip
    model = mc.build(config, backend=name, device="cpu")
    model.train()
    return model


@pytest.mark.parametrize("name", installed())
def test_metrics_change_no_later_step_and_are_of_the_evaluation_form(name):
    if name == "torch":
        import torch

        torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = {"inputs": rng.normal(size=(8, 3, 4, 4)).astype(np.float32), "targets": np.arange(8) % 2}
    settings = mc.TrainSettings(steps=2, batch_size=4, warmup_steps=1)
    model, seen = dropping(name), []
    trainer = registry.get(name).trainer(model, settings)
    before = trainer.predict(data)
    assert before.shape == (8, 2)
    np.testing.assert_array_equal(before, trainer.predict(data))
    model.eval()
    np.testing.assert_allclose(before, predicted(model, data), atol=1e-6)
    runs = []
    for given in ({}, {"metrics": lambda outputs: seen.append(outputs) or {"size": outputs.size}}):
        if name == "torch":
            torch.manual_seed(0)
        if name == "mlx":
            import mlx.core as mx

            mx.random.seed(0)
        runs.append(mc.train(dropping(name), data, settings, held_out=data, evaluate_every=1, **given))
    assert [entry.pop("size") for entry in runs[1]] == [16.0, 16.0]
    assert runs[0] == runs[1]
    assert (seen[0] != seen[1]).any()


def test_metrics_are_of_examples_and_have_names_of_their_own():
    data = {"inputs": np.ones((4, 3), np.int32), "targets": np.array([0, 1, 0, 1])}
    settings = mc.TrainSettings(steps=1, batch_size=2)
    backend, labelled = installed()[0], {"task": "sequence_classification"}

    def build(**more):
        return mc.build(mc.MambaConfig(**SIZES, **more), backend=backend)

    for model, given, message in (
        (build(), {"data": np.ones(999, np.int32), "held_out": 0.5}, "metrics are of held-out examples"),
        (build(**labelled), {"data": data}, "metrics are of held-out examples"),
        (build(**labelled), {"data": data, "held_out": data}, "metrics gave loss, which is logged already"),
    ):
        with pytest.raises(ValueError, match=message):
            mc.train(model, given.pop("data"), settings, metrics=lambda _: {"loss": 1.0}, **given)
    with pytest.raises(FloatingPointError, match="f1 on held-out data is nan at step 0"):
        mc.train(build(**labelled), data, settings, held_out=data, metrics=lambda _: {"f1": float("nan")})


def test_metrics_that_are_cut_short_are_made_when_the_run_is_resumed(tmp_path):
    """With the loss before them, which alone would pass for the whole evaluation."""
    backend, out = installed()[0], tmp_path / "run"
    config = mc.MambaConfig(**SIZES, task="sequence_classification")
    data = {"inputs": np.arange(24).reshape(8, 3), "targets": np.arange(8) % 2}
    settings, seen = mc.TrainSettings(steps=2, batch_size=4, warmup_steps=1), []
    given = {"held_out": data, "evaluate_every": 1, "metrics": lambda outputs: {"sum": float(outputs.sum())}}
    whole = mc.train(mc.build(config, backend=backend), data, settings, **given)
    # (0, 2), (1, 2) and (2, 2) are of the loss; then those of the metrics begin.
    cut = {"stop": lambda: len(seen) >= 5, "evaluating": lambda *place: seen.append(place), "checkpoint": out}
    first = mc.train(mc.build(config, backend=backend), data, settings, **given, **cut)
    assert seen == [(0, 2), (1, 2), (2, 2), (0, 2), (1, 2)]
    assert len(first) == 1
    assert not {"sum", "held_out_loss"} & first[0].keys()
    again = mc.train(mc.load(out, backend=backend), data, settings, **given, resume=out, checkpoint=out)
    assert again == whole


def test_a_model_that_no_file_holds_is_refused_before_a_step(tmp_path):
    task = {"task": "image_classification", "task_options": {"image_size": 4, "patch_size": 2, "num_classes": 2}}
    model = mc.build(mc.MambaConfig(**SIZES, **task), backend=installed()[0], device="cpu")
    data = {"inputs": np.zeros((4, 3, 4, 4), np.float32), "targets": np.array([0, 1, 0, 1])}
    settings, seen = mc.TrainSettings(steps=1, batch_size=2), []
    with pytest.raises(ValueError, match="a model of task 'image_classification' cannot be written as hf"):
        mc.train(model, data, settings, log=seen.append, checkpoint=tmp_path / "out")
    assert not seen
    mc.train(model, data, settings, log=seen.append)
    assert len(seen) == 1
