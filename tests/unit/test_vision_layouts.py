"""Checkpoints of Vision Mamba: hustvl/Vim's, mambapy.vim's blocks, and our own; what tensors tell."""

import dataclasses
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.init import initial_values
from mamba_core.weights import layouts, tables
from mamba_core.weights.formats import WRITERS, CheckpointError, sources_of, write_torch
from mamba_core.weights.formats.pickle import load_pickle
from mamba_core.weights.opening import open_model

from .layout_files import VISION, arrays_of, rewrite, write

# What hustvl/Vim's training checkpoints have beside the weights.
BESIDE = ("optimizer", "lr_scheduler", "epoch", "scaler", "args")
BLOCKS = dataclasses.replace(VISION, task="layers", task_options={})


def published(**options):
    """A small model with the options of the published ones, and so many blocks and channels as are fast."""
    return mc.VisionMambaConfig(d_model=8, n_layer=1, task_options=options)


def written(folder, config, layout="vim", file_format=None, keep=()):
    """The weights alone, and of the config's fields those that are named."""
    write(folder, config, layout, file_format=file_format)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.unlink()
    if keep:
        path.write_text(json.dumps({name: fields[name] for name in keep}))
    return folder


@pytest.mark.parametrize("layout", tables.of("vision_mamba"))
@pytest.mark.parametrize("bimamba_type", ["v2", "v1"])
def test_there_and_back(tmp_path, layout, bimamba_type):
    """Bit for bit, and the config too; v1 is refused where nobody has it."""
    config = dataclasses.replace(BLOCKS if layout == "mambapy" else VISION, bimamba_type=bimamba_type)
    if (layout, bimamba_type) == ("mambapy", "v1"):
        with pytest.raises(ValueError, match="bimamba_type='v1' cannot be written as mambapy, which has 'v2' only"):
            write(tmp_path / "a", config, layout)
        return
    here = write(tmp_path / "a", config, layout)
    there = rewrite(here, tmp_path / "b", "hf")
    opened, again = open_model(rewrite(there, tmp_path / "c", layout)), open_model(here)
    assert again.layout == opened.layout == layout
    assert again.config == opened.config == config
    for (name, value), (own, wanted) in zip(opened.tensors(), again.tensors(), strict=True):
        assert (name, value.tobytes()) == (own, wanted.tobytes())


@pytest.mark.parametrize("task", ["lm", "features", "layers", "image_features", "image_classification"])
def test_our_own_layout_holds_every_task(tmp_path, task):
    options = VISION.task_options if task.startswith("image") else {}
    config = dataclasses.replace(VISION, task=task, task_options=options, vocab_size=11)
    assert open_model(write(tmp_path / "a", config, "hf")).config == config


@pytest.mark.parametrize("file_format", WRITERS)
def test_every_file_format(tmp_path, file_format):
    opened = open_model(written(tmp_path / "a", published(num_classes=5), file_format=file_format))
    assert (opened.layout, opened.config) == ("vim", published(num_classes=5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": "double"},
        {"class_token": "none"},
        {"stride": 8},
        {"image_size": 384},
        {"image_size": 32, "patch_size": 4, "channels": 1, "num_classes": 10},
    ],
)
def test_tensors_tell_the_sizes(tmp_path, options):
    assert open_model(written(tmp_path / "a", published(**options))).config == published(**options)


def test_what_tensors_do_not_tell_is_in_the_config(tmp_path):
    config = dataclasses.replace(
        published(class_token="first", image_size=(64, 32)), divide_output=False, norm_eps=1e-3
    )
    assert open_model(write(tmp_path / "a", config, "vim")).config == config
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \(1, 9, 8\), expected \(1, 197, 8\)"):
        open_model(written(tmp_path / "b", config))


