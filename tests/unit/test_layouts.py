"""Layouts: every pair round-trips bit for bit, detection says why, tensors tell configs, what cannot be is refused."""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_core.config import MambaConfig
from mamba_core.spec.params import parameter_table
from mamba_core.weights.convert import inspect
from mamba_core.weights.io import DTYPES, CheckpointError, TensorSource, open_checkpoint, sources_of, write_torch
from mamba_core.weights.layouts import LAYOUTS, WRITERS, copy_tokenizer, open_model, write_layout
from mamba_core.weights.transforms import DENSE

CONFIG = MambaConfig(d_model=6, n_layer=2, vocab_size=13, d_state=3, d_conv=4, dt_rank=2, tie_embeddings=False)
COMPAT = dataclasses.replace(CONFIG, compat="minimamba")
# What mamba_ssm and minimamba have no field for; none of it changes the function.
LOST = ("rescale_prenorm_residual", "initializer_range", "dt_init_floor", "residual_in_fp32")
LOST += ("bos_token_id", "eos_token_id", "pad_token_id")


def write(folder, config, layout, dtype="float32", file_format=None, seed=0) -> Path:
    """A checkpoint of random values, A_log, D and the dt bias in float32."""
    rng = np.random.default_rng(seed)
    sources = []
    for name, parameter in parameter_table(config).items():
        stored = parameter.dtype(dtype)
        value = rng.normal(size=parameter.shape).astype(DTYPES[stored].numpy)
        sources.append(TensorSource(name, parameter.shape, stored, lambda value=value: value))
    folder.mkdir()
    write_layout(folder, config, sources, layout, file_format)
    return folder


def rewrite(source, folder, layout, **options) -> Path:
    opened = open_model(source, **options)
    folder.mkdir()
    write_layout(folder, opened.config, [item for _, _, item in opened.sources()], layout)
    return folder


def options_of(config) -> dict:
    return {"compat": config.compat}


def contents(folder) -> dict[str, tuple]:
    opened = open_checkpoint(folder)
    return {name: (opened[name].shape, opened[name].dtype, opened[name].tobytes()) for name in opened}


def state_dict(folder, arrays, **fields) -> Path:
    folder.mkdir()
    write_torch(folder / "model.pt", sources_of(arrays))
    if fields:
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


def arrays_of(folder) -> dict[str, np.ndarray]:
    opened = open_checkpoint(folder)
    return {name: np.array(opened[name]) for name in opened}


# --- round trips -----------------------------------------------------------------------------------


@st.composite
def configs(draw) -> MambaConfig:
    """Square matrices included: d_inner = d_model, d_conv = d_inner, dt_rank + 2 * d_state = d_inner."""
    d = draw(st.sampled_from([2, 4, 6]))
    eos = draw(st.sampled_from([None, 3, (3, 5)]))
    return MambaConfig(
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
        compat=draw(st.sampled_from([None, None, "minimamba"])),
        extra={"note": "kept"},
    )


def layouts_for(config) -> list[str]:
    """The layouts that hold the config without loss of what the function needs."""
    if config.compat:
        possible = {"hf": config.task != "layers" and config.expand != 1.5, "minimamba": config.task != "layers"}
        possible["minimamba"] &= config.task != "lm" or not config.bias
    else:
        alone = config.task != "features" and config.expand != 1.5
        mlx = alone and config.norm_eps == 1e-5 and config.conv_bias
        possible = {"hf": config.task != "layers" and config.expand != 1.5, "mambapy": alone, "mambapy_mlx": mlx}
        possible["mlx_lm"] = config.task == "lm" and config.expand != 1.5 and config.norm_eps == 1e-5
        possible["mamba_ssm"] = config.task == "lm" and config.norm_eps == 1e-5
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
    held = set().union(*(layouts_for(config) for config in (CONFIG, COMPAT)))
    assert held == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file_format", WRITERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_file_format_of_every_layout(tmp_path, layout, file_format, dtype):
    config = COMPAT if layout == "minimamba" else CONFIG
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

