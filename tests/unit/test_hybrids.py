"""Hybrids as configs and checkpoints: their fields, mamba_ssm's names, our own, and that others refuse them."""

import dataclasses
import json

import numpy as np
import pytest

from mamba_core import architectures
from mamba_core.architectures.mamba import MambaConfig
from mamba_core.architectures.mamba2 import Mamba2Config
from mamba_core.config import from_dict, preset
from mamba_core.spec.blocks.hybrid import HybridConfig
from mamba_core.spec.state import fields
from mamba_core.weights import tables
from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.opening import open_model

from .layout_files import CONFIG, MAMBA2, arrays_of, contents, rewrite, write

ATTENTION = {"causal": True, "num_heads": 4, "d_conv": 3, "head_dim": 2}
FIRST = dataclasses.replace(
    CONFIG, d_model=8, n_layer=3, attn_layer_idx=(1,), attn_cfg=ATTENTION, d_intermediate=100, pad_vocab_size_multiple=1
)
SECOND = Mamba2Config(
    d_model=8, n_layer=3, vocab_size=16, headdim=4, attn_layer_idx=(0, 2), attn_cfg=ATTENTION, d_intermediate=128
)
HYBRIDS = {"mamba": FIRST, "mamba2": SECOND}

# --- fields ----------------------------------------------------------------------------------------


def test_the_blocks():
    assert [tuple(block) for block in architectures.of(FIRST).blocks(FIRST)] == [
        ("mamba", "swiglu"),
        ("attention", "swiglu"),
        ("mamba", "swiglu"),
    ]
    alone = dataclasses.replace(SECOND, d_intermediate=0)
    assert [tuple(block) for block in architectures.of(alone).blocks(alone)] == [
        ("attention", None),
        ("mamba2", None),
        ("attention", None),
    ]
    assert FIRST.feed_forward(0).width == 128, "rounded up"
    assert [field.name for field in fields(SECOND, 0)] == ["conv", "keys", "values", "filled"]
    assert [field.name for field in fields(SECOND, 1)] == ["conv", "ssm"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"attn_layer_idx": (3,)}, r"attn_layer_idx is \(3,\); expected integers from 0 to 2, layers of this model"),
        ({"attn_layer_idx": (-1,)}, "attn_layer_idx is .*expected integers from 0 to 2"),
        ({"attn_layer_idx": (True,)}, "attn_layer_idx is .*expected integers"),
        ({"d_intermediate": -1}, "d_intermediate is -1; expected an integer from 0"),
        ({"attn_cfg": 3}, "attn_cfg is 3; expected a mapping"),
        ({"attn_cfg": {}}, "attn_cfg has num_heads None; expected an integer from 1"),
        ({"attn_cfg": {"num_heads": 4}}, "attn_cfg has causal False; expected true: no position may see a later one"),
        ({"attn_cfg": ATTENTION | {"window": 5}}, "attn_cfg has window; expected some of num_heads, num_heads_kv"),
        ({"attn_cfg": ATTENTION | {"mlp_dim": 5}}, "attn_cfg has mlp_dim 5; a feed-forward beside attention is not"),
        ({"attn_cfg": ATTENTION | {"num_heads_kv": 3}}, "num_heads_kv 3; expected a divisor of num_heads, 4"),
        ({"attn_cfg": {"causal": True, "num_heads": 3}}, "num_heads 3; expected a divisor of d_model, 8, where no"),
        ({"attn_cfg": ATTENTION | {"rotary_emb_dim": 4}}, "rotary_emb_dim 4; expected an even number from 0 to 2"),
        ({"attn_cfg": ATTENTION | {"rotary_emb_base": 0}}, "rotary_emb_base 0; expected a positive number"),
        ({"attn_cfg": ATTENTION | {"qkv_proj_bias": 1}}, "qkv_proj_bias 1; expected true or false"),
        ({"attn_cfg": ATTENTION | {"softmax_scale": "x"}}, "softmax_scale 'x'; expected a number or nothing"),
        ({"attn_cfg": ATTENTION | {"d_conv": -1}}, "attn_cfg has d_conv -1; expected an integer >= 0"),
    ],
)
@pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)
def test_a_fault(config, changes, fault):
    with pytest.raises(ValueError, match=fault):
        dataclasses.replace(config, **changes)


