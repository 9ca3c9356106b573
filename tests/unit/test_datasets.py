"""Data of the tasks from files: what is read, divided and measured, and what is refused."""

import json
from datetime import datetime, timedelta

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import batches, datasets, discovery
from mamba_core.datasets import _labels, forecasting
from mamba_core.datasets.base import RECORD
from mamba_core.vision import read_image

CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=256, d_state=2)
TEXTS, TOKENS, SERIES = "sequence_classification", "token_classification", "forecasting"
IMAGES = mc.VisionMambaConfig(d_model=8, n_layer=1, d_state=2, task_options={"image_size": 16, "patch_size": 8})


def table(path, text):
    path.write_text(text)
    return path


def series(path, values, first=datetime(2024, 1, 1), step=timedelta(hours=1)):
    rows = "".join(f"{(first + i * step).isoformat()},{value}\n" for i, value in enumerate(values))
    return table(path, f"date,load\n{rows}")


def read(path, config=CONFIG, **options):
    return datasets.read(path, config, **options)


# --- texts and labels ------------------------------------------------------------------------------


def test_texts_are_cut_and_padded_and_labels_are_named(tmp_path):
    text = '\ufeffid,Text,stars\n1,"a, b",10\n2,"é",9\n\n3,"long\nline",10\n4,z,9\n'
    data = read(table(tmp_path / "a.csv", text), task=TEXTS, length=4, label_column="stars", held_out=0)
    assert data.examples["inputs"].tolist() == [
        [*b"a, b"],
        [*"é".encode(), 0, 0],
        [*b"long"],
        [ord("z"), 0, 0, 0],
    ]
    assert data.examples["mask"].sum(1).tolist() == [4, 2, 4, 1]
    assert data.examples["targets"].tolist() == [1, 0, 1, 0]
    assert data.facts["cut"] == 1
    longer = read(tmp_path / "a.csv", task=TEXTS, length=99, label_column="stars", held_out=0)
    assert longer.examples["inputs"].shape == longer.examples["mask"].shape == (4, 9)  # no longer than the longest
    assert longer.facts["cut"] == 0
    assert data.config.task_options["labels"] == ("9", "10")  # by their numbers
    assert data.held_out is None
    assert not data.measures
    record = datasets.record_of(data.config)
    assert record["options"] == {"text_column": "Text", "label_column": "stars"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "input_ids\tlabel\n1 2 3\tx\n[4]\ty\n"),
        ("a.jsonl", '{"input_ids": [1, 2, 3], "label": "x"}\n\n{"label": "y", "input_ids": [4]}\n'),
    ],
)
def test_token_ids_are_read_as_they_are(tmp_path, name, text):
    data = read(table(tmp_path / name, text), task=TEXTS, length=3, held_out=0)
    assert data.examples["inputs"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert data.examples["mask"].sum(1).tolist() == [3, 1]


def test_labels_of_words_are_at_their_last_token(tmp_path):
    rows = [{"words": ["ab", "c"], "tags": ["X", None]}, {"words": ["abc", "d"], "tags": ["Y", "X"]}]
    path = table(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = read(path, task=TOKENS, length=4, held_out=0)
    ignored = -100
    assert data.examples["inputs"].tolist() == [[*b"ab c"], [*b"abc "]]
    assert data.examples["targets"].tolist() == [[ignored, 0, ignored, ignored], [ignored, ignored, 1, ignored]]
    assert data.facts["cut"] == 1


def test_each_label_is_held_out_by_its_share(tmp_path):
    rows = [f"t{number:03},{'abbbc'[number % 5]}\n" for number in range(100)] + ["alone,d\n"]
    path = table(tmp_path / "a.csv", "text,label\n" + "".join(rows))
    data = read(path, task=TEXTS, length=8, held_out=0.25)
    assert np.bincount(data.held_out["targets"]).tolist() == [5, 15, 5]
    assert np.bincount(data.examples["targets"]).tolist() == [15, 45, 15, 1]
    both = {row.tobytes() for arrays in (data.examples, data.held_out) for row in arrays["inputs"]}
    assert len(both) == 101
    again, other = (read(path, task=TEXTS, length=8, held_out=0.25, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.held_out["inputs"], data.held_out["inputs"])
    assert (other.held_out["inputs"] != data.held_out["inputs"]).any()
    most = read(path, task=TEXTS, length=8, held_out=0.99)
    assert np.bincount(most.examples["targets"]).tolist() == [1, 1, 1, 1]


def test_scores_are_those_by_hand():
    targets, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 3])
    found = _labels.scores(targets, predicted)
    # F1 of 0: 2*2/(3+2); of 1: 2*1/(2+2); of 2 and of 3: none was right.
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((0.8 + 0.5 + 0 + 0) / 4)}
    found = _labels.majority(np.array([1, 1, 0]), np.array([1, 0, 0, 0]))
    assert found == {"majority_accuracy": 0.25, "majority_macro_f1": pytest.approx((0.4 + 0) / 2)}


