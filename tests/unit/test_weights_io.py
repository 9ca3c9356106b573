"""Checkpoint files: we and others read what is written; a broken or hostile file is one clear error."""

import json
import os
import pickle
import re
import struct
import sys
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mamba_core.weights import torch_file
from mamba_core.weights.io import (
    DTYPES,
    CheckpointError,
    TensorSource,
    atomic_file,
    atomic_folder,
    open_checkpoint,
    sources_of,
    write_safetensors,
    write_safetensors_file,
    write_torch,
)


def example_arrays() -> dict[str, np.ndarray]:
    """Every dtype, a scalar, an empty tensor, a transposed view, and an odd size before a wide element."""
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtype.numpy) for name, dtype in DTYPES.items()}
    return arrays | {
        "odd": np.arange(3, dtype=np.int8),
        "scalar": np.array(-1.5, np.float32),
        "empty": np.zeros((0, 3), ml_dtypes.bfloat16),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "block.ä\n": np.arange(4, dtype=np.int64),
    }


def write(path, arrays) -> None:
    writer = write_safetensors_file if path.suffix == ".safetensors" else write_torch
    writer(path, sources_of(arrays))


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_fault(path, *words: str) -> None:
    """Opening fails with one line that names the path and has every word."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_what_is_written_is_read_back(tmp_path, name):
    arrays = example_arrays()
    write(tmp_path / name, arrays)
    opened = open_checkpoint(tmp_path / name)
    assert_same(opened, arrays)
    assert opened.files == (tmp_path / name,)
    assert opened.header("bfloat16") == ((2, 3), "bfloat16", 12)
    assert opened.header("empty") == ((0, 3), "bfloat16", 0)
    assert "odd" in opened
    assert "other" not in opened
    assert not opened["float32"].flags.writeable


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_no_tensors_is_a_checkpoint_too(tmp_path, name):
    write(tmp_path / name, {})
    assert dict(open_checkpoint(tmp_path / name)) == {}


def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    arrays = example_arrays()
    write(tmp_path / "a.bin", arrays)
    write(tmp_path / "a.safetensors", arrays)
    loads = [torch.load(tmp_path / "a.bin", weights_only=True, mmap=mapped) for mapped in (False, True)]
    for loaded in [*loads, safetensors_torch.load_file(tmp_path / "a.safetensors")]:
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            expected = torch.from_numpy(array.astype(np.float64))
            assert str(loaded[name].dtype) == f"torch.{array.dtype.name}"
            assert loaded[name].shape == array.shape
            assert torch.equal(loaded[name].to(torch.float64), expected)
    assert list(loads[0]) == list(arrays)


def test_safetensors_and_we_read_each_other(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    arrays = {name: np.ascontiguousarray(array) for name, array in example_arrays().items() if "float8" not in name}
    arrays["scalar"] = np.array(-1.5, np.float32)
    write(tmp_path / "ours.safetensors", arrays)
    assert_same({name: safetensors_numpy.load_file(tmp_path / "ours.safetensors")[name] for name in arrays}, arrays)
    safetensors_numpy.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"who": "they"})
    opened = open_checkpoint(tmp_path / "theirs.safetensors")
    assert_same({name: opened[name] for name in arrays}, arrays)
    assert opened.metadata == {"who": "they"}
    assert len(opened) == len(arrays)


def test_header_is_aligned_and_in_the_order_given(tmp_path):
    write_safetensors_file(tmp_path / "a.safetensors", sources_of(example_arrays()), metadata={"key": "text"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"key": "text"}
    assert list(header) == list(example_arrays())
    for name, array in example_arrays().items():
        assert header[name]["data_offsets"][0] % array.dtype.itemsize == 0


def test_torch_records_are_aligned(tmp_path):
    write(tmp_path / "a.bin", example_arrays())
    for name, tensor in torch_file.read_torch(tmp_path / "a.bin").tensors.items():
        assert tensor.offset % 64 == 0, name


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_the_same_tensors_are_the_same_bytes(tmp_path, name):
    write(tmp_path / name, example_arrays())
    write(tmp_path / f"second_{name}", open_checkpoint(tmp_path / name))
    assert (tmp_path / name).read_bytes() == (tmp_path / f"second_{name}").read_bytes()


# --- one tensor at a time --------------------------------------------------------------------------


def test_opening_and_indexing_load_nothing(tmp_path):
    """A sparse file of 64 GiB: only a map can hand out its last element."""
    elements = 2**34
    header = {"x": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}
    path = write_raw(tmp_path / "a.safetensors", header, b"")
    os.truncate(path, path.stat().st_size + 4 * elements)
    opened = open_checkpoint(path)
    assert opened.header("x") == ((elements,), "float32", 4 * elements)
    assert opened["x"][-1] == 0
    path.unlink()


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_writing_holds_one_tensor(tmp_path, name):
    alive, most = weakref.WeakSet(), []

    class Tracked(np.ndarray):
        __hash__ = object.__hash__

    def read():
        array = Tracked(8, np.float32)
        alive.add(array)
        most.append(len(alive))
        return array

    sources = [TensorSource(str(number), (8,), "float32", read) for number in range(5)]
    writer = write_safetensors_file if name.endswith("safetensors") else write_torch
    writer(tmp_path / name, sources)
    # The one before is let go when its successor arrives.
    assert len(most) == 5
    assert max(most) <= 2


def test_an_opened_checkpoint_outlives_its_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"x": np.arange(3.0)})
    opened = open_checkpoint(path)
    with atomic_file(path, overwrite=True) as partial:
        write_safetensors_file(partial, sources_of({"y": np.zeros(100)}))
    assert opened["x"].tolist() == [0, 1, 2]


# --- what cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [write_safetensors_file, write_torch])
def test_faults_of_the_sources_are_raised_together_before_anything_is_written(tmp_path, writer):
    def read():
        raise AssertionError("read too early")

    sources = [("a", (1,), "float32", read), ("a", (1,), "float32", read)]
    sources += [("b", (1,), "complex64", read), ("c", (-1,), "float32", read)]
    with pytest.raises(CheckpointError, match=r"'a' is given twice; 'b': dtype 'complex64' .*; 'c': shape \(-1,\)"):
        writer(tmp_path / "out", sources)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("writer", [write_safetensors_file, write_torch])
@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float32), np.zeros((3, 2))])
def test_a_source_that_is_not_what_it_announced(tmp_path, writer, array):
    with pytest.raises(CheckpointError, match=r"'w' was announced as float32 \(3, 2\)"):
        writer(tmp_path / "out", [("w", (3, 2), "float32", lambda: array)])


def test_metadata_that_is_not_text_and_a_reserved_name(tmp_path):
    with pytest.raises(CheckpointError, match="entry that is not text"):
        write_safetensors(tmp_path, [], metadata={"step": 3})
    with pytest.raises(CheckpointError, match="no tensor can be named '__metadata__'"):
        write_safetensors(tmp_path, sources_of({"__metadata__": np.zeros(1)}))


# --- shards ----------------------------------------------------------------------------------------


def write_shards(folder) -> dict[str, np.ndarray]:
    arrays = {"large": np.zeros(100)} | {f"w{number}": np.full(10, number, np.float32) for number in range(5)}
    write_safetensors(folder, sources_of(arrays), shard_bytes=100)
    return arrays


def test_shards_and_their_index(tmp_path):
    arrays = write_shards(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
    assert index["metadata"] == {"total_size": 5 * 40 + 800}
    assert index["weight_map"] == dict(zip(arrays, [shards[i] for i in (0, 1, 1, 2, 2, 3)], strict=True))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        opened = open_checkpoint(path)
        assert_same({name: opened[name] for name in arrays}, arrays)
        assert [file.name for file in opened.files] == shards
        assert opened.metadata == {"format": "pt"}


def test_one_file_when_it_fits(tmp_path):
    files = write_safetensors(tmp_path / "new", sources_of({"w": np.zeros(10)}), shard_bytes=80)
    assert files == [tmp_path / "new" / "model.safetensors"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_shards_of_torch_files(tmp_path):
    write(tmp_path / "pytorch_model-1.bin", {"a": np.zeros(2)})
    write(tmp_path / "pytorch_model-2.bin", {"b": np.ones(2)})
    index = {"weight_map": {"b": "pytorch_model-2.bin", "a": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(tmp_path)
    assert opened["b"].tolist() == [1, 1]
    assert list(opened) == ["b", "a"]


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/etc/m.safetensors", "..", ".", "", "a/m.safetensors", "a\\m.safetensors", "a\0b"]
)
def test_shard_names_are_plain(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "m.safetensors", {"w": np.zeros(1)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    assert_fault(index, "not plain file names", repr(name))


def test_missing_shards_are_all_named(tmp_path):
    write_shards(tmp_path)
    for number in (1, 3):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    assert_fault(index, "model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors")


def test_index_and_shards_hold_the_same_tensors(tmp_path):
    write_shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00004.safetensors"
    del index["weight_map"]["w3"]
    index["weight_map"]["w0"] = "model-00004-of-00004.safetensors"
    path.write_text(json.dumps(index))
    assert_fault(path, "'ghost' is listed", "'w0' is listed", "'w3' is in", "'w0' is in")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "keys that appear twice: 'a'"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_faults_of_an_index(tmp_path, text, word):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert_fault(path, word)


def test_paths_that_are_no_checkpoint(tmp_path):
    assert issubclass(CheckpointError, ValueError)
    (tmp_path / "a.npz").write_bytes(b"x")
    assert_fault(tmp_path / "absent.bin", "no such file or folder")
    assert_fault(tmp_path, "holds none of model.safetensors")
    assert_fault(tmp_path / "a.npz", "unknown kind of file")


def test_safetensors_is_preferred_to_torch(tmp_path):
    write(tmp_path / "model.safetensors", {"a": np.zeros(1)})
    write(tmp_path / "pytorch_model.bin", {"b": np.zeros(1)})
    assert list(open_checkpoint(tmp_path)) == ["a"]


# --- faults of a safetensors file ------------------------------------------------------------------


def write_raw(path, header, data: bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"[]", "not a JSON object"),
        (b" {}", "not a JSON object"),
        (b'{"w": ', "not valid JSON"),
        (b'{"w": "\xff"}', "not valid JSON"),
        (b'{"w": {"dtype": "F32", "shape": [2], "dtype": "F32", "data_offsets": [0, 8]}}', "twice: 'dtype'"),
        (b'{"w": 1, "v": 2, "w": 1}', "twice: 'w'"),
        (b'{"w":' + b"[" * 100_000, "nested too deeply"),
        ({"w": 3}, "tensor 'w': its entry is not an object"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "its entry is not an object of"),
        ({"w": entry(more=1)}, "its entry is not an object of"),
        ({"w": entry(dtype="F31")}, "dtype 'F31' is unknown"),
        ({"w": entry(dtype=["F32"])}, "dtype ['F32'] is unknown"),
        ({"w": entry() | {"shape": 2}}, "shape 2 is not a list"),
        ({"w": entry((-2,))}, "non-negative integer"),
        ({"w": entry((2.0,))}, "non-negative integer"),
        ({"w": entry((True, 2))}, "non-negative integer"),
        ({"w": entry((0, 2**62, 2**62), 0, 0)}, "too large"),
        ({"w": entry((1,) * 65, 0, 4)}, "too large"),
        ({"w": entry() | {"data_offsets": [0, 8, 8]}}, "not two integers"),
        ({"w": entry(begin=0, end=8.0)}, "not two integers"),
        ({"w": entry(begin=8, end=0)}, "not in order"),
        ({"w": entry(begin=-8, end=0)}, "not in order"),
        ({"w": entry((3,))}, "do not span the 12 bytes"),
        ({"w": entry(begin=8, end=16)}, "past the end of the file"),
        ({"w": entry(), "v": entry((1,), 4, 8)}, "tensor 'v' at byte 4 of the data overlaps"),
        ({"w": entry((1,), 4, 8)}, "tensor 'w' at byte 4 of the data leaves a gap of 4 bytes"),
        ({"w": entry((1,), 0, 4)}, "4 bytes follow the last tensor"),
        ({"__metadata__": [], "w": entry()}, "__metadata__ is not an object"),
        ({"__metadata__": {"a": 1}, "w": entry()}, "__metadata__ has an entry that is not text"),
    ],
)
def test_faults_of_a_header(tmp_path, header, word):
    assert_fault(write_raw(tmp_path / "a.safetensors", header, bytes(8)), word)


def test_lengths_of_a_header(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    assert_fault(path, "empty")
    path.write_bytes((64).to_bytes(8, "little") + b"{}")
    assert_fault(path, "header is 64 bytes long")
    path.write_bytes(b"\xff" * 64)
    assert_fault(path, "not a safetensors file")


def test_an_unaligned_file_of_others_is_read(tmp_path):
    header = {"a": entry((3,), 0, 3, "I8"), "b": entry((2,), 3, 11)}
    data = bytes([1, 2, 3]) + np.array([1.5, -2.5], "<f4").tobytes()
    opened = open_checkpoint(write_raw(tmp_path / "a.safetensors", header, data))
    assert opened["b"].tolist() == [1.5, -2.5]


# --- broken files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_file_cut_short_anywhere(tmp_path, name):
    write(tmp_path / name, {"w": np.arange(6.0).reshape(2, 3), "v": np.ones(3, ml_dtypes.bfloat16)})
    whole = (tmp_path / name).read_bytes()
    for length in (*range(0, len(whole), 7), *range(len(whole) - 64, len(whole))):
        (tmp_path / name).write_bytes(whole[:length])
        assert_fault(tmp_path / name, "cut short" if length else "empty")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_changed_byte_is_an_error_or_harmless(tmp_path, name):
    write(tmp_path / name, {"w": np.arange(6.0).reshape(2, 3), "v": np.ones(3, ml_dtypes.bfloat16)})
    whole = (tmp_path / name).read_bytes()
    random = np.random.default_rng(0)
    messages = []
    for _ in range(500):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] = random.integers(256)
        (tmp_path / name).write_bytes(changed)
        try:
            for array in open_checkpoint(tmp_path / name).values():
                array.tobytes()
        except CheckpointError as fault:
            messages.append(str(fault))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


# --- what torch writes -----------------------------------------------------------------------------


def test_views_and_parameters_that_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    marked = torch.nn.Parameter(base[1].clone())
    marked._no_weight_decay = True
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "sliced": base[1:, ::2],
        "expanded": base[:1, :1].expand(3, 5),
        "odd_stride": torch.as_strided(base, (2, 1), (3, 2**61)),
        "empty": torch.zeros(5, 0),
        "parameter": torch.nn.Parameter(base[2].clone()),
        "marked": marked,
        "half": base.to(torch.bfloat16),
        "float8": base.to(torch.float8_e4m3fn).t(),
        "unsigned": base.to(torch.uint16),
        "flags": base > 3,
        "scalar": torch.tensor(7),
    }
    torch.save(tensors, tmp_path / "a.pt")
    opened = open_checkpoint(tmp_path / "a.pt")
    assert list(opened) == list(tensors)
    for name, tensor in tensors.items():
        assert opened.header(name)[:2] == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert opened[name].astype(np.float64).tolist() == tensor.to(torch.float64).tolist(), name
    assert np.shares_memory(opened["base"], opened["tied"])
    assert np.shares_memory(opened["base"], opened["transposed"])


def test_a_state_dict_and_one_inside_a_training_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 3)
    moments = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 2)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]}
    state = model.state_dict()
    nested = {"model": state, "optimizer": optimizer, "step": 3, "best": None, "rate": 0.1, "size": (1, 2)}
    for saved in (state, nested, {"state_dict": state}):
        torch.save(saved, tmp_path / "a.pt")
        opened = open_checkpoint(tmp_path / "a.pt")
        assert list(opened) == ["weight", "bias"]
        assert opened["weight"].tolist() == model.weight.tolist()


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda x: x, "holds a PickledTensor"),
        (lambda x: [x], "holds a list"),
        (lambda x: {"step": 3}, "found none among 'step'"),
        (lambda x: {"model": {"w": x}, "ema": {"w": x}}, "found 'model', 'ema'"),
        (lambda x: {"w": x, "step": 3}, "entries that are not tensors under a text name: 'step'"),
        (lambda x: {3: x}, "entries that are not tensors under a text name: 3"),
        (lambda x: {"w": x, None: x}, "neither text nor an integer"),
        (lambda x: {"w": x.to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        (lambda x: {"w": x.cfloat()}, "torch.ComplexFloatStorage"),
        (lambda x: {"w": x.cfloat().conj().imag}, "calls torch._utils._rebuild_tensor_v2 with arguments"),
    ],
)
def test_what_is_not_a_dictionary_of_plain_tensors(tmp_path, build, word):
    torch = pytest.importorskip("torch")
    torch.save(build(torch.ones(2)), tmp_path / "a.pt")
    assert_fault(tmp_path / "a.pt", word)


def test_the_format_before_1_6(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert_fault(tmp_path / "a.bin", "before version 1.6", "re-save it")


# --- faults of a torch file ------------------------------------------------------------------------


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED, extra=()):
    """Write the zip again with other data in a record, or without it where the change gives None."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, change(name.split("/", 1)[1], archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*records, *extra]:
            if data is not None:
                archive.writestr(name, data)


