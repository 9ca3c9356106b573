"""The demo of the tasks: its files hold what the packages hold, with nothing on both sides, and its script runs."""

import dataclasses
import json

import numpy as np
import pytest

from mamba_core import datasets, vision
from mamba_core.benchmarks import demo_data, demo_tasks
from mamba_core.cli.demo import clear
from mamba_core.config import from_dict

for package in ("rich", *demo_data.PACKAGES):
    pytest.importorskip(package)


def test_digits_are_read_as_the_package_has_them(tmp_path):
    from sklearn.datasets import load_digits

    loaded, files = load_digits(), demo_data.digits(tmp_path)
    train, held = (sorted(folder.rglob("*.png")) for folder in files)
    assert sorted(int(path.stem) for path in [*train, *held]) == list(range(1797))
    assert len(held) == 360
    for path in held[::9]:
        pixels = vision.read_pixels(path, (8, 8))
        np.testing.assert_array_equal((pixels / 255 * 16).round()[..., 0], loaded.images[int(path.stem)])
        assert path.parent.name == str(loaded.target[int(path.stem)])


@pytest.mark.parametrize(("name", "apart", "missing"), [("co2", 36, 5), ("sunspots", 33, 0)])
def test_three_seasons_of_a_series_are_held_out(name, apart, missing, tmp_path):
    import statsmodels.datasets

    part = demo_tasks.PARTS[name]
    files = part.write(tmp_path)
    season = part.options["season"]
    data = datasets.read(files.train, from_dict(part.config), held_out=files.held_out, length=24, season=season)
    source = getattr(statsmodels.datasets, name).load().data
    values = source["co2"].resample("MS").mean() if name == "co2" else source["SUNACTIVITY"]
    np.testing.assert_allclose(data.series.values[:, 0], values.to_numpy(), atol=1e-4)
    assert (len(data.series) - data.end, np.isnan(values).sum()) == (apart, missing)
    assert data.facts["inserted"] == 0
    assert apart == 3 * season


def test_no_message_is_on_both_sides(tmp_path):
    files = demo_data.languages(tmp_path)
    train, held = map(demo_data.read_rows, files)
    for column in ("message", "text"):
        assert not {row[column] for row in train} & {row[column] for row in held}, column
    assert {row["label"] for row in train} == {row["label"] for row in held} == set(demo_data.LANGUAGES)
    assert {"message": "Monday", "text": "Montag", "label": "de"} in train + held
    assert all(row["message"] != row["text"] for row in train + held)
    every = demo_data.messages()
    texts = {row["text"] for row in held}
    assert len(train) + len(held) == len(every) - sum(
        row["text"] in texts and row["message"] not in {one["message"] for one in held} for row in every
    )
    assert 0.15 < len({row["message"] for row in held}) / len({row["message"] for row in every}) < 0.25


def test_the_script_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_data, "LANGUAGES", ("de", "sv"))
    assert demo_tasks.main(["--out", str(tmp_path), "--steps", "1"]) == 0
    assert "targets are not held" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report.json").read_text())
    assert list(rows) == list(demo_tasks.PARTS)
    for name, row in rows.items():
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert row["value"] == report["metrics"][row["metric"]]
        assert row["target"] is not None
        for figure in report["figures"]:
            assert (tmp_path / name / figure).is_file()
    assert (tmp_path / "digits" / "samples.png").is_file()
    assert {"logistic_regression_of_words", "majority_accuracy"} <= rows["languages"]["beside"].keys()


@pytest.mark.parametrize(("target", "status"), [(0.0, 1), (99.0, 0)])
def test_the_script_fails_where_a_target_is_missed(target, status, tmp_path, capsys, monkeypatch):
    part = demo_tasks.PARTS["sunspots"]
    short = dataclasses.replace(part, options=part.options | {"steps": 1}, target=lambda known: target)
    monkeypatch.setitem(demo_tasks.PARTS, "sunspots", short)
    assert demo_tasks.main(["sunspots", "--out", str(tmp_path)]) == status
    assert ("MISSED: sunspots, mase" in capsys.readouterr().out) == bool(status)


def test_an_accuracy_must_reach_its_target():
    """And an error be below that of the naive forecast."""
    for name, value, missed in (
        ("digits", 0.97, False),
        ("digits", 0.969, True),
        ("co2", 1.0, True),
        ("co2", 0.99, False),
    ):
        part = demo_tasks.PARTS[name]
        report = {"metrics": {part.metric: value}}
        assert demo_tasks._judged(part, report, {"naive_mase": 1.0})["missed"] == missed


def test_the_other_demo_leaves_its_results_alone(tmp_path):
    (tmp_path / "tasks").mkdir()
    clear(tmp_path, ("model",))
    assert (tmp_path / "tasks").is_dir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(ValueError, match="holds something else than a demo's results"):
        clear(other, ("model",))
