"""Tables of names and fields: every tensor once, other packages' tables, joined tensors, and who claims to be Mamba."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mamba_core as mc
from mamba_core import architectures, discovery
from mamba_core.config import from_dict
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import Parameter, parameter_table
from mamba_core.weights import configs, layouts, tables, verify
from mamba_core.weights.formats import DTYPES, CheckpointError, TensorSource
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.names import Row, Scheme, stored_tensors
from mamba_core.weights.opening import open_model
from mamba_core.weights.transforms import CHANNELS_LAST
from mamba_core.weights.writing import stored_sources, write_layout, write_model

from . import toy_package
from .layout_files import CONFIG, arrays_of, contents, of_layout, options_of, state_dict, write

ROOT = Path(__file__).parents[2]
OURS = [name for name in discovery.names("weights.tables") if name in discovery.names("architectures")]
PAIRS = [(name, layout) for name in OURS for layout in tables.of(name)]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy package, installed for a test; its config."""
    folder = tmp_path / "site"
    toy_package.write(folder)
    monkeypatch.syspath_prepend(str(folder))
    toy_package.forget()
    yield toy_package.config()
    monkeypatch.undo()
    toy_package.forget()


@pytest.fixture
def no_framework(monkeypatch):
    """The float64 reference verifies: no backend has the toy's mixer."""

    def none():
        raise ImportError("no framework is installed")

    monkeypatch.setattr(verify.registry, "default_name", none)


def saved(folder, config, layout="hf", dtype="float32"):
    folder.mkdir()
    values = {
        name: value.astype(DTYPES[parameter_table(config)[name].dtype(dtype)].numpy)
        for name, value in initial_values(config)
    }
    write_model(folder, config, values, layout=layout, dtype=dtype)
    return values


def assert_holds(opened, values) -> None:
    found = dict(opened.tensors())
    assert list(found) == list(values)
    for name, array in found.items():
        assert array.dtype == values[name].dtype, name
        assert array.tobytes() == values[name].tobytes(), name


# --- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_table_names_every_tensor_once_and_back(name, layout):
    table, kind = tables.find(name, layout), architectures.find(name).Config
    for scheme in table.schemes:
        seen = set()
        switches = [
            f.name for f in dataclasses.fields(kind) if f.type in (bool, "bool") and f.name != "residual_in_fp32"
        ]
        for on in (False, True):
            config = kind(n_layer=12, task=scheme.task, **dict.fromkeys(switches, on))
            everything = stored_tensors(config, scheme)
            for parameter in parameter_table(config).values():
                stored = everything[parameter.name]
                seen |= set(stored.names)
                if len(stored.pieces) == 1:
                    back, transform = scheme.canonical(stored.names[0])
                    assert (back, transform.canonical_shape(stored.pieces[0].shape)) == (
                        parameter.name,
                        parameter.shape,
                    )
            names = [piece for stored in everything.values() for piece in stored.names]
            assert len(set(names)) == len(names)
        assert scheme.canonical("backbone.layers.0.mixer.unknown.weight") is None


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_table_fits_its_config_and_its_layout(name, layout):
    table, shape = tables.find(name, layout), layouts.find(layout)
    own = {item.name for item in dataclasses.fields(architectures.find(name).Config)}
    assert set(table.fields) | set(table.required) | set(table.hides) <= own
    assert bool(table.kinds) == bool(shape.kind)
    theirs = [row.theirs for row in table.rows().values()]
    assert len(set(theirs)) == len(theirs)
    assert all(value in table.fixed.get(key, (value,)) for key, value in table.constants.items())
    assert "config" not in theirs


@pytest.mark.parametrize("layout", layouts.names())
def test_no_two_tables_of_a_layout_claim_a_kind(layout):
    kinds = [kind for table in tables.holding(layout).values() for kind in table.kinds]
    assert len(set(kinds)) == len(kinds)
    assert sum(table.assumed for table in tables.holding(layout).values()) <= 1


def test_no_architecture_is_named_where_all_are_read():
    files = [path for folder in (".", "formats", "layouts") for path in (ROOT / "weights" / folder).glob("*.py")]
    files += (ROOT / "weights" / "tables" / name for name in ("__init__.py", "base.py"))
    for path in files:
        found = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not found & set(OURS), path


