"""Layouts are told from names and config, and why is said; files are found where they lie."""

import dataclasses
import json

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.config import MambaConfig
from mamba_core.tasks.base import EMBEDDING
from mamba_core.weights import layouts
from mamba_core.weights.formats import CheckpointError, sources_of, write_safetensors_file
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import copy_companions, write_layout

from .layout_files import CONFIG, TIED_CONFIG, arrays_of, of_layout, options_of, state_dict, write
from .timing import timed

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
        ("mamba_minimal", ("config.json has ssm_cfg", "layers.0.mixer.conv1d.weight")),
    ],
)
def test_detection_says_why(tmp_path, layout, words):
    config = of_layout(CONFIG, layout)
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
    opened, seconds = timed(lambda: open_model(folder), 20)
    assert len(opened.stored) > 50_000
    assert seconds < 20


def test_wrappers_without_end(tmp_path):
    """Of a hostile file, in names of 7 MB."""
    folder = state_dict(tmp_path / "out", {"module." * 10**6 + "a": np.zeros(1)})

    def refused():
        with pytest.raises(CheckpointError, match="cannot tell the layout"):
            open_model(folder)

    assert timed(refused, 10)[1] < 10


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


# --- names that two functions share ----------------------------------------------------------------

STATE_SPACES = {"ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
STATE_SPACES |= {"pad_vocab_size_multiple": 8, "d_model": 6, "n_layer": 2, "vocab_size": 13}


def of_mamba_minimal(folder) -> dict[str, np.ndarray]:
    return arrays_of(write(folder, TIED_CONFIG, "mamba_minimal"))


def assert_opens_as(folder, expected, **options):
    """The layout and the architecture, and the values of a checkpoint that was written."""
    opened = open_model(folder, **options)
    values = dict(open_model(expected).tensors())
    found = dict(opened.tensors())
    assert found.keys() == values.keys()
    assert all(array.tobytes() == values[name].tobytes() for name, array in found.items())
    return opened


@pytest.mark.parametrize("fields", [{}, {"d_model": 6, "n_layer": 2, "vocab_size": 13}])
def test_names_that_do_not_tell_the_function_ask_for_it(tmp_path, fields):
    arrays = of_mamba_minimal(tmp_path / "a")
    folder = state_dict(tmp_path / "b", arrays, **fields)
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    for words in (
        "layout='mamba_minimal' (--from mamba-minimal) reads it as mamba",
        "layout='minimamba', compat='minimamba' (--from minimamba --compat minimamba) reads it as minimamba",
        "adds the dt bias twice and its gate has no SiLU",
    ):
        assert words in str(caught.value)
    ours = {"layout": "mamba_minimal"}, {"layout": "mamba-minimal"}, {"compat": "mamba"}
    for options in ours:
        opened = assert_opens_as(folder, tmp_path / "a", **options)
        assert (opened.layout, opened.config.architecture) == ("mamba_minimal", "mamba")
        assert opened.config.tie_embeddings
    for options in ({"compat": "minimamba"}, {"layout": "minimamba", "compat": "minimamba"}):
        opened = assert_opens_as(folder, tmp_path / "a", **options)
        assert (opened.layout, opened.config.architecture) == ("minimamba", "minimamba")


def test_a_config_tells_the_function_that_names_do_not(tmp_path):
    arrays = of_mamba_minimal(tmp_path / "a")
    folder = state_dict(tmp_path / "b", arrays, **STATE_SPACES)
    opened = assert_opens_as(folder, tmp_path / "a")
    assert (opened.layout, opened.config.architecture) == ("mamba_minimal", "mamba")
    assert (opened.config.vocab_size, opened.config.padded_vocab_size) == (13, 16)
    folder = state_dict(tmp_path / "c", arrays, d_model=6, n_layer=2, vocab_size=13, norm_epsilon=1e-3)
    with pytest.raises(CheckpointError, match=r"another function than Mamba.*--compat minimamba"):
        open_model(folder)
    folder = state_dict(tmp_path / "d", arrays, **STATE_SPACES | {"ssm_cfg": {"layer": "Mamba2"}})
    with pytest.raises(CheckpointError, match="ssm_cfg layer 'Mamba2'; this version reads 'Mamba1'"):
        open_model(folder)


@pytest.mark.parametrize("fields", [CONFIG.to_hf(), CONFIG.to_dict(), {"layer_norm_epsilon": 1e-3}])
def test_a_config_of_another_layout_than_the_named_one_is_not_passed_over(tmp_path, fields):
    for layout in ("mamba_minimal", "mambapy"):
        arrays = arrays_of(write(tmp_path / f"{layout}-a", TIED_CONFIG, layout))
        folder = state_dict(tmp_path / layout, arrays, **fields)
        with pytest.raises(CheckpointError, match=r"config\.json: has none of the fields .*is no config of layout"):
            open_model(folder, layout=layout)
        (folder / "config.json").write_text("{}")
        assert open_model(folder, layout=layout).config.d_model == 6


def test_mamba_minimals_head_is_the_embedding(tmp_path):
    with pytest.raises(ValueError, match="tie_embeddings=False cannot be written as mamba_minimal"):
        write(tmp_path / "a", CONFIG, "mamba_minimal")
    arrays = of_mamba_minimal(tmp_path / "b")
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    opened = open_model(state_dict(tmp_path / "c", arrays), layout="mamba_minimal")
    assert not opened.config.tie_embeddings
    assert "tie_embeddings is the config's False, though mamba_minimal computes with True" in opened.evidence


def test_hf_names_without_their_backbone(tmp_path):
    """With a head they are a language model's, without one the features'."""
    plain = write(tmp_path / "a", CONFIG, "hf")
    fields = json.loads((plain / "config.json").read_text())
    arrays = {name.removeprefix("backbone."): array for name, array in arrays_of(plain).items()}
    assert assert_opens_as(state_dict(tmp_path / "b", arrays, **fields), plain).config == CONFIG
    del arrays["lm_head.weight"]
    assert open_model(state_dict(tmp_path / "c", arrays, **fields)).config.task == "features"


# --- a head that stands for the embedding ----------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("layout", [name for name in layouts.names() if name not in ("mlx_lm", "vim")])
def test_a_tied_file_that_has_its_head_alone(tmp_path, layout, prefix):
    config = dataclasses.replace(of_layout(CONFIG, layout), tie_embeddings=True)
    whole = write(tmp_path / "a", config, layout)
    fields = json.loads((whole / layouts.find(layout).config_file).read_text())
    opened = open_model(whole, **options_of(config))
    names = {name: stored.names[0] for name, stored in opened.stored.items()}
    arrays = arrays_of(whole)
    heads = {"minimamba": "lm_head.lm_head.weight", "mistral_inference": "model.lm_head.weight"}
    head = heads.get(layout, "lm_head.weight")
    arrays[head] = arrays.pop(names[EMBEDDING])
    folder = state_dict(tmp_path / "b", {prefix + name: array for name, array in arrays.items()}, **fields)
    found = open_model(folder, **options_of(config))
    assert found.config == config
    assert found.stored[EMBEDDING].names == (prefix + head,)
    expected = dict(opened.tensors())
    assert all(array.tobytes() == expected[name].tobytes() for name, array in found.tensors())


def test_a_head_of_its_own_is_not_the_embedding(tmp_path):
    whole = write(tmp_path / "a", CONFIG, "hf")
    arrays = arrays_of(whole)
    del arrays["backbone.embeddings.weight"]
    folder = state_dict(tmp_path / "b", arrays, **json.loads((whole / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"does not fit its config: missing backbone\.embeddings\.weight"):
        open_model(folder)


# --- adapters --------------------------------------------------------------------------------------

ADAPTER = {"base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight": np.zeros((2, 6), np.float32)}
ADVICE = r"merge it into its base first \(peft: merge_and_unload; .*mamba_core\.save\(merge=True\)\)"


def adapter(folder, field="base_model_name_or_path", **arrays):
    folder.mkdir(exist_ok=True)
    write_safetensors_file(folder / "adapter_model.safetensors", sources_of(ADAPTER))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", field: "someone/base"}))
    return folder


@pytest.mark.parametrize("field", ["base_model_name_or_path", "model"])
def test_a_folder_of_an_adapter(tmp_path, field):
    folder = adapter(tmp_path / "a", field)
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=f"is an adapter of someone/base; {ADVICE}"):
            open_model(path)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is an adapter of another model"):
        open_model(folder)


def test_an_adapter_beside_its_base_is_not_passed_over(tmp_path):
    """transformers would read both."""
    folder = adapter(write(tmp_path / "a", CONFIG, "hf"))
    with pytest.raises(CheckpointError, match="is an adapter of someone/base"):
        open_model(folder)
    assert open_model(folder / "model.safetensors").config == CONFIG


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("in_proj.", "in_proj.base_layer."),
        lambda name: name.replace("in_proj.weight", "in_proj.lora_A.default.weight"),
        lambda name: name.replace("in_proj.weight", "in_proj.lora_a"),
        lambda name: name.replace("norm_f.", "norm_f.modules_to_save.default."),
        lambda name: name.replace("embeddings.weight", "embeddings.lora_embedding_B.default"),
    ],
)
def test_a_state_dict_with_adapters(tmp_path, change):
    plain = write(tmp_path / "a", CONFIG, "hf")
    fields = json.loads((plain / "config.json").read_text())
    arrays = {"base_model.model." + change(name): array for name, array in arrays_of(plain).items()}
    with pytest.raises(CheckpointError, match=f"it is or holds an adapter of another model; {ADVICE}"):
        open_model(state_dict(tmp_path / "b", arrays, **fields))


