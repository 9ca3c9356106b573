"""Jamba's layouts: joined and stacked tensors, the names of every library, its fields, and what is refused."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mamba_core as mc
from mamba_core.architectures.jamba import JambaConfig
from mamba_core.config import from_dict
from mamba_core.spec.params import parameter_table
from mamba_core.weights import tables, verify
from mamba_core.weights.formats import CheckpointError, blocks, fill
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

from .layout_files import arrays_of, contents, rewrite, state_dict, write

LAYOUTS = ("hf", "mambapy", "mlx_lm")
SMALL = {"d_state": 3, "num_heads": 4, "num_kv_heads": 2, "d_intermediate": 5, "vocab_size": 13}
# Attention in layer 1, mixtures in layers 1 and 3. All experts compute, so that mlx-lm's function is Jamba's.
CONFIG = JambaConfig(
    d_model=8, n_layer=4, attn_layer_period=4, attn_layer_offset=1, num_experts=3, num_experts_per_tok=3, **SMALL
)
FIELDS = CONFIG.to_hf()

# --- round trips -----------------------------------------------------------------------------------


@st.composite
def configs(draw) -> JambaConfig:
    period, experts = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    expert_period = draw(st.integers(1, 3))
    return JambaConfig(
        d_model=draw(st.sampled_from([4, 8])),
        n_layer=draw(st.integers(1, 3)),
        d_conv=draw(st.sampled_from([1, 2, 4])),
        expand=draw(st.sampled_from([1, 2])),
        dt_rank=draw(st.sampled_from(["auto", 2])),
        bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        pad_vocab_size_multiple=draw(st.sampled_from([1, 8])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        residual_in_fp32=draw(st.booleans()),
        router_aux_loss_coef=draw(st.sampled_from([0.0, 0.5])),
        dt_min=draw(st.sampled_from([0.001, 0.01])),
        attn_layer_period=period,
        attn_layer_offset=draw(st.integers(0, period - 1)),
        num_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        expert_layer_period=expert_period,
        expert_layer_offset=draw(st.integers(0, expert_period - 1)),
        task=draw(st.sampled_from(["lm", "lm", "features", "layers"])),
        extra={"note": "kept"},
        **SMALL,
    )


def layouts_for(config) -> list[str]:
    possible = {"hf": config.task != "layers", "mambapy": config.task != "features", "mlx_lm": config.task == "lm"}
    attention = {config.attention(layer) is None for layer in range(config.n_layer)}
    possible["mlx_lm"] &= len(attention) == 2 and tables.find("jamba", "mlx_lm").differs(config) is None
    return [name for name, holds in possible.items() if holds]


@given(data=st.data())
def test_a_round_trip_keeps_every_bit_and_the_config(data):
    config = data.draw(configs())
    first, *way = data.draw(st.lists(st.sampled_from(layouts_for(config)), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = write(root / "0", config, first, dtype)
        for step, layout in enumerate([*way, first], 1):
            folder = rewrite(folder, root / str(step), layout)
            opened = open_model(folder)
            assert (opened.layout, opened.config.architecture) == (layout, "jamba")
        assert contents(folder) == contents(root / "0")
        assert opened.stored == open_model(root / "0").stored
        assert opened.config.identity() == config.identity()
        assert dataclasses.replace(opened.config, dt_rank=config.dt_rank) == config
        assert opened.config.extra["note"] == "kept"


def test_the_round_trips_are_between_all_layouts():
    assert set(layouts_for(CONFIG)) == {"hf", "mambapy", "mlx_lm"} == set(tables.of("jamba"))


# --- names -----------------------------------------------------------------------------------------

MAMBA = {
    *("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight"),
    *("dt_proj.bias", "out_proj.weight", "dt_layernorm.weight", "b_layernorm.weight", "c_layernorm.weight"),
}
NORMS = {"hf": "pre_ff_layernorm", "mlx_lm": "pre_ff_layernorm", "mambapy": "pre_moe_layernorm"}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def feed_forward(layout, mixture) -> set[str]:
    if not mixture:
        return {f"moe.experts.0.{p}" if layout == "mambapy" else f"feed_forward.{p}" for p in PROJECTIONS}
    if layout == "mlx_lm":
        return {"feed_forward.router", *(f"feed_forward.switch_mlp.{p}" for p in PROJECTIONS)}
    own = "moe" if layout == "mambapy" else "feed_forward"
    return {f"{own}.router", *(f"{own}.experts.{expert}.{p}" for expert in range(3) for p in PROJECTIONS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names(tmp_path, layout):
    layers = "jamba.layers" if layout == "mambapy" else "model.layers"
    expected = {"lm_head.weight"}
    expected |= (
        {"embedding.weight", "final_layernorm.weight"}
        if layout == "mambapy"
        else {"model.embed_tokens.weight", "model.final_layernorm.weight"}
    )
    for layer in range(4):
        mixer = {f"self_attn.{name}_proj.weight" for name in "qkvo"} if layer == 1 else {f"mamba.{n}" for n in MAMBA}
        if layout == "mambapy":
            mixer = {name.replace("b_layer", "B_layer").replace("c_layer", "C_layer") for name in mixer}
        own = {f"{name}.weight" for name in feed_forward(layout, layer % 2 == 1)}
        own |= mixer | {"input_layernorm.weight", f"{NORMS[layout]}.weight"}
        expected |= {f"{layers}.{layer}.{name}" for name in own}
    assert set(arrays_of(write(tmp_path / "out", CONFIG, layout))) == expected


def test_the_parts_are_where_they_belong(tmp_path):
    for layout in LAYOUTS:
        write(tmp_path / layout, CONFIG, layout)
    ours = dict(open_model(tmp_path / "hf").tensors())
    stacked = ours["backbone.layers.1.feed_forward.experts.gate_up_proj"]
    hf, mlx, mambapy = (arrays_of(tmp_path / layout) for layout in ("hf", "mlx_lm", "mambapy"))
    assert np.array_equal(hf["model.layers.1.feed_forward.experts.2.up_proj.weight"], stacked[2, 5:])
    assert np.array_equal(mlx["model.layers.1.feed_forward.switch_mlp.gate_proj.weight"], stacked[:, :5])
    assert np.array_equal(mambapy["jamba.layers.1.moe.experts.0.gate_proj.weight"], stacked[0, :5])
    joined = ours["backbone.layers.1.mixer.in_proj.weight"]
    q, k, v = (hf[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert (q.shape, k.shape) == ((8, 8), (4, 8))
    assert np.array_equal(joined, np.concatenate([q, k, v]))
    dense = ours["backbone.layers.0.feed_forward.gate_up_proj.weight"]
    assert np.array_equal(mambapy["jamba.layers.0.moe.experts.0.up_proj.weight"], dense[5:])
    assert mlx["model.layers.0.mamba.conv1d.weight"].shape == (16, 4, 1)


def as_first_code(name: str) -> str:
    """transformers' name as the first remote code has it."""
    name = name.replace("feed_forward.router", "moe.router").replace("feed_forward.experts", "moe.experts")
    name = name.replace("feed_forward.", "moe.experts.0.").replace("pre_ff_", "pre_moe_")
    return name.replace("b_layernorm", "B_layernorm").replace("c_layernorm", "C_layernorm")