# --- somebody else's -------------------------------------------------------------------------------


def test_another_packages_architecture_is_saved_and_loaded(toy, tmp_path):
    values = saved(tmp_path / "toy", toy)
    fields = json.loads((tmp_path / "toy" / "config.json").read_text())
    assert fields["model_type"] == "toy"
    assert fields["architectures"] == ["ToyForCausalLM"]
    assert fields["num_toy_experts"] == 3
    opened = open_model(tmp_path / "toy")
    assert (opened.layout, opened.config) == ("hf", toy)
    assert opened.config.gains == (1.0, 2.0)
    assert_holds(opened, values)
    names = set(open_checkpoint(tmp_path / "toy"))
    assert {f"model.blocks.1.moe.2.{name}.weight" for name in ("gate", "up", "down")} <= names
    assert {f"model.blocks.0.{name}.weight" for name in "qkv"} <= names
    assert from_dict(fields) == toy


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_another_packages_architecture_is_converted(toy, tmp_path, no_framework, dtype):
    values = saved(tmp_path / "toy", toy)
    done = mc.convert(tmp_path / "toy", tmp_path / "out", to="hf", dtype=dtype, lossy=True, verify=True)
    assert done.verification.backend == "reference"
    assert {row.target for row in done.tensors} == set(open_checkpoint(tmp_path / "toy"))
    assert all(row.source == row.target and row.transform is None for row in done.tensors)
    table = parameter_table(toy)
    expected = {key: value.astype(DTYPES[table[key].dtype(dtype or "float32")].numpy) for key, value in values.items()}
    assert_holds(open_model(tmp_path / "out"), expected)
    assert open_model(tmp_path / "out").dtype == (dtype or "float32")
    if dtype is None:
        assert contents(tmp_path / "out") == contents(tmp_path / "toy")


def test_another_packages_architecture_in_the_nested_config_of_another_library(toy, tmp_path):
    values = saved(tmp_path / "toy", dataclasses.replace(toy, width=3), "mamba_ssm")
    fields = json.loads((tmp_path / "toy" / "config.json").read_text())
    assert fields["ssm_cfg"] == {"layer": "Toy", "toy_width": 3}, "what has its default is not written, the kind is"
    opened = open_model(tmp_path / "toy")
    assert (opened.layout, opened.config.width, opened.config.experts) == ("mamba_ssm", 3, 3)
    assert_holds(opened, values)
    plain = write(tmp_path / "plain", CONFIG, "mamba_ssm")
    assert json.loads((plain / "config.json").read_text())["ssm_cfg"] == {"d_state": 3, "dt_rank": 2}
    with pytest.raises(ValueError, match=r"ssm_cfg\.toy_width=3, which is of architecture 'toy'"):
        from_dict({"ssm_cfg": {"toy_width": 3}})


def test_another_packages_layout(toy, tmp_path, no_framework):
    saved(tmp_path / "toy", toy)
    done = mc.convert(tmp_path / "toy", tmp_path / "out", to="toy-layout", verify=True)
    assert done.target_layout == "toy_layout"
    assert [path.name for path in open_checkpoint(tmp_path / "out").files] == ["weights.npz"]
    assert {row.transform for row in done.tensors if "gate_up" in row.target} == {"6 tensors -> as is"}
    assert open_model(tmp_path / "out").config == toy
    mc.convert(tmp_path / "out", tmp_path / "back", to="hf", verify=True)
    assert contents(tmp_path / "back") == contents(tmp_path / "toy")


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_names_that_begin_like_a_wrapper(toy, tmp_path, prefix):
    """Without the head every name of the toy begins with "model.", which is no wrapper there."""
    tied = dataclasses.replace(toy, tie_embeddings=True)
    values = saved(tmp_path / "toy", tied)
    assert open_model(tmp_path / "toy").evidence.count("every name begins") == 0
    fields = json.loads((tmp_path / "toy" / "config.json").read_text())
    wrapped = {prefix + name: array for name, array in arrays_of(tmp_path / "toy").items()}
    opened = open_model(state_dict(tmp_path / "wrapped", wrapped, **fields))
    assert f"every name begins with '{prefix}'" in opened.evidence
    assert_holds(opened, values)