OUTER = {
    ("hf", "lm"): ("backbone.embeddings.weight", "backbone.layers.", "backbone.norm_f.weight", "lm_head.weight"),
    ("hf", "features"): ("embeddings.weight", "layers.", "norm_f.weight"),
    ("mamba_ssm", "lm"): ("backbone.embedding.weight", "backbone.layers.", "backbone.norm_f.weight", "lm_head.weight"),
    ("mambapy", "lm"): ("embedding.weight", "mamba.layers.", "norm_f.weight", "lm_head.weight"),
    ("mambapy", "layers"): ("layers.",),
    ("mambapy_mlx", "lm"): ("embedding.weight", "mamba.layers.", "norm_f.weight", "lm_head.weight"),
    ("mambapy_mlx", "layers"): ("layers.",),
    ("minimamba", "lm"): (
        *("embedding.token_embedding.weight", "backbone.layers.", "backbone.norm.weight", "lm_head.lm_head.weight"),
    ),
    ("minimamba", "features"): ("embedding.token_embedding.weight", "backbone.layers.", "backbone.norm.weight"),
    ("mlx_lm", "lm"): ("backbone.embeddings.weight", "backbone.layers.", "backbone.norm_f.weight", "lm_head.weight"),
}
MIXER = ("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight")
MIXER += ("dt_proj.bias", "out_proj.weight")
CONV_SHAPE = {"mambapy_mlx": (12, 4, 12), "mlx_lm": (12, 4, 1)}


@pytest.mark.parametrize(("layout", "task"), OUTER)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_the_shape_of_the_convolution(tmp_path, layout, task, tied):
    compat = "minimamba" if layout == "minimamba" else None
    config = dataclasses.replace(CONFIG, task=task, compat=compat, tie_embeddings=tied)
    found = open_checkpoint(write(tmp_path / "out", config, layout))
    outer = {name for name in OUTER[layout, task] if not name.endswith(".")}
    if tied and layout in ("hf", "mlx_lm"):
        outer.discard("lm_head.weight")
    (layers,) = (name for name in OUTER[layout, task] if name.endswith("."))
    conv = "conv1d.conv1d." if layout == "mambapy_mlx" else "conv1d."
    mixer = {f"mixer.{name}".replace("conv1d.", conv) for name in MIXER}
    assert set(found) == outer | {f"{layers}{i}.{name}" for i in (0, 1) for name in {*mixer, "norm.weight"}}
    assert found.header(f"{layers}1.mixer.{conv}weight").shape == CONV_SHAPE.get(layout, (12, 1, 4))
    assert open_model(tmp_path / "out", compat=compat).config == config


def test_every_task_that_a_layout_cannot_hold_is_refused(tmp_path):
    refused = 0
    for layout in LAYOUTS:
        for task in ("lm", "features", "layers"):
            if (layout, task) not in OUTER:
                compat = "minimamba" if layout == "minimamba" else None
                config = dataclasses.replace(CONFIG, task=task, compat=compat)
                with pytest.raises(ValueError, match=rf"task '{task}'.*(mambapy|hf)"):
                    write(tmp_path / f"{layout}-{task}", config, layout)
                refused += 1
    assert refused == 8


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


# --- detection -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("hf", ("config.json has model_type", "backbone.embeddings.weight")),
        ("mamba_ssm", ("config.json has ssm_cfg", "backbone.embedding.weight")),
        ("mambapy", ("config.json has n_layers", "mamba.layers.0.mixer.conv1d.weight")),
        ("mambapy_mlx", ("config.json has n_layers", "mamba.layers.0.mixer.conv1d.conv1d.weight")),
        ("minimamba", ("config.json has norm_epsilon", "embedding.token_embedding.weight")),
        ("mlx_lm", ("config.json has model_type", "MLX wrote it")),
    ],
)
def test_detection_says_why(tmp_path, layout, words):
    config = COMPAT if layout == "minimamba" else CONFIG
    opened = open_model(write(tmp_path / "out", config, layout), **options_of(config))
    assert opened.layout == layout
    for word in words:
        assert word in opened.evidence