@pytest.mark.parametrize("task", ["lm", "features"])
def test_the_names_of_the_first_remote_code(tmp_path, task):
    config = dataclasses.replace(CONFIG, task=task)
    arrays = arrays_of(write(tmp_path / "now", config, "hf"))
    fields = json.loads((tmp_path / "now" / "config.json").read_text())
    old = fields | {"mamba_inner_layernorms": True, "n_ctx": 262144, "sliding_window": None}
    opened = open_model(state_dict(tmp_path / "old", {as_first_code(n): a for n, a in arrays.items()}, **old))
    assert (opened.layout, opened.config) == ("hf", config)
    expected = dict(open_model(tmp_path / "now").tensors())
    assert all(array.tobytes() == expected[name].tobytes() for name, array in opened.tensors())
    rewrite(tmp_path / "old", tmp_path / "again", "hf")
    assert contents(tmp_path / "again") == contents(tmp_path / "now"), "written as transformers has it now"


@pytest.mark.parametrize("task", ["lm", "features"])
def test_experts_that_are_stacked_in_the_file(tmp_path, task):
    """As torch.save(model.state_dict()) of transformers 5 leaves them."""
    config = dataclasses.replace(CONFIG, task=task)
    arrays = arrays_of(write(tmp_path / "apart", config, "hf"))
    fields = json.loads((tmp_path / "apart" / "config.json").read_text())
    expected = dict(open_model(tmp_path / "apart").tensors())
    arrays = {name: array for name, array in arrays.items() if ".experts." not in name}
    layers = "model.layers" if task == "lm" else "layers"
    for name in expected:
        if ".experts." in name:
            arrays[name.replace("backbone.layers", layers)] = expected[name]
    opened = open_model(state_dict(tmp_path / "stacked", arrays, **fields))
    assert opened.config == config
    assert all(array.tobytes() == expected[name].tobytes() for name, array in opened.tensors())


