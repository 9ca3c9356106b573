"""Checkpoint files: we and others read what is written; a broken one is one clear error."""

import json
import os
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mamba_core.weights.formats import (
    CheckpointError,
    TensorSource,
    atomic_file,
    sources_of,
    write_safetensors,
    write_safetensors_file,
    write_torch,
)
from mamba_core.weights.formats import torch as torch_file
from mamba_core.weights.io import open_checkpoint

from .checkpoints import assert_fault, assert_same, example_arrays, write

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


def test_opening_loads_nothing_and_indexing_one_tensor(tmp_path):
    """A sparse file of 64 GiB."""
    elements = 2**34
    header = {
        "x": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]},
        "y": {"dtype": "F32", "shape": [1], "data_offsets": [4 * elements, 4 * elements + 4]},
    }
    path = write_raw(tmp_path / "a.safetensors", header, b"")
    os.truncate(path, path.stat().st_size + 4 * elements + 4)
    opened = open_checkpoint(path)
    assert opened.header("x") == ((elements,), "float32", 4 * elements)
    assert opened["y"].tolist() == [0]
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
def test_a_pass_over_a_file_does_not_keep_its_pages(tmp_path):
    write(tmp_path / "a.safetensors", {str(number): np.zeros(2**21) for number in range(8)})
    opened = open_checkpoint(tmp_path / "a.safetensors")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    for array in opened.values():
        assert array.sum() == 0
        assert resident() - before < 2.5 * array.nbytes


def test_the_same_bytes(tmp_path):
    large = np.arange(2**18, dtype=np.float64)
    other = large.copy()
    other[-1] = 0
    arrays = {"a": large, "same": large, "other": other, "shape": large[None], "dtype": large.view(np.int64)}
    arrays |= {"zero": np.zeros(2), "negative": -np.zeros(2), "nan": np.full(2, np.nan), "nans": np.full(2, np.nan)}
    write(tmp_path / "a.safetensors", arrays)
    opened = open_checkpoint(tmp_path / "a.safetensors")
    pairs = [("a", "same", True), ("a", "other", False), ("a", "shape", False), ("a", "dtype", False)]
    for first, second, same in [*pairs, ("zero", "negative", False), ("nan", "nans", True)]:
        assert opened.have_same_bytes(first, second) is same, (first, second)


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


def test_shards_whose_names_differ_in_case_only(tmp_path):
    """On a disk that does not tell them apart they are one file."""
    write(tmp_path / "a.safetensors", {"w": np.zeros(1)})
    write(tmp_path / "A.safetensors", {"v": np.zeros(1)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": "A.safetensors"}}))
    assert_fault(index, "differ in case only: 'A.safetensors', 'a.safetensors'")


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
    (tmp_path / "a.gguf").write_bytes(b"x")
    assert_fault(tmp_path / "absent.bin", "no such file or folder")
    assert_fault(tmp_path, "holds none of model.safetensors")
    assert_fault(tmp_path / "a.gguf", "unknown kind of file")


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


def test_metadata_that_is_null(tmp_path):
    """As MLX writes it where it is given none."""
    opened = open_checkpoint(write_raw(tmp_path / "a.safetensors", {"__metadata__": None, "w": entry()}, bytes(8)))
    assert opened["w"].tolist() == [0, 0]
    assert opened.metadata == {"format": "mlx"}
    mx = pytest.importorskip("mlx.core")
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {"w": mx.ones(3)})
    assert b'"__metadata__":null' in (tmp_path / "b.safetensors").read_bytes()
    assert open_checkpoint(tmp_path / "b.safetensors")["w"].tolist() == [1, 1, 1]


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


def test_no_framework_is_imported():
    """In a fresh interpreter, for another test may have imported one here."""
    import subprocess

    code = "import sys, mamba_core.weights.io; print({'torch', 'jax', 'mlx'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