def test_config_and_names_of_two_layouts_are_not_guessed(tmp_path):
    folder = write(tmp_path / "out", CONFIG, "mambapy")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    words = "cannot tell the layout: config.json fits hf and mlx_lm, the tensor names fit mambapy .*--from"
    with pytest.raises(CheckpointError, match=words):
        open_model(folder)
    other = write(tmp_path / "other", CONFIG, "mamba_ssm")
    (other / "config.json").write_text(json.dumps(CONFIG.to_dict()))  # this project's own fields, of no layout
    with pytest.raises(CheckpointError, match=r"config\.json fits none, the tensor names fit mamba_ssm"):
        open_model(other)


def test_no_shape_tells_mlx_lm_from_hf(tmp_path):
    written = write(tmp_path / "mlx", CONFIG, "mlx_lm")
    folder = state_dict(tmp_path / "out", arrays_of(written), **json.loads((written / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"conv1d.weight has shape \(12, 4, 1\), expected .*read as hf"):
        open_model(folder)
    opened = open_model(folder, layout="mlx_lm")
    expected = dict(open_model(write(tmp_path / "hf", CONFIG, "hf")).tensors())
    assert all(array.tobytes() == expected[name].tobytes() for name, array in opened.tensors())


def test_the_time_to_open_grows_with_the_number_of_tensors(tmp_path):
    """A check of every name against all of them took minutes here."""
    config = MambaConfig(d_model=1, n_layer=5000, vocab_size=1, d_state=1, d_conv=1, pad_vocab_size_multiple=1)
    folder = write(tmp_path / "out", config, "hf")
    began = time.process_time()
    assert len(open_model(folder).stored) > 50_000
    assert time.process_time() - began < 20


def test_wrappers_without_end(tmp_path):
    """Of a hostile file, in names of 7 MB."""
    began = time.process_time()
    with pytest.raises(CheckpointError, match="cannot tell the layout"):
        open_model(state_dict(tmp_path / "out", {"module." * 10**6 + "a": np.zeros(1)}))
    assert time.process_time() - began < 10


QUANTISED = "quantised checkpoints are not read; dequantise it first"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mamba.layers.0.mixer.in_proj.scales", QUANTISED),
        ("mamba.layers.0.mixer.in_proj.weight.absmax", QUANTISED),
        ("mamba.layers.0.mixer.in_proj.qweight", QUANTISED),
        ("mamba.layers.0.mixer.dt_layernorm.weight", "norms of dt, B and C.*which is not read"),
    ],
)
def test_models_that_are_another_function_are_named(tmp_path, name, words):
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy"))
    with pytest.raises(CheckpointError, match=rf"{name}.*{words}"):
        open_model(state_dict(tmp_path / "b", arrays | {name: np.zeros(2)}))


def test_mambapys_mup_is_named_before_the_norms_that_it_lacks(tmp_path):
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy"))
    plain = {name: array for name, array in arrays.items() if "norm" not in name}
    with pytest.raises(CheckpointError, match="mup=True; this version reads mup=False only"):
        open_model(state_dict(tmp_path / "b", plain, n_layers=2, mup=True))
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing.*mup=True"):
        open_model(state_dict(tmp_path / "c", plain, n_layers=2))


# --- where it lies ---------------------------------------------------------------------------------


def test_one_shard_alone_names_its_index(tmp_path):
    folder = tmp_path / "out"
    opened = open_model(write(tmp_path / "a", CONFIG, "hf"))
    folder.mkdir()
    write_layout(folder, CONFIG, [item for _, _, item in opened.sources()], "hf", shard_bytes=1000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    with pytest.raises(CheckpointError, match=r"one of \d+ shards.*index lies beside it: model.safetensors.index.json"):
        open_model(shard)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"one of \d+ shards.*index, model.safetensors.index.json, is missing"):
        open_model(shard)