def test_a_model_that_peft_has_unloaded(tmp_path):
    plain = write(tmp_path / "a", CONFIG, "hf")
    fields = json.loads((plain / "config.json").read_text())
    arrays = {"base_model.model." + name: array for name, array in arrays_of(plain).items()}
    assert_opens_as(state_dict(tmp_path / "b", arrays, **fields), plain)


# --- names that nobody knows -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, "hf", "mambapy", "mamba_ssm"])
def test_unknown_names_are_shown_with_those_that_were_expected(tmp_path, layout):
    fields = json.loads((write(tmp_path / "a", CONFIG, layout or "hf") / "config.json").read_text())
    arrays = {f"encoder.{index}.w": np.zeros(2) for index in range(5)}
    with pytest.raises(CheckpointError) as caught:
        open_model(state_dict(tmp_path / "b", arrays, **fields), layout=layout)
    message = str(caught.value)
    assert "'encoder.0.w', 'encoder.1.w', 'encoder.2.w' and 2 more" in message
    assert ("embedding.weight" if layout in ("mambapy", "mamba_ssm") else "backbone.embeddings.weight") in message


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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "net.", "a.b.c.net."])
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


@pytest.mark.parametrize("word", ["_fsdp_wrapped_module.", "_orig_mod.", "module.", "_checkpoint_wrapped_module."])
@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("layout", ["hf", "mamba_ssm", "mambapy"])
def test_wrappers_inside_of_names_are_read_through(tmp_path, word, prefix, layout):
    plain = write(tmp_path / "a", CONFIG, layout)
    fields = json.loads((plain / "config.json").read_text())

    def wrapped(name):
        return prefix + word + name.replace(".mixer.", f".{word}mixer.{word}")

    arrays = {wrapped(name): array for name, array in arrays_of(plain).items()}
    opened = assert_opens_as(state_dict(tmp_path / "b", arrays, **fields), plain)
    assert f"names have '{word[:-1]}' inside, which is left out" in opened.evidence
    arrays[wrapped("more.mixer.x")] = np.zeros(2)
    with pytest.raises(CheckpointError, match=f"unexpected {wrapped('more.mixer.x')}"):
        open_model(state_dict(tmp_path / "c", arrays, **fields))
    clash = {**arrays, wrapped("more.mixer.x").replace(word, ""): np.zeros(2)}
    with pytest.raises(CheckpointError, match=r"cannot tell the layout.*the file has"):
        open_model(state_dict(tmp_path / "d", clash, **fields))