@pytest.fixture
def torch_path(tmp_path):
    write(tmp_path / "a.bin", {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)})
    return tmp_path / "a.bin"


def replace(record: str, old: bytes, new: bytes):
    def change(name, data):
        if name != record:
            return data
        assert old in data
        return data.replace(old, new)

    return change


def test_rewriting_alone_changes_nothing(torch_path):
    rewrite(torch_path)
    assert open_checkpoint(torch_path)["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("record", "old", "new", "word"),
    [
        ("byteorder", b"little", b"big", "byte order is b'big'"),
        ("data/0", b"\0\0\0\0", b"", "its storage is 24 bytes long but the record has 20"),
        ("data.pkl", b"J\6\0\0\0t", b"J\5\0\0\0t", "its storage is 20 bytes long but the record has 24"),
        ("data.pkl", b"X\1\0\0\x000", b"X\1\0\0\x007", "its storage '7' is not in the file"),
        ("data.pkl", b"QJ\0\0\0\0", b"QJ\1\0\0\0", "beyond its storage"),
        ("data.pkl", b"QJ\0\0\0\0", b"QJ\xff\xff\xff\xff", "not a non-negative integer"),
        ("data.pkl", b"(J\2\0\0\0J\3\0\0\0t", b"(J\3\0\0\0J\3\0\0\0t", "beyond its storage"),
        ("data.pkl", b"(J\2\0\0\0J\3\0\0\0t", b"(J\2\0\0\0J\xff\xff\xff\xfft", "shape (2, -1)"),
        ("data.pkl", b"(J\2\0\0\0J\3\0\0\0t", b"(J\3\0\0\0t", "number of axes"),
        ("data.pkl", b"(J\3\0\0\0J\1\0\0\0t", b"(J\4\0\0\0J\1\0\0\0t", "beyond its storage"),
        ("data.pkl", b"(J\3\0\0\0J\1\0\0\0t", b"(J\3\0\0\0J\xff\xff\xff\xfft", "not a non-negative integer"),
        ("data.pkl", b"FloatStorage", b"QInt8Storage", "torch.QInt8Storage"),
        ("data.pkl", b"storage", b"storagf", "persistent id"),
        ("data.pkl", b"\x80\2", b"\x80\4", "pickle protocol 4"),
        ("data.pkl", b"QJ", b"J", "_rebuild_tensor_v2 with arguments"),
        ("data.pkl", b"tRu.", b"tR", "malformed"),
    ],
)
def test_faults_of_a_torch_file(torch_path, record, old, new, word):
    rewrite(torch_path, replace(record, old, new))
    assert_fault(torch_path, word)