def test_the_only_shard_is_a_whole_file(tmp_path):
    folder = write(tmp_path / "out", CONFIG, "hf")
    whole = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert open_model(whole).config == CONFIG


def test_a_config_stands_for_its_folder(tmp_path):
    folder = write(tmp_path / "out", CONFIG, "hf")
    assert open_model(folder / "config.json").config == CONFIG
    assert open_model(folder / "config.json").folder == folder


def test_the_only_file_of_weights_may_have_any_name(tmp_path):
    folder = write(tmp_path / "out", CONFIG, "mambapy")
    (folder / "model.pt").rename(folder / "epoch 3.pth")
    assert open_model(folder).layout == "mambapy"
    (folder / "other.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several files of weights.*'epoch 3.pth', 'other.npz'"):
        open_model(folder)


HUB = ["config.json", "model.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model"]
HUB_OTHERS = ["README.md", "run.py", "checkpoint-100/model.safetensors", "onnx/config.json", "pytorch_model.bin"]


def test_what_is_downloaded_is_of_the_top_folder(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    utils = pytest.importorskip("huggingface_hub.utils")
    fetched = []

    def download(repository, *, revision, **patterns):
        fetched.extend(utils.filter_repo_objects(HUB + HUB_OTHERS, **patterns))
        return str(folder)

    folder = write(tmp_path / "out", CONFIG, "hf")
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_model("someone/mamba").config == CONFIG
    assert sorted(fetched) == sorted(HUB)


def test_the_tokenizers_files_are_copied(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    for folder in (source, target):
        folder.mkdir()
    for name in (*HUB, *HUB_OTHERS[:2]):
        (source / name).write_text(name)
    copy_tokenizer(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(HUB[2:])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("layout", ["hf", "mambapy"])
def test_the_prefix_of_a_wrapper_is_read_through(tmp_path, prefix, layout):
    plain = write(tmp_path / "a", CONFIG, layout)
    fields = json.loads((plain / "config.json").read_text())
    wrapped = {prefix + name: array for name, array in arrays_of(plain).items()}
    opened = open_model(state_dict(tmp_path / "b", wrapped, **fields))
    assert prefix in opened.evidence
    expected = dict(open_model(plain).tensors())
    assert all(array.tobytes() == expected[name].tobytes() for name, array in opened.tensors())
    wrapped[f"{prefix}more"] = np.zeros(2)
    with pytest.raises(CheckpointError, match=f"unexpected {prefix}more"):
        open_model(state_dict(tmp_path / "c", wrapped, **fields))


@pytest.mark.parametrize("architecture", ["MambaModel", "MambaForCausalLM", None])
def test_hf_names_without_a_head_are_features_whatever_the_config_says(tmp_path, architecture):
    folder = write(tmp_path / "out", dataclasses.replace(CONFIG, task="features"), "hf")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": architecture and [architecture]}))
    assert open_model(folder).config.task == "features"


def test_hf_config_without_a_head_takes_the_backbone_of_a_model_with_one(tmp_path):
    folder = write(tmp_path / "out", dataclasses.replace(CONFIG, tie_embeddings=True), "hf")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": ["MambaModel"]}))
    opened = open_model(folder)
    assert opened.config.task == "features"
    assert dict(opened.tensors()).keys() == open_checkpoint(folder).keys()


# --- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "task"), [pair for pair in OUTER if pair[0] in ("mambapy", "mambapy_mlx", "minimamba")]
)
@pytest.mark.parametrize("square", [False, True])
def test_without_a_config_the_tensors_tell_the_sizes(tmp_path, layout, task, square):
    compat = "minimamba" if layout == "minimamba" else None
    sizes = {"expand": 1, "d_conv": 6, "d_state": 2, "dt_rank": "auto"} if square else {}
    config = dataclasses.replace(CONFIG, task=task, compat=compat, **sizes)
    folder = write(tmp_path / "out", config, layout)
    (folder / "config.json").unlink()
    (file,) = folder.iterdir()
    for source in (folder, file):
        opened = open_model(source, compat=compat)
        found = opened.config
        assert "there is no config.json" in opened.evidence
        assert f"norm_eps {found.norm_eps} among them" in opened.evidence
        shapes = {name: parameter.shape for name, parameter in parameter_table(config).items()}
        assert {name: parameter.shape for name, parameter in parameter_table(found).items()} == shapes
        expected = dataclasses.replace(
            config,
            vocab_size=MambaConfig().vocab_size if task == "layers" else config.padded_vocab_size,
            pad_vocab_size_multiple=1,
            tie_embeddings=task != "lm",
        )
        assert found == expected


def test_a_layout_whose_library_saves_a_config_needs_it(tmp_path):
    folder = write(tmp_path / "out", CONFIG, "hf")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file.* layout hf needs"):
        open_model(folder)


@pytest.mark.parametrize("layout", ["mambapy", "mambapy_mlx", "minimamba"])
@pytest.mark.parametrize("head", ["tied", "own", "absent"])
def test_a_head_that_is_the_embedding_is_tied(tmp_path, layout, head):
    compat = "minimamba" if layout == "minimamba" else None
    config = dataclasses.replace(CONFIG, compat=compat, tie_embeddings=head != "own")
    arrays = arrays_of(write(tmp_path / "a", config, layout))
    if head == "absent":
        arrays.popitem()
    opened = open_model(state_dict(tmp_path / "b", arrays), compat=compat)
    expected = "features" if layout == "minimamba" and head == "absent" else "lm"
    assert opened.config.task == expected
    assert opened.config.tie_embeddings == (head != "own")
    assert ("lm_head.weight" in dict(opened.tensors())) == (head == "own")


def test_mambapy_writes_its_own_fields_and_keeps_the_others(tmp_path):
    config = dataclasses.replace(CONFIG, eos_token_id=(3, 4), tie_embeddings=True, extra={"note": 1})
    fields = json.loads((write(tmp_path / "out", config, "mambapy") / "config.json").read_text())
    sizes = {"d_model": 6, "n_layers": 2, "dt_rank": 2, "d_state": 3, "d_conv": 4, "expand_factor": 2}
    steps = {"dt_min": 0.001, "dt_max": 0.1, "dt_init": "random", "dt_scale": 1.0}
    rest = {"bias": False, "conv_bias": True, "rms_norm_eps": 1e-5, "base_std": 0.02}
    rows = {"vocab_size": 13, "pad_vocab_size_multiple": 8}
    assert fields == sizes | steps | rest | rows | {"mamba_core": {"eos_token_id": [3, 4]}, "note": 1}


def test_unknown_fields_never_change_what_is_written_as_mambapy(tmp_path):
    """Fields that mean nothing to hf come back from under mamba_core, where mambapy does not look."""
    extra = {"mup": True, "d_inner": 12, "d_model": 6, "n_layers": 9, "note": 1}
    config = dataclasses.replace(CONFIG, extra=extra)
    folder = write(tmp_path / "out", config, "mambapy")
    fields = json.loads((folder / "config.json").read_text())
    plain = json.loads((write(tmp_path / "plain", CONFIG, "mambapy") / "config.json").read_text())
    hidden = {name: value for name, value in extra.items() if name != "note"}
    assert fields == plain | {"note": 1, "mamba_core": plain["mamba_core"] | {"extra": hidden}}
    opened = open_model(folder)
    assert opened.config == config
    assert opened.config.extra == extra
    fields["mamba_core"]["extra"] = 3
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="mamba_core fields"):
        open_model(folder)


def test_a_field_of_ours_that_no_library_wrote_is_not_ours(tmp_path):
    config = dataclasses.replace(CONFIG, tie_embeddings=True, extra={"mamba_core": {"vocab_size": 3}})
    assert open_model(write(tmp_path / "out", config, "mambapy")).config == config


def test_the_norm_of_mlx_lm(tmp_path):
    """Its library has 1e-5 whatever its config says; that of the config is the one that was trained."""
    folder = write(tmp_path / "out", CONFIG, "mlx_lm")
    assert "norm_eps" not in open_model(folder).evidence
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"layer_norm_epsilon": 1e-3}))
    opened = open_model(folder)
    assert opened.config.norm_eps == 1e-3
    assert "norm_eps is the config's 0.001, though mlx_lm computes with 1e-05" in opened.evidence