def test_what_a_state_means():
    """Defaults that are spelt out and the order of layers change nothing, sizes do."""
    for config in HYBRIDS.values():
        spelt = dataclasses.replace(config, attn_cfg=ATTENTION | {"num_heads_kv": 4, "rotary_emb_dim": 0})
        reverse = dataclasses.replace(spelt, attn_layer_idx=config.attn_layer_idx[::-1] * 2)
        assert config.fingerprint == spelt.fingerprint == reverse.fingerprint
        for changes in (
            {"attn_layer_idx": (0,)},
            {"d_intermediate": 0},
            {"attn_cfg": ATTENTION | {"rotary_emb_dim": 2}},
            {"attn_cfg": ATTENTION | {"softmax_scale": 0.5}},
        ):
            assert dataclasses.replace(config, **changes).fingerprint != config.fingerprint, changes


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [("mamba-130m", "de3d632daca29355"), ("mamba2-130m", "a23b4d53fffe14b4"), ("falcon-mamba-7b", "0e6ef4911434e6d3")],
)
def test_states_that_were_saved_before_there_were_hybrids_are_read(name, fingerprint):
    assert preset(name).fingerprint == fingerprint
    assert dataclasses.replace(preset(name), task="features").fingerprint == fingerprint


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_through_both_layouts(tmp_path, config, dtype):
    folder = write(tmp_path / "0", config, "mamba_ssm", dtype)
    assert open_model(folder).config == dataclasses.replace(
        config, initializer_range=open_model(folder).config.initializer_range
    )
    own = rewrite(folder, tmp_path / "1", "hf")
    assert open_model(own).layout == "hf"
    assert open_model(own).config == open_model(folder).config
    assert contents(rewrite(own, tmp_path / "2", "mamba_ssm")) == contents(folder)


def test_the_halves_of_mamba_ssms_feed_forward(tmp_path):
    """Its first projection gives what is let through before the gate, ours the gate before that."""
    folder = write(tmp_path / "out", FIRST, "mamba_ssm")
    arrays, ours = arrays_of(folder), dict(open_model(folder).tensors())
    theirs, own = (f"backbone.layers.1.{name}" for name in ("mlp.fc1.weight", "feed_forward.gate_up_proj.weight"))
    assert np.array_equal(arrays[theirs][:128], ours[own][128:])
    assert np.array_equal(arrays[theirs][128:], ours[own][:128])
    assert {"backbone.layers.1.mlp.fc2.weight", "backbone.layers.1.norm2.weight"} <= set(arrays)
    assert arrays["backbone.layers.1.mixer.in_proj.weight"].shape == (24, 8)


def test_a_field_that_does_not_fit_the_tensors(tmp_path):
    folder = write(tmp_path / "out", FIRST, "mamba_ssm")
    fields = json.loads((folder / "config.json").read_text())
    for changes, fault in (
        ({"attn_layer_idx": []}, "missing backbone.layers.1.mixer.A_log"),
        ({"d_intermediate": 0}, "unexpected backbone.layers.0.mlp.fc1.weight"),
        ({"d_intermediate": 129}, r"mlp.fc1.weight has shape \(256, 8\), expected \(512, 8\)"),
        ({"attn_cfg": {"num_heads": 4}}, "attn_cfg has causal False"),
    ):
        (folder / "config.json").write_text(json.dumps(fields | changes))
        with pytest.raises(CheckpointError, match=fault):
            open_model(folder)


@pytest.mark.parametrize("config", [CONFIG, MAMBA2], ids=["mamba", "mamba2"])
def test_other_layouts_refuse_them(tmp_path, config):
    others = set(tables.of(config.architecture)) - {"hf", "mamba_ssm"}
    assert len(others) >= 3
    for layout in others:
        for changes in ({"attn_layer_idx": (0,), "attn_cfg": ATTENTION}, {"d_intermediate": 5}):
            hybrid = dataclasses.replace(config, tie_embeddings=True, **changes)
            name = next(iter(changes))
            with pytest.raises(ValueError, match=f"{name}=.* cannot be written as {layout}, which has"):
                write(tmp_path / f"{layout}-{name}", hybrid, layout)


def test_transformers_would_refuse_our_own_layout():
    for config in HYBRIDS.values():
        ours = f"mamba_core_{config.architecture}"
        for changes in ({}, {"d_intermediate": 0}, {"attn_layer_idx": ()}):
            hybrid = dataclasses.replace(config, **changes)
            written = hybrid.to_hf()
            assert (written["model_type"], written["hidden_act"]) == (ours, ours)
            assert from_dict(json.loads(json.dumps(written))) == hybrid


@pytest.mark.parametrize("config", [CONFIG, MAMBA2], ids=["mamba", "mamba2"])
def test_configs_of_plain_models_are_as_they_were(config):
    """Early releases of mamba_ssm do not take the fields, and no file that was written has them."""
    for layout in set(tables.of(config.architecture)) - {"mamba_minimal"}:
        config = dataclasses.replace(config, attn_cfg={})
        written = json.dumps(tables.write_config(layout, config))
        assert not any(name in written for name in HybridConfig.FIELDS), layout
    assert config.to_hf()["model_type"] == config.architecture


def test_a_published_config():
    """state-spaces/mamba2attn-2.7b."""
    attention = {
        "causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False, "qkv_proj_bias": False,
        "rotary_emb_dim": 64,
    }  # fmt: skip
    fields = {
        "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [9, 18, 27, 36, 45, 56], "attn_cfg": attention, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    }  # fmt: skip
    assert from_dict(fields) == preset("mamba2attn-2.7b")
    assert from_dict(preset("mamba2attn-2.7b").to_mamba_ssm()) == preset("mamba2attn-2.7b")
    assert isinstance(from_dict(fields | {"ssm_cfg": {}}), MambaConfig)