def test_an_architecture_without_a_table_has_our_own_names_and_fields(toy, tmp_path, no_framework):
    config = toy_package.config("bare", gains=(3.0,), experts=2)
    values = saved(tmp_path / "bare", config)
    fields = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert fields["model_type"] == "mamba_core_bare"
    assert fields["experts"] == 2
    assert list(open_checkpoint(tmp_path / "bare")) == list(parameter_table(config))
    opened = open_model(tmp_path / "bare")
    assert opened.config == config == from_dict(fields)
    assert_holds(opened, values)
    assert mc.convert(tmp_path / "bare", tmp_path / "out", to="hf", verify=True).verification.positions
    with pytest.raises(
        ValueError, match=r"'bare' cannot be written as mambapy.*layout hf.*no file weights/tables/bare"
    ):
        mc.convert(tmp_path / "bare", tmp_path / "other", to="mambapy")
    features = dataclasses.replace(config, task="features")
    assert_holds(opened, saved(tmp_path / "features", features) | {"lm_head.weight": values["lm_head.weight"]})
    assert open_model(tmp_path / "features").config == features


def test_what_is_missing_of_another_packages_architecture(toy, tmp_path):
    saved(tmp_path / "toy", toy)
    fields = json.loads((tmp_path / "toy" / "config.json").read_text())
    arrays = arrays_of(tmp_path / "toy")
    arrays["model.blocks.0.q.weight"] = arrays["model.blocks.0.q.weight"].astype(np.float64)
    arrays["model.blocks.1.moe.1.up.weight"] = np.zeros((2, 5), np.float32)
    del arrays["model.blocks.1.moe.0.gate.weight"]
    arrays["model.blocks.1.moe.3.down.weight"] = np.zeros((6, 2), np.float32)
    with pytest.raises(CheckpointError) as caught:
        open_model(state_dict(tmp_path / "broken", arrays, **fields))
    for words in (
        "missing model.blocks.1.moe.0.gate.weight",
        "unexpected model.blocks.1.moe.3.down.weight",
        "model.blocks.1.moe.1.up.weight has shape (2, 5), expected (2, 6)",
        "backbone.layers.0.qkv.weight is joined of tensors of several dtypes: model.blocks.0.q.weight has float64 and",
    ):
        assert words in str(caught.value)
    with pytest.raises(CheckpointError, match=r"joined of 100000 tensors, but the file has \d+ tensors"):
        open_model(state_dict(tmp_path / "claim", arrays, **fields | {"num_toy_experts": 10**5}))
    with pytest.raises(CheckpointError, match="toy_activation='gelu'; this version reads toy_activation='relu' only"):
        open_model(state_dict(tmp_path / "other", arrays, **fields | {"toy_activation": "gelu"}))


def test_a_task_that_no_table_knows_is_held_by_our_own_layout(toy, tmp_path):
    config = dataclasses.replace(CONFIG, task="scores", task_options={"labels": 5}, tie_embeddings=True)
    values = saved(tmp_path / "scores", config)
    assert "score.weight" in open_checkpoint(tmp_path / "scores")
    fields = json.loads((tmp_path / "scores" / "config.json").read_text())
    assert fields["mamba_core"]["task"] == "scores"
    assert "architectures" not in fields
    opened = open_model(tmp_path / "scores")
    assert opened.config == config
    assert_holds(opened, values)
    for layout in ("mamba_ssm", "mlx_lm", "mambapy"):
        with pytest.raises(ValueError, match=f"task 'scores' cannot be written as {layout}; expected layout hf"):
            mc.convert(tmp_path / "scores", tmp_path / "out", to=layout)


# --- joined tensors --------------------------------------------------------------------------------


def parameter(shape, parts=()):
    return Parameter("backbone.layers.7.w", "abc"[: len(shape)], shape, None, parts=parts)


def joined(row, given):
    """(names, what is written, what is read of that) for one tensor and the row that says how it is stored."""
    stored = Scheme("lm", (row,)).stored(given)
    value = np.random.default_rng(0).normal(size=given.shape)
    written = {piece.name: piece.transform.write(value[piece.where]) for piece in stored.pieces}
    assert {piece.name: piece.shape for piece in stored.pieces} == {name: part.shape for name, part in written.items()}
    read = np.full(given.shape, np.nan)
    for piece in stored.pieces:
        read[piece.where] = piece.transform.read(written[piece.name])
    assert np.array_equal(read, value)
    return value, written


