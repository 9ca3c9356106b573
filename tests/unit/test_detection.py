"""Layouts are told from names and config, and why is said; files are found where they lie."""

import dataclasses
import json
import time

import numpy as np
import pytest

from mamba_core.config import MambaConfig
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import copy_companions, write_layout

from .layout_files import COMPAT, CONFIG, arrays_of, options_of, state_dict, write

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


BITSANDBYTES = "quantised by bitsandbytes; save it dequantised"
GPTQ = "quantised by GPTQ or AWQ; save it dequantised"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mamba.layers.0.mixer.in_proj.scales", "quantised; save it dequantised"),
        ("mamba.layers.0.mixer.in_proj.weight.absmax", BITSANDBYTES),
        ("mamba.layers.0.mixer.in_proj.SCB", BITSANDBYTES),
        ("mamba.layers.0.mixer.in_proj.weight.quant_state.bitsandbytes__nf4", BITSANDBYTES),
        ("mamba.layers.0.mixer.in_proj.qweight", GPTQ),
        ("mamba.layers.0.mixer.in_proj.qzeros", GPTQ),
        ("mamba.layers.0.mixer.in_proj.weight_scale", "quantised; save it dequantised"),
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
    copy_companions(source, target, CONFIG, "hf")
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