def test_an_inspection_is_json(tmp_path):
    extra = {"note": float("nan"), "nested": [{"limit": float("inf")}]}
    folder = write(tmp_path / "out", dataclasses.replace(CONFIG, extra=extra), "hf")
    text = inspect(folder).to_json()
    assert "NaN" not in text
    assert json.loads(text)["config"]["extra"] == {"note": None, "nested": [{"limit": None}]}


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict"])
def test_the_usual_entry_of_a_training_scripts_file(tmp_path, name):
    torch = pytest.importorskip("torch")
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy"))
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    torch.save({name: tensors, "step": torch.ones(1)}, tmp_path / "b.pt")
    assert contents(tmp_path / "b.pt") == contents(tmp_path / "a")
    torch.save({"ema": tensors, "step": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="entries that are not tensors under a text name: 'ema'"):
        open_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("layout", ["hf", "mlx_lm"])
def test_norms_of_the_steps_are_refused(tmp_path, layout):
    folder = write(tmp_path / "out", CONFIG, layout)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"use_bcdt_rms": True}))
    with pytest.raises(CheckpointError, match="use_bcdt_rms=True; this version reads use_bcdt_rms=False only"):
        open_model(folder)


def test_a_config_without_padding_takes_that_of_the_rows(tmp_path):
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy"))
    for vocab_size, multiple in ((13, 8), (16, 1)):
        opened = open_model(state_dict(tmp_path / str(vocab_size), arrays, n_layers=2, vocab_size=vocab_size))
        assert opened.config.vocab_size == vocab_size
        assert opened.config.pad_vocab_size_multiple == multiple