# --- fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_experts": 1}, "num_experts_per_tok", 1),
        ({"mamba_dt_rank": 1}, "dt_rank", "auto"),
        ({"mamba_dt_rank": "auto"}, "dt_rank_size", 1),
        ({"num_key_value_heads": None}, "num_kv_heads", 4),
        ({"layers_block_type": ["mamba", "attention", "mamba", "mamba"]}, "attn_layer_period", 4),
        ({"layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 2]}, "attn_layer_offset", 1),
        ({"head_dim": 2, "num_local_experts": 3, "use_mamba_kernels": False}, "num_experts", 3),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.25}, "router_aux_loss_coef", 0.25),
        ({"output_router_logits": False, "router_aux_loss_coef": 0.25}, "router_aux_loss_coef", 0.0),
    ],
)
def test_a_field(changes, field, value):
    assert getattr(from_dict(FIELDS | changes), field) == value


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"layers_block_type": ["attention"] * 4}, "layers_block_type with 'attention' at layer 0.*period 4"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types of 3 entries; expected a list of 4, one a layer"),
        ({"head_dim": 4}, r"head_dim 4 but hidden_size / num_attention_heads 2; expected the same"),
        ({"num_local_experts": 8}, "num_local_experts 8 but num_experts 3"),
        ({"mamba_inner_layernorms": False}, "without norms of dt, B and C"),
        ({"sliding_window": 4096}, "sliding_window=4096.*attention goes over the whole sequence"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; this version reads hidden_act='silu' only"),
        ({"attn_layer_offset": 4}, "attn_layer_offset is 4; expected an integer from 0 to 3"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4; expected at most num_experts, 3"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads, 4"),
        ({"state_size": 16}, "state_size=16, which is of architecture"),
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM', a class of architecture 'mamba'"),
    ],
)
def test_a_field_that_is_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        from_dict(FIELDS | changes)


@pytest.mark.parametrize(("output", "coefficient"), [(False, 0.25), (True, 0.25), (True, 0.0)])
def test_the_fields_of_the_routers_loss_are_written_back(output, coefficient):
    fields = FIELDS | {"output_router_logits": output, "router_aux_loss_coef": coefficient}
    config = from_dict(fields)
    assert config.router_aux_loss_coef == coefficient * output
    written = config.to_hf()
    assert (written["output_router_logits"], written["router_aux_loss_coef"]) == (output, coefficient)
    assert from_dict(written) == config
    changed = dataclasses.replace(config, router_aux_loss_coef=0.5).to_hf()
    assert (changed["output_router_logits"], changed["router_aux_loss_coef"]) == (True, 0.5)