def test_faults_of_the_zip(torch_path):
    whole = torch_path.read_bytes()
    rewrite(torch_path, compression=zipfile.ZIP_DEFLATED)
    assert_fault(torch_path, "is compressed")
    torch_path.write_bytes(whole)
    rewrite(torch_path, lambda name, data: None if name == "data.pkl" else data)
    assert_fault(torch_path, "has 0 records NAME/data.pkl")
    torch_path.write_bytes(whole)
    rewrite(torch_path, extra=[("other/data.pkl", b"")])
    assert_fault(torch_path, "has 2 records NAME/data.pkl")
    torch_path.write_bytes(whole)
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewrite(torch_path, extra=[("archive/data/0", b"")])
    assert_fault(torch_path, "two records of one name")
    torch_path.write_bytes(b"not a zip")
    assert_fault(torch_path, "it is no zip")
    torch_path.write_bytes(whole.replace(b"PK\x03\x04", b"PK\x03\x05"))
    assert_fault(torch_path, "has no local header")


def test_encrypted_records_are_refused(torch_path):
    whole = bytearray(torch_path.read_bytes())
    for found in re.finditer(rb"PK\x01\x02", bytes(whole)):
        whole[found.start() + 8] |= 1
    torch_path.write_bytes(whole)
    assert_fault(torch_path, "is encrypted")