def test_a_stack():
    row = Row("backbone.layers.{layer}.w", "l.{layer}.e.{expert}.w")
    value, written = joined(row, parameter((3, 2, 5)))
    assert list(written) == [f"l.7.e.{expert}.w" for expert in range(3)]
    assert all(np.array_equal(written[f"l.7.e.{expert}.w"], value[expert]) for expert in range(3))


def test_a_stack_of_pairs():
    row = Row("backbone.layers.{layer}.w", ("l.{layer}.e.{expert}.gate", "l.{layer}.e.{expert}.up"))
    value, written = joined(row, parameter((3, 4, 5)))
    assert list(written) == [f"l.7.e.{expert}.{name}" for expert in range(3) for name in ("gate", "up")]
    assert np.array_equal(written["l.7.e.2.gate"], value[2, :2])
    assert np.array_equal(written["l.7.e.2.up"], value[2, 2:])


def test_parts_side_by_side_have_the_sizes_of_the_parameters_parts():
    row = Row("backbone.layers.{layer}.w", ("q", "k", "v"))
    value, written = joined(row, parameter((8, 5), (("q", 4), ("k", 2), ("v", 2))))
    assert np.array_equal(written["k"], value[4:6])
    # The parts are those of the first axis, so along another axis the stored tensors are of equal size.
    value, written = joined(row._replace(axis=1), parameter((8, 6), (("q", 4), ("k", 2), ("v", 2))))
    assert np.array_equal(written["k"], value[:, 2:4])
    stack = row._replace(stored=("q.{expert}", "k.{expert}", "v.{expert}"))
    value, written = joined(stack, parameter((8, 6), (("q", 4), ("k", 2), ("v", 2))))
    assert np.array_equal(written["k.7"], value[7, 2:4])


def test_each_part_is_transformed():
    row = Row("backbone.layers.{layer}.w", ("a", "b"), CHANNELS_LAST)
    value, written = joined(row, parameter((6, 1, 4)))
    assert written["b"].shape == (3, 4, 1)
    assert np.array_equal(written["b"][:, :, 0], value[3:, 0])


def test_what_does_not_divide_or_has_no_such_axis():
    row = Row("backbone.layers.{layer}.w", ("a", "b"))
    with pytest.raises(ValueError, match=r"shape \(5, 4\), which is not 2 equal parts"):
        Scheme("lm", (row,)).stored(parameter((5, 4)))
    with pytest.raises(ValueError, match="joins along axis 2"):
        Scheme("lm", (row._replace(axis=2),)).stored(parameter((6, 4)))
    with pytest.raises(ValueError, match=r"no row for the parameter 'backbone\.layers\.7\.w'"):
        Scheme("lm", ()).stored(parameter((5, 4)))


def test_a_joined_tensor_is_read_once_to_be_written_apart(toy):
    reads = []

    def read(name, shape):
        reads.append(name)
        return np.zeros(shape, np.float32)

    sources = [
        TensorSource(name, parameter.shape, "float32", lambda name=name, shape=parameter.shape: read(name, shape))
        for name, parameter in parameter_table(toy).items()
    ]
    for source in stored_sources(toy, sources, "hf"):
        assert source.read().shape == source.shape
    assert reads == list(parameter_table(toy))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_peak_memory_is_about_the_largest_joined_tensor(toy, tmp_path):
    """200 MB in joined tensors of 17 MB, of 64 stored ones each."""
    config = toy_package.config(d_model=512, n_layer=8, experts=64, width=64)
    values = {name: np.zeros(entry.shape, np.float32) for name, entry in parameter_table(config).items()}
    (tmp_path / "toy").mkdir()
    write_model(tmp_path / "toy", config, values, layout="hf", dtype="float32")
    program = (
        "import sys, mamba_core.weights.convert as c\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak(); c.convert(sys.argv[1], sys.argv[2], to='hf'); print(peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "toy"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    largest = max(array.nbytes for array in values.values())
    assert largest == 64 * 128 * 512 * 4
    assert grown < largest + 30e6 < sum(array.nbytes for array in values.values()) / 3
    assert contents(tmp_path / "out") == contents(tmp_path / "toy")


# --- what is not what it claims --------------------------------------------------------------------


def test_a_field_of_another_architecture_is_not_plain(toy, tmp_path):
    folder = write(tmp_path / "out", CONFIG, "hf")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"toy_width": 3}))
    with pytest.raises(
        CheckpointError, match=r"toy_width=3, which is of architecture 'toy'; as 'mamba', which it claims"
    ):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"toy_width": None}))
    assert open_model(folder).config == CONFIG
    # Nor does it get there from another layout, whose fields it does not mean anything to.
    kept = dataclasses.replace(CONFIG, extra={"toy_width": 3, "note": 1})
    assert "toy_width" not in kept.to_hf()
    assert kept.to_hf()["note"] == 1


