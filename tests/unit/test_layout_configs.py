"""Configs of the layouts: from the tensors, from a library's own fields, and what a library cannot run."""

import dataclasses
import json

import numpy as np
import pytest

from mamba_core.config import MambaConfig
from mamba_core.spec.params import parameter_table
from mamba_core.weights.convert import inspect
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model

from .layout_files import COMPAT, CONFIG, OUTER, arrays_of, contents, of_layout, options_of, state_dict, write

# --- configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "task"), [pair for pair in OUTER if pair[0] in ("mambapy", "mambapy_mlx", "minimamba")]
)
@pytest.mark.parametrize("square", [False, True])
def test_without_a_config_the_tensors_tell_the_sizes(tmp_path, layout, task, square):
    sizes = {"expand": 1, "d_conv": 6, "d_state": 2, "dt_rank": "auto"} if square else {}
    config = of_layout(dataclasses.replace(CONFIG, task=task, **sizes), layout)
    folder = write(tmp_path / "out", config, layout)
    (folder / "config.json").unlink()
    (file,) = folder.iterdir()
    for source in (folder, file):
        opened = open_model(source, **options_of(config))
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
    config = of_layout(dataclasses.replace(CONFIG, tie_embeddings=head != "own"), layout)
    arrays = arrays_of(write(tmp_path / "a", config, layout))
    if head == "absent":
        arrays.popitem()
    opened = open_model(state_dict(tmp_path / "b", arrays), **options_of(config))
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


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict", "module", "ema"])
def test_the_usual_entry_of_a_training_scripts_file(tmp_path, name):
    torch = pytest.importorskip("torch")
    arrays = arrays_of(write(tmp_path / "a", CONFIG, "mambapy"))
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    torch.save({name: tensors, "step": torch.ones(1)}, tmp_path / "b.pt")
    assert contents(tmp_path / "b.pt") == contents(tmp_path / "a")
    torch.save({"mine": tensors, "step": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="entries that are not tensors under a text name: 'mine'"):
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
        ("minimamba", {"bias": True}, "bias=True cannot be written as minimamba"),
    ],
)
def test_what_a_library_cannot_run_is_not_written(tmp_path, layout, changes, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "out", of_layout(dataclasses.replace(CONFIG, **changes), layout), layout)
    assert not list((tmp_path / "out").iterdir())