def test_a_pickle_that_does_not_fit_its_checksum(torch_path):
    torch_path.write_bytes(torch_path.read_bytes().replace(b"X\1\0\0\0w", b"X\1\0\0\0v"))
    assert_fault(torch_path, "'archive/data.pkl' is damaged")


def test_records_before_the_file(torch_path):
    """A directory that claims to begin later than it does moves every record by as much towards the front."""
    whole = torch_path.read_bytes()
    (begin,) = struct.unpack("<I", whole[-6:-2])
    torch_path.write_bytes(whole[:-6] + struct.pack("<I", begin + len(whole)) + whole[-2:])
    assert_fault(torch_path, "no local header at byte -")


def test_a_record_beyond_the_file(torch_path):
    """A local header whose padding, which the directory does not know, ends past the file."""
    whole = bytearray(torch_path.read_bytes())
    name = whole.index(b"archive/data/0")
    whole[name - 2 : name] = struct.pack("<H", 60_000)
    torch_path.write_bytes(whole)
    assert_fault(torch_path, "'archive/data/0' runs past the end of the file")


def test_a_pickle_that_is_too_large(torch_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 100)
    assert_fault(torch_path, "at most 100 are read")


# --- hostile pickles -------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def put_pickle(path, data: bytes) -> None:
    rewrite(path, lambda name, old: data if name == "data.pkl" else old)