def test_the_class_of_another_architecture_is_not_plain(toy, tmp_path):
    folder = write(tmp_path / "out", CONFIG, "hf")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": ["ToyForCausalLM"]}))
    with pytest.raises(
        CheckpointError, match=r"'ToyForCausalLM', a class of architecture 'toy'; those of .* 'mamba' are"
    ):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": ["MambaForSomething"]}))
    with pytest.raises(
        CheckpointError, match="'MambaForSomething'; those of architecture 'mamba' are MambaForCausalLM"
    ):
        open_model(folder)


def test_the_class_tells_where_no_model_type_does(toy):
    fields = toy.to_hf()
    del fields["model_type"]
    assert from_dict(fields) == toy
    fields = CONFIG.to_hf()
    del fields["model_type"]
    assert from_dict(fields) == CONFIG


def test_a_model_type_that_nobody_knows_is_named(tmp_path):
    folder = write(tmp_path / "out", CONFIG, "hf")
    (folder / "config.json").write_text(json.dumps({"model_type": "rwkv", "hidden_size": 6}))
    with pytest.raises(CheckpointError, match=r"model_type 'rwkv'; this version reads .*'mamba'"):
        open_model(folder)
    other = state_dict(tmp_path / "other", {"rwkv.w": np.zeros(2)}, model_type="rwkv")
    with pytest.raises(CheckpointError, match=r"cannot tell the layout: .*model_type 'rwkv'; this version reads"):
        open_model(other)


def test_layers_whose_config_has_a_field_of_another_layout(tmp_path):
    """Once opened it could not be saved: the dtype was asked of an embedding that it does not have."""
    config = dataclasses.replace(CONFIG, task="layers", extra={"model_type": "mamba", "hidden_size": 6})
    folder = write(tmp_path / "layers", config, "mambapy")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mamba"
    opened = open_model(folder)
    assert (opened.layout, opened.config, opened.config.extra) == ("mambapy", config, config.extra)
    again = tmp_path / "again"
    again.mkdir()
    write_layout(again, opened.config, [item for _, _, item in opened.sources()], "mambapy")
    assert contents(again) == contents(folder)
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


# --- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", layouts.names())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_dtype_is_that_of_the_first_tensor_that_need_not_be_float32(tmp_path, layout, dtype):
    for task in ("lm", "layers") if layout.startswith("mambapy") else ("lm",):
        config = of_layout(dataclasses.replace(CONFIG, task=task), layout)
        opened = open_model(write(tmp_path / task, config, layout, dtype), **options_of(config))
        assert opened.dtype == ("float32" if dtype == "float64" else dtype)
        fields = json.loads((tmp_path / task / layouts.find(layout).config_file).read_text())
        assert fields.get("torch_dtype", dtype) == dtype


def test_the_dtype_of_a_model_that_begins_with_a_tensor_in_float32(toy, tmp_path):
    config = toy_package.config("bare", task="layers")
    saved(tmp_path / "bare", config, dtype="bfloat16")
    assert next(iter(dict(open_model(tmp_path / "bare").tensors()).values())).dtype == np.float32
    assert open_model(tmp_path / "bare").dtype == "bfloat16"
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_fields_of_a_scheme_that_no_layout_has():
    assert configs.scheme_for(dataclasses.replace(CONFIG, task="layers"), "hf") is None
    assert configs.scheme_for(dataclasses.replace(CONFIG, task="layers"), "mambapy").task == "layers"
