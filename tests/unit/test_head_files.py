"""Models of every task as files, of every architecture: as transformers names them, in our own layout and back."""

import dataclasses
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import registry, tasks
from mamba_core.spec.init import initial_values
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model
from tests.conformance.cases import bases
from tests.conformance.heads import KINDS, config_of

MAMBA = bases()["mamba"]


def written(folder, config, layout="hf"):
    folder.mkdir()
    write_model(folder, config, dict(initial_values(config, 1)), layout=layout, dtype="float32")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", bases())
def test_they_are_written_and_read(tmp_path, architecture, kind):
    config = config_of(architecture, kind)
    opened = open_model(written(tmp_path / "saved", config))
    assert opened.config == config
    assert dict(opened.config.task_options) == dict(config.task_options)
    for name, value in initial_values(config, 1):
        np.testing.assert_array_equal(dict(opened.tensors())[name], value)
    stored = open_checkpoint(tmp_path / "saved")
    own = {
        "sequence_classification": "score.weight",
        "token_classification": "score.bias",
        "forecasting": "output_proj.bias",
    }
    norms = ("norm_f.weight", "backbone.norm_f.weight", "final_layernorm.weight")
    assert any(name in stored for name in ([own[config.task]] if config.task in own else norms))


@pytest.mark.parametrize("architecture", [name for name in bases() if name not in ("minimamba", "bidirectional")])
def test_transformers_names(tmp_path, architecture):
    """Of the class, the labels and the problem; and so they are read without our own fields."""
    options = {"num_labels": 3, "labels": ["a", "b", "c"], "problem_type": "multi_label"}
    config = dataclasses.replace(bases()[architecture], task="sequence_classification", task_options=options)
    file = written(tmp_path / "saved", config) / "config.json"
    fields = json.loads(file.read_text())
    assert fields["architectures"][0].endswith("ForSequenceClassification")
    assert fields["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert fields["label2id"] == {"a": 0, "b": 1, "c": 2}
    assert fields["problem_type"] == "multi_label_classification"
    del fields["mamba_core"]["task"], fields["mamba_core"]["task_options"]
    file.write_text(json.dumps(fields))
    found = open_model(tmp_path / "saved").config
    assert (found.task, tasks.of(found)) == (config.task, tasks.of(config))
    del fields["id2label"], fields["label2id"], fields["problem_type"]
    file.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"score\.weight has shape \(3, \d+\), expected \(2, \d+\)"):
        open_model(tmp_path / "saved")


def test_other_layouts_refuse_what_they_cannot_hold(tmp_path):
    config = dataclasses.replace(MAMBA, task="token_classification")
    with pytest.raises(
        ValueError, match="task 'token_classification' cannot be written as mamba_ssm; expected layout hf"
    ):
        written(tmp_path / "saved", config, "mamba_ssm")
    config = dataclasses.replace(bases()["minimamba"], task="features", task_options={"pooling": "mean"})
    with pytest.raises(ValueError, match="task option pooling='mean' cannot be written as minimamba"):
        written(tmp_path / "other", config, "minimamba")


@pytest.mark.parametrize(
    "kind", ["classes", "several labels", "a forecast", "quantiles", "tokens", "the last hidden state"]
)
def test_parity(tmp_path, kind):
    """Values of rows are compared in the call that has all positions; scales are those of one call."""
    config, name = config_of("mamba", kind), registry.installed()[0]
    labelled = tasks.of(config).labelled
    found = mc.parity(written(tmp_path / "saved", config), backends=[name], length=9, steps=3, grad=labelled)
    assert found.passed
    modes = found.backends[0].modes
    assert set(modes["forward"].errors) >= {*tasks.of(config).of_rows} - {"location", "scale"}
    assert ("chunked" in modes) == (kind != "quantiles")
    if "chunked" in modes:
        assert not set(modes["chunked"].errors) & set(tasks.of(config).of_rows)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("features", {"pooling": "sum"}, "pooling is 'sum'; expected None, 'last', 'mean', 'max', 'first'"),
        ("sequence_classification", {"num_labels": 0}, "num_labels is 0; expected an integer from 1"),
        ("sequence_classification", {"labels": ["a", "a"]}, "expected 2 names, all different"),
        ("sequence_classification", {"labels": ["a"], "num_labels": 2}, "expected 2 names"),
        ("sequence_classification", {"class_weights": [1.0]}, "expected 2 numbers from 0"),
        ("sequence_classification", {"class_weights": [0, 0]}, "not all of them 0"),
        ("sequence_classification", {"problem_type": "single_label", "num_labels": 1}, "expected 2 labels at least"),
        ("sequence_classification", {"num_labels": 1, "class_weights": [1]}, "'regression', which has no classes"),
        ("sequence_classification", {"problem_type": "other"}, "problem_type is 'other'; expected None, "),
        ("token_classification", {"pooling": "last"}, "unexpected keyword argument 'pooling'"),
        ("forecasting", {"quantiles": [0.9, 0.1]}, "expected rising numbers between 0 and 1"),
        ("forecasting", {"quantiles": []}, "expected rising numbers"),
        ("forecasting", {"horizon": 0}, "horizon is 0; expected an integer from 1"),
        ("forecasting", {"covariates": -1}, "covariates is -1; expected an integer from 0"),
        ("forecasting", {"instance_norm": 1}, "instance_norm is 1; expected true or false"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(task, options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MAMBA, task=task, task_options=options)
