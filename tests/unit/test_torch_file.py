"""Torch's files: what torch saves is read, and a broken or hostile one is one clear error."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest

from mamba_core.weights.formats import torch as torch_file
from mamba_core.weights.formats import zip as zip_file
from mamba_core.weights.formats.base import count_bytes
from mamba_core.weights.formats.files import InputFile
from mamba_core.weights.formats.pickle import load_pickle
from mamba_core.weights.io import open_checkpoint

from .checkpoints import assert_fault, write
from .timing import timed

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


def stored_arrays() -> dict[str, np.ndarray]:
    blocks = np.arange(2**19 + 3, dtype=np.float64)
    return {"w": blocks, "empty": np.zeros((0, 3), np.float32), "odd": np.arange(7, dtype=np.int8), "v": blocks[::-1]}


def test_every_record_is_aligned_and_has_the_checksum_of_its_bytes_in_both_headers(tmp_path):
    write(tmp_path / "a.bin", stored_arrays())
    whole = (tmp_path / "a.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        assert archive.testzip() is None
        for record in archive.infolist():
            assert zip_file.record_start(whole, record) % 64 == 0
            local = struct.unpack_from("<3I", whole, record.header_offset + 14)
            assert local == (record.CRC, record.file_size, record.file_size)


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = stored_arrays()
    write(tmp_path / "a.bin", arrays)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "a.bin", weights_only=True, mmap=mapped)
        assert {name: tensor.numpy().tobytes() for name, tensor in loaded.items()} == {
            name: array.tobytes() for name, array in arrays.items()
        }


def test_records_beyond_4_gib_and_beyond_65535(tmp_path):
    """A sparse record, whose size needs 64 bits, as its successors' places do; then too many for 16 bits."""
    size = 2**32 + 5

    def skip(file):
        file.seek(size - 1, os.SEEK_CUR)
        file.write(b"x")
        return 7

    def hello(file):
        file.write(b"hello")
        return zlib.crc32(b"hello")

    path = tmp_path / "a.zip"
    zip_file.write_zip(path, [zip_file.Record("large", size, skip), zip_file.Record("next", 5, hello)])
    with zipfile.ZipFile(path) as archive:
        large, after = archive.infolist()
        assert (large.file_size, large.CRC, archive.read(after)) == (size, 7, b"hello")
        assert after.header_offset > size
        file = InputFile(path)
        start = zip_file.record_start(file, large)
        assert file[start + size - 1 : start + size] == b"x"
    zip_file.write_zip(path, (zip_file.Record(str(number), 5, hello) for number in range(2**16 + 1)))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 2**16 + 1
        assert archive.read("65536") == b"hello"
    whole = path.read_bytes()
    # zipfile does not look at the number of records, other readers do.
    assert struct.unpack_from("<2Q", whole, whole.rindex(b"PK\6\6") + 24) == (2**16 + 1, 2**16 + 1)


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


def beside_the_weights(torch) -> dict:
    """What training scripts keep, of every harmless class."""
    return {
        "args": argparse.Namespace(out=pathlib.PurePosixPath("/a"), device=torch.device("cuda", 1), lr=0.1),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "other_dtype": torch.complex64,
        "path": pathlib.Path("a") / "b",
        "windows": pathlib.PureWindowsPath("a"),
        "best": np.float64(0.5),
        "half": np.float16(0.5),
        "flag": np.bool_(True),
        "random": np.random.RandomState(0).get_state(),
        "epoch": 3,
        "ordered": collections.OrderedDict(a=1),
    }


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt"])
@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "module", "ema"])
def test_the_weights_of_a_training_checkpoint(tmp_path, name, entry):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 3)
    flat = {"exp_avg.weight": torch.zeros(3, 2)}
    beside = beside_the_weights(torch) | {"optimizer_states": [{"state": {0: flat}}], "moments": flat}
    torch.save({entry: model.state_dict()} | beside, tmp_path / name)
    opened = open_checkpoint(tmp_path / name)
    assert {key: array.tolist() for key, array in opened.items()} == {
        key: tensor.tolist() for key, tensor in model.state_dict().items()
    }
    assert opened.skipped == tuple(beside)