def hostile_values(canary):
    from collections import OrderedDict

    command = f"touch {canary}"
    statement = f"open({str(canary)!r}, 'w')"
    yield "posix.system", Call(os.system, command)
    yield "builtin", Call(eval, statement)
    yield "builtin", {"w": [(Call(exec, statement),)]}
    yield "builtin", Call(OrderedDict, [("w", Call(eval, statement))])
    yield "builtin", Call(getattr, Call(__import__, "os"), "system")


def test_nothing_in_a_pickle_is_executed(torch_path, tmp_path):
    canary = tmp_path / "executed"
    for word, value in hostile_values(canary):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(value, protocol)
            put_pickle(torch_path, data)
            assert_fault(torch_path, *([word] if protocol == 2 else []))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Call(os.system, f"touch {canary}")))
    assert canary.exists(), "the attack of this test is none"


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\x80\2cos\nsystem\n.", "'os.system'"),
        (b"\x80\2ctorch\nload\n.", "'torch.load'"),
        (b"\x80\2ctorch.storage\n_load_from_bytes\n.", "'torch.storage._load_from_bytes'"),
        (b"\x80\2ccollections\nOrderedDict\n(K\1tR.", "calls collections.OrderedDict"),
        (b"\x80\2K\1)R.", "calls int"),
        (b"\x80\2ccollections\nOrderedDict\n}b.", "sets attributes"),
        (b"\x80\2(ios\nsystem\n.", "opcode INST"),
        (b"\x80\2(cos\nsystem\no.", "'os.system'"),
        (b"\x80\2ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\2X\2\0\0\0osX\6\0\0\0system\x93.", "opcode STACK_GLOBAL"),
        (b"\x80\2\x82\1.", "opcode EXT1"),
        (b"\x80\2h\7.", "never made"),
        (b"\x80\2.", "never made"),
        (b"\x80\2u.", "never made"),
        (b"\x80\2K\1\x86.", "never made"),
        (b"\x80\2(K\1u.", "never made"),
        (b"\x80\2\xff.", "malformed"),
        (b"\x80\2}K\1a.", "not a list"),
        (b"\x80\2]K\1K\1s.", "not a dictionary"),
        (b"\x80\2}(K\1u.", "not a dictionary"),
    ],
)
def test_pickles_by_hand(torch_path, data, word):
    put_pickle(torch_path, data)
    assert_fault(torch_path, word)


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is of POSIX")
def test_a_pickle_cannot_ask_for_memory_or_time(torch_path):
    """A memo of 2**32 slots, a string of 2**62 bytes, and a key whose hash doubles its steps with each level."""
    put_pickle(torch_path, b"\x80\2}r\xff\xff\xff\x7f.")
    assert dict(open_checkpoint(torch_path)) == {}
    put_pickle(torch_path, b"\x80\2\x8d" + struct.pack("<Q", 2**62) + b".")
    assert_fault(torch_path, "malformed")
    put_pickle(torch_path, b"\x80\2}" + b")" + b"q\0h\0\x86" * 20 + b"K\1s.")
    assert_fault(torch_path, "neither text nor an integer")