@pytest.mark.parametrize("named", [BESIDE, ()])
def test_a_training_checkpoint_is_read_and_nothing_is_executed(tmp_path, named):
    """As torch.save writes it, with the arguments of the script as an argparse.Namespace."""
    torch, argparse = pytest.importorskip("torch"), pytest.importorskip("argparse")
    arrays = arrays_of(written(tmp_path / "a", published()))
    beside = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 0.1}],
        },
        "lr_scheduler": {"base_values": [0.1]},
        "epoch": 299,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vim_tiny", lr=0.1, data_path="/data"),
    }
    (tmp_path / "b").mkdir()
    weights = {name: torch.from_numpy(value) for name, value in arrays.items()}
    saved = {"model": weights} | {name: beside[name] for name in named}
    torch.save(saved, tmp_path / "b" / "vim_t_midclstok_76p1acc.pth")
    opened = open_model(tmp_path / "b")
    assert (opened.layout, opened.config, opened.left_out) == ("vim", published(), named)
    assert {stored.names[0] for stored in opened.stored.values()} == set(arrays)
    for name, value in opened.tensors():
        assert value.tobytes() == arrays[opened.stored[name].names[0]].tobytes()


def test_what_we_write_is_what_their_script_loads(tmp_path):
    torch = pytest.importorskip("torch")
    folder = written(tmp_path / "a", published())
    loaded = torch.load(folder / "model.pth", weights_only=True)
    assert list(loaded) == ["model"]
    assert {name: value.numpy().tobytes() for name, value in loaded["model"].items()} == {
        name: value.tobytes() for name, value in arrays_of(folder).items()
    }


def test_a_state_dict_stands_under_a_name(tmp_path):
    write_torch(tmp_path / "a.pth", sources_of({"w": np.ones(2, np.float32)}), under="model")
    write_torch(tmp_path / "b.pth", sources_of({"w": np.ones(2, np.float32)}))
    import zipfile

    assert [
        list(load_pickle(zipfile.ZipFile(tmp_path / name).read("archive/data.pkl"))) for name in ("a.pth", "b.pth")
    ] == [["model"], ["w"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"if_rope": True}, "if_rope=True; this version reads if_rope=False only"),
        ({"rms_norm": False}, "rms_norm=False; this version reads rms_norm=True only"),
        ({"if_bidirectional": True}, "if_bidirectional=True; this version reads if_bidirectional=False only"),
        ({"embed_dim": 16}, r"expected \(16,"),
    ],
)
def test_another_function_is_refused(tmp_path, fields, message):
    folder = write(tmp_path / "a", published(), "vim")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        open_model(folder)


def test_layers_that_are_scaled_are_refused(tmp_path):
    arrays = arrays_of(written(tmp_path / "a", published()))
    (tmp_path / "b").mkdir()
    write_torch(tmp_path / "b" / "a.pth", sources_of(arrays | {"layers.0.mixer.gamma": np.ones(8, np.float32)}))
    with pytest.raises(CheckpointError, match="init_layer_scale"):
        open_model(tmp_path / "b")


def test_blocks_of_mambapy_are_told_from_those_of_mamba(tmp_path):
    for divide in (True, False):
        config = dataclasses.replace(BLOCKS, divide_output=divide)
        opened = open_model(write(tmp_path / f"a{divide}", config, "mambapy"))
        assert opened.config == config
        assert opened.stored["backbone.layers.0.mixer.A_b_log"].names == ("layers.0.mixer.A_log_b",)
    plain = mc.MambaConfig(d_model=6, n_layer=2, d_state=3, task="layers", pad_vocab_size_multiple=1)
    assert open_model(write(tmp_path / "b", plain, "mambapy")).config.architecture == "mamba"


def test_a_layout_of_images_holds_no_model_of_tokens(tmp_path):
    assert set(tables.holding("vim")) == {"vision_mamba"}
    assert layouts.find("vim").file_format == "pth"
    tokens = dataclasses.replace(VISION, task="lm", task_options={})
    with pytest.raises(ValueError, match="task 'lm' cannot be written as vim; expected layout hf"):
        write(tmp_path / "a", tokens, "vim")
    with pytest.raises(ValueError, match="d_conv=3 cannot be written as vim, which has 4 only"):
        write(tmp_path / "b", dataclasses.replace(published(), d_conv=3), "vim")


def test_sizes_are_those_of_the_published_models():
    sizes = {"vim-tiny": 7_148_008, "vim-small": 25_796_584, "vim-base": 97_598_440}
    for name, count in sizes.items():
        config = dataclasses.replace(mc.PRESETS[name], n_layer=1)
        assert (mc.PRESETS[name].n_layer, mc.PRESETS[name].d_state) == (24, 16)
        one = sum(value.size for _, value in initial_values(config))
        two = sum(value.size for _, value in initial_values(dataclasses.replace(config, n_layer=2)))
        assert one + 23 * (two - one) == count