def test_the_defaults_of_each_library(tmp_path):
    """mlx-lm and mambapy tie the head to the embedding unless they are told otherwise, and mambapy has another eps."""
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    for layout, dropped, expected in (
        ("hf", ("rms_norm_eps", "tie_word_embeddings"), (1e-6, False)),
        ("mlx_lm", ("rms_norm_eps", "tie_word_embeddings"), (1e-6, True)),
        ("mambapy", ("rms_norm_eps", "tie_lm_weights"), (1e-5, True)),
    ):
        folder = write(tmp_path / layout, CONFIG if layout == "hf" else tied, layout)
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in dropped}))
        config = open_model(folder).config
        assert (config.norm_eps, config.tie_embeddings) == expected, layout


def test_mambapys_tensors_need_a_config(tmp_path):
    folder = write(tmp_path / "out", CONFIG, "mambapy")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    expected = r"no d_model and no n_layers and no mlp_size; .*how many heads.*JambaLMConfig in a config\.json"
    with pytest.raises(CheckpointError, match=expected):
        open_model(folder)
    del fields["mlp_size"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="config has no mlp_size; the tensors do not tell"):
        open_model(folder)


# --- what a library computes otherwise -------------------------------------------------------------


def test_a_model_that_mlx_lm_would_compute_otherwise(tmp_path):
    sparse = dataclasses.replace(CONFIG, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"cannot be written as mlx_lm: .*2 chosen of 3 experts sum to 1, where Jamba"):
        write(tmp_path / "sparse", sparse, "mlx_lm")
    elsewhere = dataclasses.replace(CONFIG, expert_layer_period=3)
    with pytest.raises(ValueError, match=r"mixtures in other layers for expert_layer_period=3 and .*offset=1"):
        write(tmp_path / "elsewhere", elsewhere, "mlx_lm")
    with pytest.raises(ValueError, match="of attention or of Mamba alone cannot be written as mlx_lm"):
        write(tmp_path / "alone", dataclasses.replace(CONFIG, attn_layer_period=1, attn_layer_offset=0), "mlx_lm")
    for layout in ("hf", "mlx_lm", "mambapy"):
        with pytest.raises(ValueError, match=f"expand=1.5 cannot be written as {layout}, which has whole numbers only"):
            write(tmp_path / layout, dataclasses.replace(CONFIG, expand=1.5), layout)
    # A file of one is read as what was trained.
    folder = write(tmp_path / "full", CONFIG, "mlx_lm")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": 2}))
    opened = open_model(folder)
    assert opened.config == sparse
    assert "read as it was trained, though mlx_lm lets the weights" in opened.evidence
    assert "though" not in open_model(write(tmp_path / "again", CONFIG, "mlx_lm")).evidence


# --- faults ----------------------------------------------------------------------------------------


def broken(tmp_path, change):
    arrays = arrays_of(write(tmp_path / "whole", CONFIG, "hf"))
    change(arrays)
    return state_dict(tmp_path / "broken", arrays, **FIELDS)


