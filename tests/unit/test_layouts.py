"""Layouts: every pair round-trips bit for bit, names and transforms, MiniMamba, tied heads."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.config import MambaConfig
from mamba_core.weights import layouts, tables
from mamba_core.weights.formats import WRITERS, CheckpointError
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.transforms import DENSE

from .layout_files import (
    COMPAT,
    CONFIG,
    LOST,
    OUTER,
    arrays_of,
    contents,
    of_architecture,
    of_layout,
    options_of,
    rewrite,
    state_dict,
    write,
)

# Those of Mamba-2 and of images alone have files of their own.
LAYOUTS = [name for name in layouts.names() if "mamba" in tables.holding(name) or "minimamba" in tables.holding(name)]

# --- round trips -----------------------------------------------------------------------------------


@st.composite
def configs(draw) -> MambaConfig:
    """Square matrices included: d_inner = d_model, d_conv = d_inner, dt_rank + 2 * d_state = d_inner."""
    d = draw(st.sampled_from([2, 4, 6]))
    eos = draw(st.sampled_from([None, 3, (3, 5)]))
    config = MambaConfig(
        d_model=d,
        n_layer=draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(1, 9)),
        d_state=draw(st.integers(1, 3)),
        d_conv=draw(st.sampled_from([1, 2, 4, 6])),
        expand=draw(st.sampled_from([1, 2, 1.5])),
        dt_rank=draw(st.sampled_from(["auto", 2])),
        bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        tie_embeddings=draw(st.booleans()),
        pad_vocab_size_multiple=draw(st.sampled_from([1, 8])),
        dt_init_floor=draw(st.sampled_from([1e-4, 1e-3])),
        residual_in_fp32=draw(st.booleans()),
        eos_token_id=eos,
        task=draw(st.sampled_from(["lm", "lm", "features", "layers"])),
        extra={"note": "kept"},
    )
    return of_architecture(config, draw(st.sampled_from(["mamba", "mamba", "minimamba"])))


def layouts_for(config) -> list[str]:
    """The layouts that hold the config without loss of what the function needs."""
    if config.architecture == "minimamba":
        possible = {"hf": config.task != "layers", "minimamba": config.task != "layers"}
        possible["minimamba"] &= config.task != "lm" or not config.bias
    else:
        alone = config.task != "features" and config.expand != 1.5
        mlx = alone and config.norm_eps == 1e-5 and config.conv_bias
        possible = {"hf": config.task != "layers", "mambapy": alone, "mambapy_mlx": mlx}
        possible["mlx_lm"] = config.task == "lm" and config.norm_eps == 1e-5
        possible["mamba_ssm"] = config.task == "lm" and config.norm_eps == 1e-5
        possible["mamba_minimal"] = possible["mamba_ssm"] and config.tie_embeddings
    return [name for name, holds in possible.items() if holds]


@given(data=st.data())
def test_a_round_trip_keeps_every_bit_and_the_config(data):
    config = data.draw(configs())
    if not (possible := layouts_for(config)):
        return
    first, *way = data.draw(st.lists(st.sampled_from(possible), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16", "float64"]))
    options = options_of(config)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = write(root / "0", config, first, dtype)
        for step, layout in enumerate([*way, first], 1):
            folder = rewrite(folder, root / str(step), layout, **options)
            assert open_model(folder, **options).layout == layout
        assert contents(folder) == contents(root / "0")
        before, after = open_model(root / "0", **options), open_model(folder, **options)
        assert after.stored == before.stored
        if {"mamba_ssm", "minimamba"} & {first, *way}:
            defaults = {field: getattr(MambaConfig(), field) for field in LOST}
            assert dataclasses.replace(after.config, **defaults) == dataclasses.replace(before.config, **defaults)
        else:
            # Of a model without an embedding or a head, hf says the more, but nothing of that is lost.
            assert after.config == before.config == config
            assert after.config.extra == config.extra


def test_the_round_trips_are_between_all_layouts():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    held = set().union(*(layouts_for(config) for config in (CONFIG, tied, COMPAT)))
    assert held == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file_format", WRITERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_file_format_of_every_layout(tmp_path, layout, file_format, dtype):
    config = of_layout(CONFIG, layout)
    if layout == "mlx_lm" and file_format != "safetensors":
        with pytest.raises(ValueError, match=f"layout 'mlx_lm' cannot be written as {file_format}.*safetensors"):
            write(tmp_path / "out", config, layout, dtype, file_format)
        assert not list((tmp_path / "out").iterdir())
        return
    expected = dict(open_model(write(tmp_path / "hf", config, "hf", dtype), **options_of(config)).tensors())
    opened = open_model(write(tmp_path / "out", config, layout, dtype, file_format), **options_of(config))
    assert opened.layout == layout
    for name, array in opened.tensors():
        assert array.dtype == expected[name].dtype
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("layout", ["mlx_lm", "mambapy_mlx"])
def test_a_layout_may_be_named_with_hyphens(tmp_path, layout, capsys):
    main = pytest.importorskip("mamba_core.cli").main
    hyphened = layout.replace("_", "-")
    folder = write(tmp_path / "out", CONFIG, hyphened)
    assert open_model(folder, layout=hyphened).layout == layout
    command = ["convert", str(folder), str(tmp_path / "again"), "--from", hyphened, "--to", hyphened, "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["target_layout"] == layout
    assert main(["inspect", str(folder), "--from", hyphened, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == layout


# --- names and shapes ------------------------------------------------------------------------------

MIXER = ("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight")
MIXER += ("dt_proj.bias", "out_proj.weight")
CONV_SHAPE = {"mambapy_mlx": (12, 4, 12), "mlx_lm": (12, 4, 1)}


@pytest.mark.parametrize(("layout", "task"), OUTER)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_the_shape_of_the_convolution(tmp_path, layout, task, tied):
    config = of_layout(dataclasses.replace(CONFIG, task=task, tie_embeddings=tied), layout)
    found = open_checkpoint(write(tmp_path / "out", config, layout))
    outer = {name for name in OUTER[layout, task] if not name.endswith(".")}
    if tied and layout in ("hf", "mlx_lm"):
        outer.discard("lm_head.weight")
    (layers,) = (name for name in OUTER[layout, task] if name.endswith("."))
    conv = "conv1d.conv1d." if layout == "mambapy_mlx" else "conv1d."
    mixer = {f"mixer.{name}".replace("conv1d.", conv) for name in MIXER}
    assert set(found) == outer | {f"{layers}{i}.{name}" for i in (0, 1) for name in {*mixer, "norm.weight"}}
    assert found.header(f"{layers}1.mixer.{conv}weight").shape == CONV_SHAPE.get(layout, (12, 1, 4))
    assert open_model(tmp_path / "out", **options_of(config)).config == config


def test_every_task_that_a_layout_cannot_hold_is_refused(tmp_path):
    refused = 0
    for layout in LAYOUTS:
        for task in ("lm", "features", "layers"):
            if (layout, task) not in OUTER:
                config = of_layout(dataclasses.replace(CONFIG, task=task), layout)
                with pytest.raises(ValueError, match=rf"task '{task}'.*(layout (mambapy|hf)|no layout)"):
                    write(tmp_path / f"{layout}-{task}", config, layout)
                refused += 1
    assert refused == 10


def test_the_dense_convolution_is_the_depthwise_one_on_its_diagonal():
    """Also where the matrix is square: channels 4, width 4."""
    weight = np.random.default_rng(0).normal(size=(4, 1, 4)).astype(np.float32)
    dense = DENSE.write(weight)
    for out, tap, channel in np.ndindex(4, 4, 4):
        assert dense[out, tap, channel] == (weight[out, 0, tap] if out == channel else 0)
    assert DENSE.read(dense).tobytes() == weight.tobytes()


@pytest.mark.parametrize("value", [-0.25, float("nan"), 1e-30])
def test_a_dense_convolution_that_mixes_channels_is_refused(tmp_path, value):
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy_mlx"))
    arrays["mamba.layers.1.mixer.conv1d.conv1d.weight"][3, 2, 1] = value
    folder = state_dict(tmp_path / "b", arrays, n_layers=2)
    with pytest.raises(CheckpointError, match=rf"layers\.1.*not a depthwise conv.* up to {abs(value):.3g}") as caught:
        dict(open_model(folder).tensors())
    assert "\n" not in str(caught.value)


def test_a_dense_convolution_may_have_negative_zeros(tmp_path):
    """What multiplying negative weights by a mask of zeros leaves."""
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy_mlx"))
    arrays["mamba.layers.1.mixer.conv1d.conv1d.weight"][3, 2, 1] = -0.0
    opened = open_model(state_dict(tmp_path / "b", arrays, n_layers=2))
    expected = dict(open_model(tmp_path / "a").tensors())
    assert all(array.tobytes() == expected[name].tobytes() for name, array in opened.tensors())


# --- MiniMamba -------------------------------------------------------------------------------------


def test_minimamba_is_read_under_its_flag_only(tmp_path):
    folder = write(tmp_path / "out", COMPAT, "minimamba")
    with pytest.raises(CheckpointError, match=r"another function than Mamba.*bias twice.*no SiLU.*--compat minimamba"):
        open_model(folder)
    assert open_model(folder, compat="minimamba").config.architecture == "minimamba"
    with pytest.raises(ValueError, match="compat is 'other'"):
        open_model(folder, compat="other")
    with pytest.raises(ValueError, match=r"compat is 'minimamba', but .* of layout hf, is of architecture 'mamba'"):
        open_model(write(tmp_path / "hf", CONFIG, "hf"), compat="minimamba")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("hf", "minimamba")])
def test_its_arithmetic_is_not_written_for_others(tmp_path, layout):
    with pytest.raises(ValueError, match=r"'minimamba' cannot be written as .* expected layout hf or minimamba"):
        write(tmp_path / "out", COMPAT, layout)


def test_a_mamba_is_not_written_for_it(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"'mamba' cannot be written as minimamba, whose library would compute.* expected layout hf .*bias twice",
    ):
        write(tmp_path / "out", CONFIG, "minimamba")


CLASSIFIER = {"num_labels": 3, "bias": True, "pooling": "mean"}


def test_a_classifier_is_told_by_its_tensors(tmp_path):
    config = dataclasses.replace(COMPAT, task="sequence_classification", task_options=CLASSIFIER)
    folder = write(tmp_path / "a", config, "minimamba")
    arrays = arrays_of(folder)
    assert {"classifier.classifier.weight", "classifier.classifier.bias"} < arrays.keys()
    opened = open_model(folder, compat="minimamba")
    assert opened.config.task_options == CLASSIFIER
    assert opened.left_out == ()
    alone = open_model(state_dict(tmp_path / "b", arrays), compat="minimamba").config  # without a config.json
    assert (alone.task, alone.task_options) == (config.task, {"num_labels": 3, "bias": True})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_labels": 4}))
    with pytest.raises(CheckpointError, match="num_labels 4, but the classifier has 3 outputs"):
        open_model(folder, compat="minimamba")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": False}, "bias=False cannot be written as minimamba"),
        ({"pooling": "first"}, "pooling='first' cannot be written as minimamba, which has last, mean, max"),
        ({"class_weights": [1, 2, 3]}, "task option class_weights=.* cannot be written as minimamba"),
    ],
)
def test_a_classifier_that_it_cannot_run_is_not_written(tmp_path, options, message):
    config = dataclasses.replace(COMPAT, task="sequence_classification", task_options=CLASSIFIER | options)
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a", config, "minimamba")


@pytest.mark.parametrize("tied", [True, False])
def test_the_names_of_its_first_releases(tmp_path, tied):
    config = dataclasses.replace(COMPAT, tie_embeddings=tied)
    now = write(tmp_path / "a", config, "minimamba")
    renamed = {"embedding.token_embedding.": "embedding.", "backbone.norm.": "norm_f.", "lm_head.lm_head.": "lm_head."}
    arrays = {}
    for name, array in arrays_of(now).items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        arrays[name.removeprefix("backbone.")] = array
    assert "layers.0.mixer.A_log" in arrays
    opened = open_model(state_dict(tmp_path / "b", arrays), compat="minimamba")
    assert opened.layout == "minimamba"
    assert opened.config.tie_embeddings == tied
    expected = dict(open_model(now, compat="minimamba").tensors())
    found = dict(opened.tensors())
    assert found.keys() == expected.keys()
    assert all(array.tobytes() == expected[name].tobytes() for name, array in found.items())


# --- the head that is tied -------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 40_000])
def test_a_tied_head_is_compared_to_its_last_row(tmp_path, row):
    """Of more rows than are compared at a time."""
    config = dataclasses.replace(CONFIG, d_model=16, vocab_size=40_001, tie_embeddings=True)
    arrays = arrays_of(write(tmp_path / "a", config, "mamba_ssm"))
    assert arrays["lm_head.weight"].nbytes > 2**21
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    assert open_model(tmp_path / "a").config == config
    arrays["lm_head.weight"][row, 3] += 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from .*, but the config ties them"):
        open_model(state_dict(tmp_path / "b", arrays, **fields))


@pytest.mark.parametrize("shape", [(), (3,), (16, 5), (0, 6)])
def test_a_head_of_another_shape(tmp_path, shape):
    arrays = arrays_of(write(tmp_path / "a", dataclasses.replace(CONFIG, tie_embeddings=True), "mambapy"))
    arrays["lm_head.weight"] = np.zeros(shape, np.float32)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape .*expected \(16, 6\)"):
        open_model(state_dict(tmp_path / "b", arrays))