def test_minimambas_automatic_rank_is_not_ours(tmp_path):
    """It rounds down where Mamba rounds up, so that the tensors have to tell."""
    config = dataclasses.replace(COMPAT, d_model=40, dt_rank=2)
    arrays = arrays_of(write(tmp_path / "a", config, "minimamba"))
    folder = state_dict(tmp_path / "b", arrays, d_model=40, n_layer=2, vocab_size=13, dt_rank="auto", norm_epsilon=1e-3)
    opened = open_model(folder, compat="minimamba")
    assert opened.config.dt_rank_size == 2
    assert opened.config.norm_eps == 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mup": True}, "mup=True; this version reads mup=False only"),
        ({"inner_layernorms": True}, "inner_layernorms=True"),
        ({"d_model": 8}, r"has shape \(16, 6\), expected \(16, 8\)"),
        ({"n_layers": 10**9}, "n_layer is 1000000000, but the file has 23 tensors"),
        ({"n_layers": "2"}, "n_layer is '2'"),
        ({"n_layers": [2]}, r"n_layer is \[2\]"),
        ({"d_model": None}, "d_model is None"),
        ({"mamba_core": {"d_model": 6}}, "mamba_core fields"),
        ({"mamba_core": 3}, "mamba_core fields 3"),
        ({"dt_rank": -1}, "dt_rank is -1"),
    ],
)
def test_faults_of_a_librarys_config(tmp_path, fields, words):
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy"))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_model(state_dict(tmp_path / "b", arrays, **{"n_layers": 2} | fields))
    assert "\n" not in str(caught.value)