def test_what_is_missing_or_of_another_shape_or_dtype_is_named(tmp_path):
    attention, experts = "model.layers.1.self_attn.", "model.layers.3.feed_forward.experts."

    def change(arrays):
        del arrays[experts + "1.up_proj.weight"]
        arrays[experts + "3.up_proj.weight"] = np.zeros((5, 8), np.float32)
        arrays[experts + "0.down_proj.weight"] = np.zeros((5, 8), np.float32)
        arrays[attention + "k_proj.weight"] = arrays[attention + "k_proj.weight"].astype(np.float16)
        arrays["model.layers.0.feed_forward.up_proj.weight"] = np.zeros((4, 8), np.float32)

    with pytest.raises(CheckpointError) as caught:
        open_model(broken(tmp_path, change))
    for words in (
        f"missing {experts}1.up_proj.weight",
        f"unexpected {experts}3.up_proj.weight",
        f"{experts}0.down_proj.weight has shape (5, 8), expected (8, 5)",
        "mixer.in_proj.weight is joined of tensors of several dtypes",
        f"{attention}q_proj.weight has float32 and {attention}k_proj.weight has float16",
        "model.layers.0.feed_forward.up_proj.weight has shape (4, 8), expected (5, 8)",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("model.layers.1.self_attn.q_proj.qweight", "quantised by GPTQ or AWQ"),
        ("model.layers.1.self_attn.q_proj.weight.absmax", "quantised by bitsandbytes"),
        ("model.layers.3.feed_forward.experts.1.up_proj.weight_scale", "quantised; save it dequantised"),
        ("model.layers.3.feed_forward.experts.gate_up_proj_scale_inv", "quantised; save it dequantised"),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "is or holds an adapter.*merge it into"),
        ("model.layers.1.self_attn.q_proj.base_layer.weight", "is or holds an adapter.*merge it into"),
    ],
)
def test_what_lies_beside_the_parts_is_refused_by_name(tmp_path, name, fault):
    folder = broken(tmp_path, lambda arrays: arrays.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match=f"{name.replace('.', '[.]')}.*{fault}"):
        open_model(folder)


# --- one tensor at a time --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [np.s_[:, 2:5], np.s_[1], np.s_[:, :, ::2], np.s_[:, :0], np.s_[..., 7], np.s_[2, 1:, 3:9]]
)
def test_blocks_of_what_does_not_lie_together_and_back(part):
    whole = np.arange(3 * 8 * 70_000, dtype=np.float32).reshape(3, 8, 70_000)
    pieces = list(blocks(whole[part]))
    assert all(piece.nbytes <= 2**20 for piece in pieces)
    assert np.array_equal(np.concatenate([whole[:0].reshape(-1), *pieces]), whole[part].reshape(-1))
    target, expected = np.zeros_like(whole), np.zeros_like(whole)
    expected[part] = whole[part]
    fill(target[part], iter(pieces))
    assert np.array_equal(target, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_is_about_the_largest_tensor_of_ours(tmp_path):
    """137 MB, of which a stack of experts is 42 MB: apart, as halves of stacks, and apart again."""
    config = dataclasses.replace(
        CONFIG, d_model=256, d_intermediate=640, num_experts=32, num_experts_per_tok=32, vocab_size=512
    )
    values = {name: np.zeros(entry.shape, np.float32) for name, entry in parameter_table(config).items()}
    largest = max(array.nbytes for array in values.values())
    assert largest == 32 * 2 * 640 * 256 * 4
    assert sum(array.nbytes for array in values.values()) > 3 * largest
    (tmp_path / "hf").mkdir()
    write_model(tmp_path / "hf", config, values, layout="hf", dtype="float32")
    program = (
        "import sys, mamba_core.weights.convert as c\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak(); c.convert(*sys.argv[1:3], to=sys.argv[3]); print(peak() - before)"
    )
    for source, to in (("hf", "mlx_lm"), ("mlx_lm", "mambapy"), ("mambapy", "hf")):
        target = tmp_path / (to if to != "hf" else "back")
        command = [sys.executable, "-c", program, str(tmp_path / source), str(target), to]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert grown < largest + 15e6, (source, to)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()


def test_a_conversion_is_verified(tmp_path, monkeypatch):
    def none():
        raise ImportError("no framework is installed")

    monkeypatch.setattr(verify.registry, "default_name", none)  # the float64 reference verifies
    write(tmp_path / "hf", CONFIG, "hf")
    done = mc.convert(tmp_path / "hf", tmp_path / "out", to="mlx-lm", verify=True)
    assert done.verification.backend == "reference"
    assert {row.transform for row in done.tensors if "switch_mlp.gate" in row.target} == {"6 tensors -> 2 tensors"}