# --- atomicity -------------------------------------------------------------------------------------


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "inner" / "file").read_text() == "new"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(tmp_path, failure):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(failure), atomic_folder(tmp_path / "out", overwrite=True) as partial:  # noqa: PT012
        (partial / "file").write_text("new")
        raise failure
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_failed_rename_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    rename = os.rename

    def fail_into_place(source, target):
        if (source / "file").read_text() == "new":
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_into_place)
    with pytest.raises(OSError, match="no space"), atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "first").write_text("1")
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "second").write_text("2")
        assert names(tmp_path / "out") == ["first"]
    assert names(tmp_path / "out") == ["second"]
    assert names(tmp_path) == ["out"]


def test_an_occupied_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):
        raise AssertionError("entered")
    with pytest.raises(CheckpointError, match="is a file"), atomic_folder(tmp_path / "out" / "file", overwrite=True):
        raise AssertionError("entered")
    monkeypatch.chdir(tmp_path / "out")
    for path in (".", tmp_path):
        with pytest.raises(CheckpointError, match="current directory"), atomic_folder(path, overwrite=True):
            raise AssertionError("entered")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_folder_that_others_made_meanwhile_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not empty"), atomic_folder(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "out"
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(CheckpointError, match="exists"), atomic_file(path):
        raise AssertionError("entered")
    with pytest.raises(CheckpointError, match="is a folder"), atomic_file(tmp_path, overwrite=True):
        raise AssertionError("entered")
    with pytest.raises(RuntimeError), atomic_file(path, overwrite=True) as partial:  # noqa: PT012
        partial.write_text("broken")
        raise RuntimeError
    assert path.read_text() == "new"
    with atomic_file(path, overwrite=True) as partial:
        partial.write_text("newer")
    assert path.read_text() == "newer"
    assert names(tmp_path) == ["out"]


def test_what_appears_has_been_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), fsync(number)))
    with atomic_folder(tmp_path / "out") as partial:
        write_safetensors(partial, sources_of({"w": np.zeros(3)}))
        expected = [(partial / "model.safetensors").stat().st_ino, partial.stat().st_ino]
    assert synced == [*expected, tmp_path.stat().st_ino]


def test_no_framework_is_imported():
    """In a fresh interpreter, for another test may have imported one here."""
    import subprocess

    code = "import sys, mamba_core.weights.io; print({'torch', 'jax', 'mlx'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