def test_an_entry_in_an_entry(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.ones(2)
    torch.save({"ema": {"module": {"w": x}, "decay": 0.9}, "step": 1}, tmp_path / "a.pt")
    opened = open_checkpoint(tmp_path / "a.pt")
    assert list(opened) == ["w"]
    assert opened.skipped == ("step", "ema.decay")
    torch.save({"ema": {"shadow": {"w": x}}, "optimizer": {"state": {"w": x}}}, tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt").skipped == ("optimizer",)
    torch.save({"ema": {"module": {"w": x}}, "state_dict": {"w": x}}, tmp_path / "a.pt")
    assert_fault(tmp_path / "a.pt", "found 'ema.module', 'state_dict'", "['ema']['module'], 'weights.pt')")


@pytest.mark.parametrize("value", [pathlib.Path, complex(1), {1}, type, slice(1), collections.Counter("a")])
def test_other_classes_beside_the_weights_are_refused_by_name(tmp_path, value):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"w": torch.ones(2)}, "more": {"value": value}}, tmp_path / "a.pt")
    if value is pathlib.Path:  # a name alone does nothing
        assert list(open_checkpoint(tmp_path / "a.pt")) == ["w"]
    else:
        assert_fault(tmp_path / "a.pt", "the pickle asks for", "which is not executed; save the weights alone")


def test_what_is_dropped_is_never_made(monkeypatch):
    """Neither a path nor a namespace nor a dtype is made of the arguments that a file gives."""
    parts = [
        b"\x80\2]cpathlib\nPosixPath\n(X\1\0\0\0/tRa",
        b"cargparse\nNamespace\n)\x81}X\1\0\0\0aK\1sba",
        b"cnumpy\ndtype\n(X\2\0\0\0f4tRa.",
    ]
    with monkeypatch.context() as patched:
        for owner, name in ((argparse, "Namespace"), (pathlib, "PosixPath"), (np, "dtype")):
            patched.setattr(owner, name, None)
        found = load_pickle(b"".join(parts))
    assert [value.kind for value in found] == ["pathlib.PosixPath", "argparse.Namespace", "numpy.dtype"]


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda x: x, "holds a PickledTensor"),
        (lambda x: [x], "holds a list"),
        (lambda x: {"step": 3}, "found none among 'step'"),
        (lambda x: {"model": {"w": x}, "ema": {"w": x}}, "found 'model', 'ema'"),
        (lambda x: {"model": {"w": x}, "ema": {"w": x}}, "torch.load(path, weights_only=True)['model'], 'weights.pt')"),
        (
            lambda x: {"student": {"w": x}, "teacher": {"w": x}},
            "found 'student', 'teacher'; save the one that is meant",
        ),
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


def test_a_record_that_its_own_header_names_otherwise_is_refused(torch_path):
    """The name before a record's bytes, in a file without checksums, is all that tells whose bytes they are."""
    data = torch_path.read_bytes()
    begin = data.index(b"archive/data/0")
    torch_path.write_bytes(data[:begin] + b"archive/data/1" + data[begin + 14 :])
    assert_fault(torch_path, "'archive/data/0' is named b'archive/data/1'")


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
        (b"\x80\2})\x81.", "opcode NEWOBJ"),
        (b"\x80\2cargparse\nNamespace\n]\x81.", "opcode NEWOBJ"),
        (b"\x80\2cargparse\nNamespace\n]R.", "calls argparse.Namespace"),
        (b"\x80\2)\x81.", "never made"),
        (b"\x80\2cpathlib\nos\n.", "'pathlib.os'"),
        (b"\x80\2cnumpy\nload\n.", "'numpy.load'"),
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
    """A memo of 2**32 slots, strings of 2**32 and 2**62 bytes, and a key whose hash doubles its steps each level."""
    put_pickle(torch_path, b"\x80\2}r\xff\xff\xff\x7f.")
    assert_fault(torch_path, "malformed")
    put_pickle(torch_path, b"\x80\2X" + struct.pack("<I", 2**32 - 1) + b".")
    assert_fault(torch_path, "malformed")
    put_pickle(torch_path, b"\x80\2\x8d" + struct.pack("<Q", 2**62) + b".")
    assert_fault(torch_path, "opcode BINUNICODE8")
    put_pickle(torch_path, b"\x80\2}" + b")" + b"q\0h\0\x86" * 20 + b"K\1s.")
    assert_fault(torch_path, "neither text nor an integer")


def test_a_shape_of_shared_tuples_is_not_written_out():
    """Each level names the one below twice: 24 of them are a text of 64 MB."""
    nested = ()
    for _ in range(24):
        nested = (nested, nested)

    def refused():
        with pytest.raises(ValueError, match="not a non-negative integer"):
            count_bytes((nested,), "float32")

    # Written out it takes seconds, and named a hundred microseconds.
    assert timed(refused, 0.2)[1] < 0.2