def test_what_torchs_averaged_model_counts_is_left_out(tmp_path):
    torch = pytest.importorskip("torch")
    plain = write(tmp_path / "a", CONFIG, "hf")
    fields = json.loads((plain / "config.json").read_text())
    wrapped = {"module." + name: array for name, array in arrays_of(plain).items()}
    names = set(torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1)).state_dict())
    assert names == {"n_averaged", "module.weight", "module.bias"}
    opened = assert_opens_as(state_dict(tmp_path / "b", wrapped | {"n_averaged": np.array(3)}, **fields), plain)
    assert opened.left_out == ("n_averaged",)
    assert "not read: n_averaged" in opened.evidence


def test_what_lies_beside_the_weights_is_said(tmp_path):
    torch = pytest.importorskip("torch")
    plain = write(tmp_path / "a", CONFIG, "mambapy")
    state = {f"model.{name}": torch.from_numpy(array) for name, array in arrays_of(plain).items()}
    saved = {"state_dict": state, "optimizer_states": [{"state": {}}], "epoch": 3}
    torch.save(saved, tmp_path / "last.ckpt")
    opened = assert_opens_as(tmp_path / "last.ckpt", plain)
    assert opened.left_out == ("optimizer_states", "epoch")
    assert "not read: optimizer_states, epoch" in opened.evidence
    done = mc.convert(tmp_path / "last.ckpt", tmp_path / "out", to="mambapy")
    assert done.left_out == opened.left_out
