""".npz files: NumPy, MLX and we read each other; a compressed, pickled or broken one is one clear error."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mamba_core.weights.formats import CheckpointError, sources_of, write_npz
from mamba_core.weights.io import open_checkpoint

from .checkpoints import assert_fault, assert_same, example_arrays


def readable() -> dict[str, np.ndarray]:
    return {name: np.array(array, order="C") for name, array in example_arrays().items() if "float8" not in name}


def test_what_is_written_is_read_back_by_us_and_by_numpy(tmp_path):
    arrays = readable()
    write_npz(tmp_path / "a.npz", sources_of(arrays))
    opened = open_checkpoint(tmp_path / "a.npz")
    assert_same(opened, arrays)
    assert not opened["float32"].flags.writeable
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
    loaded = np.load(tmp_path / "a.npz", allow_pickle=False)
    for name, array in arrays.items():
        assert loaded[name].tobytes() == array.tobytes()
        assert loaded[name].shape == array.shape


def test_what_numpy_writes(tmp_path):
    arrays = readable() | {"columns": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))}
    np.savez(tmp_path / "a.npz", **arrays)
    assert_same(open_checkpoint(tmp_path / "a.npz"), arrays)


def test_mlx_and_we_read_each_other(tmp_path):
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2)).astype(np.float32)
    dtypes = (mx.float32, mx.float16, mx.bfloat16)
    theirs = {str(dtype).removeprefix("mlx.core."): mx.array(values).astype(dtype) for dtype in dtypes}
    mx.savez(str(tmp_path / "theirs.npz"), **theirs, turned=mx.array(values).T)
    opened = open_checkpoint(tmp_path / "theirs.npz")
    assert set(opened) == {*theirs, "turned"}
    for name in theirs:
        assert_same({name: opened[name]}, {name: values.astype(getattr(ml_dtypes, name, name))})
    assert_same({"turned": opened["turned"]}, {"turned": values.T})
    write_npz(tmp_path / "ours.npz", sources_of(opened))
    loaded = mx.load(str(tmp_path / "ours.npz"))
    for name, array in theirs.items():
        assert loaded[name].dtype == array.dtype
        assert mx.array_equal(loaded[name], array)


def test_a_dtype_that_npz_has_not(tmp_path):
    arrays = {"w": np.zeros(2, ml_dtypes.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"\.npz has no dtype for 'w'"):
        write_npz(tmp_path / "a.npz", sources_of(arrays))
    assert not (tmp_path / "a.npz").exists()


def npy(array, **header) -> bytes:
    file = io.BytesIO()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue() + array.tobytes()


def write_records(path, **records: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name.replace("_", "."), data)
    return path


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "not an array"),
        (b"\x93NUMPI" + npy(np.zeros(2))[6:], "not an array"),
        (b"\x93NUMPY\x03\x00\x00\x00\x00\x00", "version (3, 0)"),
        (npy(np.zeros(2))[:40], "header is 118 bytes long, more than its record"),
        (npy(np.zeros(2), descr="<f9"), "dtype '<f9' is not read"),
        (npy(np.zeros(2), shape=(-2,)), "header is not that of an array"),
        (npy(np.zeros(2), shape=(3,)), "is 24 bytes, but there are 16"),
        (npy(np.zeros(2), shape=(2**40, 2**40)), "too large"),
        (npy(np.zeros(2), descr=">f8"), "dtype '>f8' is not read"),
        (npy(np.zeros(2), descr="|O"), "dtype '|O' is not read"),
        (npy(np.zeros(2), descr=[("a", "<f8")]), "header is not that of an array"),
        (npy(np.zeros(2), descr="<c16"), "dtype '<c16' is not read"),
        (npy(np.zeros(2)) + b"x", "is 16 bytes, but there are 17"),
        (b"\x93NUMPY\x01\x00\xff\x0f" + b"(" * 4095, "header is not that of an array"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "header is 4294967295 bytes long"),
    ],
)
def test_faults_of_a_record(tmp_path, data, word):
    assert_fault(write_records(tmp_path / "a.npz", w_npy=data), "tensor 'w'", word)


def test_faults_of_the_zip(tmp_path):
    assert_fault(write_records(tmp_path / "a.npz", w_txt=b"x"), "'w.txt'", "no array NAME.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("w.npy", npy(np.zeros(2)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("w.npy", npy(np.zeros(2)))
    assert_fault(tmp_path / "b.npz", "'w.npy' is there twice")
    np.savez_compressed(tmp_path / "c.npz", w=np.zeros(2**20))
    assert_fault(tmp_path / "c.npz", "'w.npy' is compressed", "np.savez")
    np.savez(tmp_path / "d.npz", w=np.array([{}], dtype=object))
    assert_fault(tmp_path / "d.npz", "tensor 'w'", "is not read")
    (tmp_path / "e.npz").write_bytes(b"PK not a zip")
    assert_fault(tmp_path / "e.npz", "zip")


def test_a_file_cut_short_or_changed_anywhere(tmp_path):
    write_npz(tmp_path / "a.npz", sources_of({"w": np.arange(6.0).reshape(2, 3), "v": np.ones(3, np.float32)}))
    whole = (tmp_path / "a.npz").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "a.npz").write_bytes(whole[:length])
        assert_fault(tmp_path / "a.npz", "cut short" if length else "empty")
    random, messages = np.random.default_rng(0), []
    for _ in range(500):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] = random.integers(256)
        (tmp_path / "a.npz").write_bytes(changed)
        try:
            for array in open_checkpoint(tmp_path / "a.npz").values():
                array.tobytes()
        except CheckpointError as fault:
            messages.append(str(fault))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