def test_metrics_of_words_leave_out_what_does_not_count(tmp_path):
    rows = [{"words": ["ab", "c"], "tags": ["X", "Y"]}, {"words": ["d"], "tags": ["Y"]}]
    path = table(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    apart = table(tmp_path / "b.jsonl", json.dumps({"words": ["d", "e"], "tags": ["Y", "X"]}) + "\n")
    data = read(path, task=TOKENS, length=6, held_out=apart)
    outputs = np.zeros((1, 3, 2))
    outputs[..., 1] = 1  # Y everywhere
    assert data.metrics(outputs)["accuracy"] == 0.5


# --- series ----------------------------------------------------------------------------------------


def test_windows_are_those_of_the_series_and_each_held_out_value_is_forecast_once(tmp_path):
    values = np.random.default_rng(0).normal(50, 9, 40).round(3)
    data = read(series(tmp_path / "a.csv", values), task=SERIES, length=6, horizon=3, held_out=0.25)
    location, scale = values[:30].mean(), values[:30].std()
    normal = (values - location) / scale
    for window in range(22):
        np.testing.assert_allclose(data.examples["inputs"][window, :, 0], normal[window : window + 6], rtol=1e-5)
        np.testing.assert_allclose(data.examples["targets"][window, :, 0], normal[window + 6 : window + 9], rtol=1e-5)
    assert len(data.examples["inputs"]) == 22
    np.testing.assert_allclose(data.held_out["inputs"][:, :, 0], [normal[at - 6 : at] for at in (30, 33, 36, 37)], 1e-5)
    counted = data.held_out["targets"][~np.isnan(data.held_out["targets"])]
    np.testing.assert_allclose(np.sort(counted), np.sort(normal[30:]), rtol=1e-5)
    assert data.facts["season"] == 24


@pytest.mark.parametrize("apart", ["fraction", "file"])
def test_nothing_that_is_held_out_reaches_training(tmp_path, apart):
    """Neither the windows nor the means, deviations and what MASE divides by."""
    values, found = np.random.default_rng(1).normal(0, 1, (40, 2)), []
    for factor in (1, 1000):
        values[30:] = 3 + factor * values[30:]
        rows = [f"{at},{a},{b}\n" for at, (a, b) in enumerate(values)]
        held_out = 0.25
        if apart == "file":
            held_out = table(tmp_path / f"b{factor}.csv", "time,y,c\n" + "".join(rows[30:]))
            rows = rows[:30]
        path = table(tmp_path / f"a{factor}.csv", "time,y,c\n" + "".join(rows))
        options = {"length": 6, "horizon": 3, "season": 2, "covariate_columns": ["c"]}
        found.append(read(path, task=SERIES, held_out=held_out, **options))
    first, second = found
    for name, array in first.examples.items():
        np.testing.assert_array_equal(array, second.examples[name])
    for name, value in forecasting.statistics(first.config).items():
        assert value == forecasting.statistics(second.config)[name]
    assert (first.held_out["targets"] != second.held_out["targets"]).any()
    assert first.end == second.end == 30


def test_missing_values_are_masked_and_missing_rows_inserted(tmp_path):
    path = table(tmp_path / "a.csv", "date,y\n2024-01-01,1\n2024-01-02,\n2024-01-04,4\n2024-01-05,nan\n2024-01-06,6\n")
    data = read(path, task=SERIES, length=3, horizon=2, held_out=0)
    assert data.facts["inserted"] == 1
    assert data.facts["missing"] == 3
    assert data.facts["season"] == 1  # and not a week, of which there is less
    np.testing.assert_array_equal(data.examples["observed"][0, :, 0], [True, False, False])
    np.testing.assert_array_equal(np.isnan(data.examples["targets"][0, :, 0]), [False, True])
    assert np.isfinite(data.examples["inputs"]).all()


def test_the_clock_goes_on_by_its_steps(tmp_path):
    ends = ["2023-11-30", "2023-12-31", "2024-01-31", "2024-02-29"]
    for times, following, season in (
        (ends, ["2024-03-31", "2024-04-30"], 12),
        (["2023-01", "2023-04", "2023-07"], ["2023-10-01", "2024-01-01"], 4),
        (["20240130", "20240131", "20240201"], ["2024-02-02", "2024-02-03"], 7),
        (["2024-01-01T00:00", "2024-01-01T12:00"], ["2024-01-02T00:00:00", "2024-01-02T12:00:00"], 1),
        (["1990", "1992", "1994"], ["1996", "1998"], 1),
        (["0.1", "0.2", "0.3"], ["0.4", "0.5"], 1),
    ):
        from mamba_core.datasets._series import series_of
        from mamba_core.datasets._tables import read_table

        found = read_table(table(tmp_path / "a.csv", "t,y\n" + "".join(f"{time},1\n" for time in times)))
        made = series_of(found, "t", ["y"], [])
        assert [made.clock.time(len(times) + step) for step in range(2)] == following
        assert made.clock.season == season


def test_the_seasonal_naive_forecast_and_what_mase_divides_by():
    past = np.array([[1.0], [2.0], [3.0], [np.nan], [5.0], [6.0]])
    np.testing.assert_array_equal(forecasting.seasonal_naive(past, 5, 3)[:, 0], [1.0, 5.0, 6.0, 1.0, 5.0])
    np.testing.assert_array_equal(forecasting.seasonal_naive(past, 2, 1)[:, 0], [6.0, 6.0])
    np.testing.assert_array_equal(forecasting.seasonal_naive(past[:1], 3, 2)[:, 0], [np.nan, 1.0, np.nan])
    assert forecasting.naive_error(past, 3).tolist() == [3.0]  # |5-2| and |6-3|
    assert np.isnan(forecasting.naive_error(past[:1], 1)).all()


def test_mase_is_the_error_in_units_over_that_of_the_naive_forecast(tmp_path):
    values = np.random.default_rng(2).normal(100, 20, 30)
    data = read(series(tmp_path / "a.csv", values), task=SERIES, length=4, horizon=2, season=3, held_out=0.2)
    location, scale = values[:24].mean(), values[:24].std()
    guess = 107.0
    outputs = np.full((3, 2, 1), (guess - location) / scale)
    mae = np.abs(values[24:] - guess).mean()
    divisor = np.abs(values[3:24] - values[:21]).mean()
    assert data.metrics(outputs) == {"mae": pytest.approx(mae, 1e-5), "mase": pytest.approx(mae / divisor, 1e-5)}
    naive = [values[21 + at % 3 + (3 if at >= 3 else 0)] if at < 3 else values[at + 21] for at in range(6)]
    # Forecasts begin at 24, 26 and 28: each value is that of three positions before it.
    assert data.baseline["naive_mae"] == pytest.approx(np.abs(values[24:] - naive).mean(), 1e-5)


def test_a_channel_that_the_naive_forecast_knows_is_left_out_of_mase_and_named(tmp_path):
    values = np.random.default_rng(3).normal(100, 20, 30)
    rows = "".join(f"{at},{value},{at % 3}\n" for at, value in enumerate(values))
    path = table(tmp_path / "a.csv", f"time,y,phase\n{rows}")
    data = read(path, task=SERIES, length=4, horizon=2, season=3, held_out=0.2)
    alone = read(path, task=SERIES, length=4, horizon=2, season=3, held_out=0.2, target_columns=["y"])
    outputs = np.zeros((3, 2, 2))
    assert data.metrics(outputs)["mase"] == pytest.approx(alone.metrics(outputs[..., :1])["mase"])
    assert data.facts["left out of mase"] == ["phase"]
    assert "left out of mase" not in alone.facts


# --- images ----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label / "more").mkdir(parents=True)
        for name in ("1.png", "more/2.png"):
            image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(tmp_path / "images" / label / name)
    (tmp_path / "images" / "cat" / ".hidden").write_text("no image")
    return tmp_path / "images"


def test_images_are_prepared_as_they_are_classified(pictures):
    data = read(pictures, IMAGES, length=1, held_out=0)
    paths = [pictures / label / name for label in ("cat", "dog") for name in ("1.png", "more/2.png")]
    np.testing.assert_array_equal(data.examples["inputs"], [read_image(path, (16, 16)) for path in paths])
    assert data.examples["targets"].tolist() == [0, 0, 1, 1]
    assert data.config.task_options["num_classes"] == 2
    assert data.config.extra["id2label"] == {"0": "cat", "1": "dog"}


def test_other_images_are_other_data(pictures):
    """Though no more than their bytes are kept."""
    first = read(pictures, IMAGES, length=1, held_out=0)
    path = pictures / "dog" / "1.png"
    pytest.importorskip("PIL.Image").open(path).transpose(0).save(path)
    second = read(pictures, IMAGES, length=1, held_out=0)
    found = [batches.read("the data", data.examples, data.config) for data in (first, second, second)]
    assert len({each.digest() for each in found}) == 2
    with pytest.raises(ValueError, match="of which batches are made: images has shape"):
        batches.read("the data", {**first.examples, "inputs": first.examples["inputs"].stored}, first.config)
    rows = found[0].batch(mc.TrainSettings(batch_size=3), 0)
    assert np.asarray(rows["inputs"]).shape == (3, 3, 16, 16)


def test_a_checkpoint_s_own_preparation_is_used(pictures, tmp_path):
    from mamba_core.registry import installed

    config = read(pictures, IMAGES, length=1, held_out=0).config
    given, seen = {"mean": [0.5] * 3, "deviation": [0.25] * 3, "crop": 1.0}, []
    config.extra[RECORD].update(given)
    with pytest.MonkeyPatch.context() as patch:
        real = mc.vision.read_image
        patch.setattr(mc.vision, "read_image", lambda *names, **told: seen.append(told) or real(*names, **told))
        mc.classify_images(pictures / "cat" / "1.png", mc.build(config, backend=installed()[0]))
        assert seen == [given]
        config.extra[RECORD]["deviation"] = [1, 0, 1]
        with pytest.raises(ValueError, match="config records deviation"):
            mc.classify_images(pictures / "cat" / "1.png", mc.build(config, backend=installed()[0]))
    plain, own = read_image(pictures / "cat" / "1.png", (16, 16)), real(pictures / "cat" / "1.png", (16, 16), **given)
    assert (plain != own).any()


# --- what is refused -------------------------------------------------------------------------------

OK = "text,label\na,x\nb,y\nc,x\nd,y\n"
REFUSED = [
    (TEXTS, "a.csv", "", {}, "the file is empty"),
    (TEXTS, "a.csv", "\n \n", {}, "the file is empty"),
    (TEXTS, "a.csv", "text,label\n", {}, "no row"),
    (TEXTS, "a.csv", "x" * 300 + ",label\na,x\n", {}, "the name of a column has 300 letters; expected 200 at most"),
    (TEXTS, "a.txt", OK, {}, "ends in .txt; expected a table, one of .csv"),
    (TEXTS, "a.csv", "text,label,text\na,x,b\n", {}, "appear twice: 'text'"),
    (TEXTS, "a.csv", "text,label\na,x\nb\n", {}, "line 3: has 1 values; expected 2"),
    (TEXTS, "a.csv", 'text,label\na,x\n"b"c,y\n', {}, "line 3: "),
    (TEXTS, "a.csv", "text,label\na,x\nb,\n", {}, "line 3: label is missing; expected a label"),
    (TEXTS, "a.csv", "text,label\na,x\n,y\n", {}, "line 3: text is empty"),
    (TEXTS, "a.csv", "text,label\na,x\nb,x\n", {}, "all rows have the label 'x'; expected two"),
    (TEXTS, "a.csv", "words,label\na,x\nb,y\n", {}, "give --text-column, one of: 'words', 'label'"),
    (TEXTS, "a.csv", OK, {"label_column": "no"}, r"no column 'no' \(--label-column\); it has: 'text', 'label'"),
    (TEXTS, "a.csv", OK, {"text_column": "text", "ids_column": "text"}, "both given"),
    (TEXTS, "a.csv", OK, {"ids_column": "text"}, "line 2: text is no list of token ids"),
    (TEXTS, "a.csv", OK, {"horizon": 3}, "has no such option; expected ids_column, label_column, text_column"),
    (TEXTS, "a.csv", OK, {"held_out": 0.01}, "of no label one"),
    (TEXTS, "a.csv", OK, {"held_out": 1.5}, "held_out is 1.5; expected a path, or a fraction"),
    (TEXTS, "a.csv", OK, {"held_out": "a.csv"}, "hold the same files"),
    (TEXTS, "a.csv", OK, {"held_out": "b.csv"}, "b.csv has labels that are not in the data of training: 'z'"),
    (TEXTS, "a.csv", "ids,label\n1,x\n256,y\n", {}, "tokens 1 to 256 .* vocab_size is 256"),
    (TEXTS, "a.jsonl", '{"text": "a", "label": "x"}\n[1]\n', {}, "line 2: is list; expected an object"),
    (TEXTS, "a.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', {}, "line 2: not valid JSON"),
    (TEXTS, "a.jsonl", '{"text": "a", "label": "x"}\n{"text": 3, "label": "y"}\n', {}, "text is 3; expected a text"),
    (TEXTS, "a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', {}, "line 2: label is missing"),
    (TOKENS, "a.csv", OK, {}, "expected a .jsonl file with lists"),
    (TOKENS, "a.jsonl", '{"words": ["a"], "tags": ["X", "Y"]}\n', {}, "words has 1 entries and tags 2"),
    (TOKENS, "a.jsonl", '{"words": "a", "tags": ["X", "Y"]}\n', {}, "expected a list of words"),
    (SERIES, "a.csv", "time,y\n1,1\n2,2\n3.5,3\n", {}, "line 4: time is not a step .* the step is 1"),
    (SERIES, "a.csv", "time,y\n1,1\n3,2\n2,3\n", {}, "line 4: time is 2, which is not after 3"),
    (SERIES, "a.csv", "time,y\n1,1\n1,2\n2,3\n", {}, "line 3: time is 1, which is not after 1"),
    (SERIES, "a.csv", "time,y\n1,1\n2,inf\n", {}, "line 3: y is 'inf'; expected a number"),
    (SERIES, "a.csv", "time,y\n1,1\n2,two\n", {}, "line 3: y is 'two'; expected a number"),
    (SERIES, "a.csv", "time,y\n1,\n2,\n", {}, "'y' has no value at all"),
    (SERIES, "a.csv", "time,y\nnow,1\n2,2\n", {}, "line 2: time is 'now'; expected a number, or a date"),
    (SERIES, "a.csv", "time,y\n1,1\n2,2\n900,3\n", {}, "most of the series would be missing"),
    (SERIES, "a.csv", "time,y,c\n1,1,1\n2,2,\n", {"covariate_columns": ["c"]}, "line 3: the covariate c is missing"),
    (SERIES, "a.csv", "time,y,c\n1,1,1\n2,2,2\n4,4,4\n", {"covariate_columns": ["c"]}, "'c' are not known there"),
    (SERIES, "a.csv", "time,y\n1,1\n2,2\n", {"target_columns": ["y"], "covariate_columns": ["y"]}, "'y' named for two"),
    (SERIES, "a.csv", "time\n1\n2\n", {}, "no column to forecast"),
    (SERIES, "a.csv", "y\n" + "1\n" * 20, {"length": 30, "horizon": 2}, "no window of 30 values"),
    (SERIES, "a.csv", "y\n" + "1\n" * 20, {"horizon": 9}, "holds out 4 of 20 positions, fewer than .* 9"),
    (SERIES, "a.csv", "y\n" + "1\n" * 20, {"horizon": 2, "season": 16}, "season is 16; expected 1 to 15"),
    ("layers", "a.csv", OK, {}, "data of task 'layers' is not read from files; expected one of forecasting"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "text", "options", "message"), REFUSED)
def test_bad_data_is_refused_and_named(tmp_path, task, name, text, options, message):
    table(tmp_path / "b.csv", "text,label\na,x\nb,z\n")
    path = table(tmp_path / name, text)
    options = {"length": 4} | options
    if isinstance(options.get("held_out"), str):
        options["held_out"] = tmp_path / options["held_out"]
    with pytest.raises(ValueError, match=message) as fault:
        read(path, task=task, **options)
    assert "\n" not in str(fault.value)


def test_bad_images_are_refused_and_named(pictures, tmp_path):
    (pictures / "dog" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"dog/broken\.png: no image that Pillow reads"):
        read(pictures, IMAGES, length=1)
    (tmp_path / "flat").mkdir()
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    for path, message in (
        (tmp_path / "none", "none: is no folder; expected one that has a folder of image files for each class"),
        (tmp_path / "flat", "flat: has no folders"),
        (tmp_path / "empty", "cat: has no files"),
    ):
        with pytest.raises(ValueError, match=message):
            read(path, IMAGES, length=1)


def test_a_model_s_labels_and_sizes_are_kept(tmp_path):
    path = table(tmp_path / "a.csv", OK)
    known = mc.MambaConfig(
        d_model=8, n_layer=1, vocab_size=256, task=TEXTS, task_options={"labels": ("y", "x", "w"), "pooling": "mean"}
    )
    data = read(path, known, length=4, held_out=0)
    assert data.examples["targets"].tolist() == [1, 0, 1, 0]
    assert data.config == known
    with pytest.raises(ValueError, match="labels that the model has not: 'a', 'b', 'c', 'd'; it has 'y', 'x', 'w'"):
        read(path, known, length=4, text_column="label", label_column="text")
    with pytest.raises(ValueError, match="the config is of task 'sequence_classification'; expected 'forecasting'"):
        read(path, known, length=4, task=SERIES)
    options = {"horizon": 3, "quantiles": (0.1, 0.9)}
    quantiles = mc.MambaConfig(d_model=8, n_layer=1, task=SERIES, task_options=options)
    numbers = table(tmp_path / "b.csv", "y\n" + "1\n" * 30)
    with pytest.raises(ValueError, match=r"quantiles \(0.1, 0.9\); expected 0.5 among them"):
        read(numbers, quantiles, length=4)
    with pytest.raises(ValueError, match="the config has horizon 3, and the data and options 4"):
        read(numbers, quantiles, length=4, horizon=4)


def test_a_resumed_run_has_its_own_data(tmp_path):
    path = table(tmp_path / "a.csv", "text,label,other\n" + "".join(f"t{n},{'xy'[n % 2]},{n % 3}\n" for n in range(20)))
    data = read(path, task=TEXTS, length=4, held_out=0.3, seed=5)
    again = read(path, data.config, length=4, seed=5, resume=True)
    assert again.config == data.config
    assert again.config.extra == data.config.extra
    for name, array in data.held_out.items():
        np.testing.assert_array_equal(array, again.held_out[name])
    for given, message in (
        ({"label_column": "other"}, "label_column is 'other', and the run's was 'label'; a run resumes as is"),
        ({"held_out": 0.5}, "held_out is 0.5, and the run held out 0.3"),
        ({"seed": 6}, "what is held out is not what the run held out"),
        ({"length": 5}, "what is held out is not what the run held out|length differ"),
    ):
        with pytest.raises(ValueError, match=message):
            read(path, data.config, resume=True, **({"length": 4, "seed": 5} | given))
    with pytest.raises(ValueError, match="does not say how its data was read"):
        read(path, data.config.__class__(**{**vars(data.config), "extra": {}}), length=4, resume=True)
    apart = table(tmp_path / "b.csv", "text,label\nq,x\nr,y\n")
    data = read(path, task=TEXTS, length=4, held_out=apart)
    read(path, data.config, length=4, held_out=apart, resume=True)
    with pytest.raises(ValueError, match="held out a file of its own; give it again"):
        read(path, data.config, length=4, resume=True)
    table(apart, "text,label\nq,x\nr,x\n")
    with pytest.raises(ValueError, match="not what the run held out"):
        read(path, data.config, length=4, held_out=apart, resume=True)


def test_a_reader_of_another_package_is_found_by_its_task(tmp_path, monkeypatch):
    """A file in a folder of the same name is all there is of it; no list has it."""
    package = tmp_path / "elsewhere"
    (package / "datasets").mkdir(parents=True)
    for folder in (package, package / "datasets"):
        (folder / "__init__.py").write_text("")
    (package / "datasets" / "features.py").write_text(
        "from mamba_core.datasets.base import Data, Option\n"
        "DATA, OPTIONS, HELD_OUT, TEXTS = 'numbers', (Option('shift', 'added', int),), None, False\n"
        "def read(source):\n"
        "    found = [int(part) + source.option('shift') for part in source.path.read_text().split()]\n"
        "    return Data(source.config, found, source.held_out)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kept = discovery.roots, discovery.names, discovery.find, discovery._places
    monkeypatch.setattr(discovery, "roots", lambda: ("mamba_core", "elsewhere"))
    for function in kept[1:]:
        function.cache_clear()
    try:
        assert ("features",) in datasets.options()
        data = read(table(tmp_path / "a.txt", "1 2"), task="features", shift=3)
        assert data.examples == [4, 5]
    finally:
        monkeypatch.undo()
        for function in kept[1:]:
            function.cache_clear()