def test_sizes_that_the_tensors_cannot_tell(tmp_path):
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy"))
    conv, A_log = "mamba.layers.0.mixer.conv1d.weight", "mamba.layers.0.mixer.A_log"
    for number, (name, value, words) in enumerate(
        [
            (A_log, None, "A_log is missing"),
            (A_log, np.zeros(3), r"A_log has shape \(3,\), expected \(e, n\)"),
            (A_log, np.zeros((0, 3)), r"A_log has shape \(0, 3\)"),
            (conv, np.zeros((12, 4)), r"conv1d.weight has shape \(12, 4\)"),
        ]
    ):
        broken = {key: array for key, array in {**arrays, name: value}.items() if array is not None}
        with pytest.raises(CheckpointError, match=f"sizes cannot be told.*{words}"):
            open_model(state_dict(tmp_path / str(number), broken))
    # A name can claim any layer; the layers are counted, and the claim is a fault.
    arrays["mamba.layers.999999999.mixer.D"] = arrays.pop("mamba.layers.1.mixer.D")
    with pytest.raises(CheckpointError, match=r"unexpected mamba\.layers\.999999999\.mixer\.D"):
        open_model(state_dict(tmp_path / "claim", arrays))


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("mlx_lm", {"norm_eps": 1e-3}, "norm_eps=0.001 cannot be written as mlx_lm, which has 1e-05 only"),
        ("mambapy", {"expand": 1.5}, "expand=1.5 cannot be written as mambapy"),
        ("mambapy_mlx", {"norm_eps": 1e-3}, "norm_eps=0.001 cannot be written as mambapy_mlx, which has 1e-05 only"),
        ("mambapy_mlx", {"conv_bias": False}, "conv_bias=False cannot be written"),
        ("minimamba", {"bias": True, "compat": "minimamba"}, "bias=True cannot be written as minimamba"),
    ],
)
def test_what_a_library_cannot_run_is_not_written(tmp_path, layout, changes, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "out", dataclasses.replace(CONFIG, **changes), layout)
    assert not list((tmp_path / "out").iterdir())


# --- MiniMamba -------------------------------------------------------------------------------------


def test_minimamba_is_read_under_its_flag_only(tmp_path):
    folder = write(tmp_path / "out", COMPAT, "minimamba")
    with pytest.raises(CheckpointError, match=r"another function than Mamba.*bias twice.*no SiLU.*--compat minimamba"):
        open_model(folder)
    assert open_model(folder, compat="minimamba").config.compat == "minimamba"
    with pytest.raises(ValueError, match="compat is 'other'"):
        open_model(folder, compat="other")
    with pytest.raises(ValueError, match=r"compat is 'minimamba', but .* of layout hf, is None"):
        open_model(write(tmp_path / "hf", CONFIG, "hf"), compat="minimamba")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("hf", "minimamba")])
def test_its_arithmetic_is_not_written_for_others(tmp_path, layout):
    with pytest.raises(ValueError, match=r"compat='minimamba' cannot be written as .* expected hf or minimamba"):
        write(tmp_path / "out", COMPAT, layout)


def test_a_mamba_is_not_written_for_it(tmp_path):
    with pytest.raises(ValueError, match="cannot be written as minimamba, whose library would compute"):
        write(tmp_path / "out", CONFIG, "minimamba")


def test_a_classifiers_backbone_is_read_and_the_rest_reported(tmp_path):
    config = dataclasses.replace(COMPAT, task="features")
    arrays = arrays_of(write(tmp_path / "a", config, "minimamba"))
    head = {"classifier.classifier.weight": np.zeros((2, 6)), "classifier.classifier.bias": np.zeros(2)}
    opened = open_model(state_dict(tmp_path / "b", arrays | head), compat="minimamba")
    assert opened.config.task == "features"
    assert opened.left_out == tuple(head)
    assert "not read: classifier.classifier.weight, classifier.classifier.bias" in opened.evidence
    assert dict(opened.tensors()).keys() == parameter_table(config).keys()


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
