"""Work of the readers is bound by a file's size: a second a megabyte at most, and 80 bytes a byte of text beside 64 MB.

Each file is of a kind that took quadratic time, or memory without a bound, or might. All are of a megabyte or so.
"""

import gc
import json
import struct
import zipfile
from pathlib import Path

import pytest

from mamba_core.weights.formats import CheckpointError
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model

from .timing import timed

SECONDS_A_MEGABYTE = 1.0
BYTES_A_BYTE = 80
CONSTANT = 64e6
MEGABYTE = 2**20


def safetensors(header: bytes):
    return lambda folder: (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def entries(*names: str):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return safetensors(json.dumps(dict.fromkeys(names, empty)).encode())


def pickled(code: bytes):
    def write(folder):
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\2" + code + b".")

    return write


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def keys(values) -> bytes:
    return b"}(" + b"".join(integer(value) + b"N" for value in values) + b"u"


def index(weight_map: dict):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def zipped(count: int):
    """Records without bytes, all at one place."""

    def write(folder):
        record = struct.Struct("<4s6H3L5H2L")
        fields = (b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0)
        directory = b"".join(record.pack(*fields) + b"%08d.npy" % number for number in range(count))
        end = b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, len(directory), 0)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, len(directory), 1)
        end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 0, 0)
        (folder / "weights.npz").write_bytes(directory + end)

    return write


def layers(folder):
    """As many layers as tensors, of which each layer has ten."""
    names = ["backbone.embeddings.weight", "backbone.layers.0.mixer.conv1d.weight"]
    entries(*names, *(f"backbone.layers.{layer}.norm.weight" for layer in range(12000)))(folder)
    config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 12000, "vocab_size": 16, "state_size": 2}
    (folder / "config.json").write_text(json.dumps(config))


def tokens(folder):
    """A tokenizer of which every file is read for the id of one token."""
    names = ["backbone.embeddings.weight", "backbone.layers.0.mixer.conv1d.weight"]
    entries(*names)(folder)
    config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "state_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "none"}')
    vocabulary = {f"token{number}": number for number in range(50000)}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": vocabulary}}))


HASH = 2**61 - 1  # integers that differ by it have one hash
CASES = {
    "integer keys of one hash": pickled(keys(HASH * number for number in range(1, 40000))),
    "integer keys of one slot": pickled(keys(number << 40 for number in range(1, 60000))),
    "a memo of one slot": pickled(b"N" + b"".join(b"r" + struct.pack("<I", i << 18) for i in range(2**14)) * 10),
    "opcodes of one byte": pickled(b"N" * MEGABYTE),
    "dictionaries": pickled(b"}" * MEGABYTE),
    "lists": pickled(b"]" * MEGABYTE),
    "marks": pickled(b"(" * MEGABYTE),
    "tuples in tuples": pickled(b")" + b"\x85" * MEGABYTE),
    "globals": pickled(b"ctorch\nSize\n" * (MEGABYTE // 12)),
    "objects in JSON": safetensors(b'{"a":[' + b"{}," * (MEGABYTE // 3) + b"{}]}"),
    "lists in JSON": safetensors(b'{"a":[' + b"[]," * (MEGABYTE // 3) + b"[]]}"),
    "lists in lists in JSON": safetensors(b'{"a":' + b"[" * MEGABYTE + b"]" * MEGABYTE + b"}"),
    "digits": safetensors(b'{"a":[' + (b"9" * 4200 + b",") * 250 + b"1]}"),
    "digits of a fraction": safetensors(b'{"a":0.' + b"9" * MEGABYTE + b"}"),
    "a key again and again": safetensors(b"{" + b'"a":1,' * (MEGABYTE // 6) + b'"b":1}'),
    "many tensors": entries(*map(str, range(20000))),
    "long names": entries(*(f"{'x' * 200}{number}" for number in range(4000))),
    "names of many words": entries(*(f"{'a.' * 300}{number}" for number in range(1500))),
    "names in many wrappers": entries(*(f"{'module.' * 100}{number}.w" for number in range(1500))),
    "missing shards": index({str(number): f"s{number}" for number in range(50000)}),
    "shards that differ in case": index({str(i): ("A" if i & 1 else "a") + str(i >> 1) for i in range(50000)}),
    "records at one place": zipped(20000),
    "layers": layers,
    "tokens": tokens,
}


@pytest.mark.parametrize("case", CASES)
def test_time_memory_and_message(tmp_path, case):
    resource = pytest.importorskip("resource")
    CASES[case](tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (int(used + CONSTANT + BYTES_A_BYTE * size), before[1]))
    # What other tests have left in this process is not the readers' to collect.
    gc.collect()
    gc.freeze()
    bound = SECONDS_A_MEGABYTE * size / 1e6
    try:
        message, seconds = timed(lambda: refusal(tmp_path), bound)
    finally:
        gc.unfreeze()
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "more memory" not in message
    assert len(message.encode()) <= 2000
    assert seconds < bound, f"{seconds / size * 1e6:.2f} seconds a megabyte"


def refusal(folder) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    return str(caught.value)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("case", ["lists", "a list in JSON"])
def test_no_garbage_is_looked_for_while_a_file_is_read(tmp_path, case, enabled):
    """Each search visits all that the file has made so far, and calls whom other packages have bound to it."""
    many = 50_000
    write = {"lists": pickled(b"]" * many), "a list in JSON": safetensors(b'{"a":[' + b"{}," * many + b"{}]}")}
    write[case](tmp_path)
    searches = []
    gc.callbacks.append(lambda phase, _: searches.append(phase))
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        refusal(tmp_path)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
        gc.callbacks.pop()
    # A search a 700 objects otherwise; what stands around the reading may have some.
    assert searches.count("start") < many / 700 / 5


def test_tensors_cannot_repeat_a_file_without_end(tmp_path):
    """Each tensor may share the bytes of others, as tied weights do, and all of them do not claim a hundred files."""
    torch = pytest.importorskip("torch")
    base = torch.ones(10000)
    torch.save({str(number): base for number in range(50)}, tmp_path / "a.pt")
    assert sum(array.size for array in open_checkpoint(tmp_path / "a.pt").values()) == 500_000
    torch.save({str(number): base[::999] for number in range(3)}, tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt")["2"].tolist() == [1.0] * 11
    torch.save({str(number): base[::999] for number in range(200)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="share bytes so often that they have"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_view_of_a_few_elements_does_not_keep_what_lies_between(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.arange(10000.0)[::999]}, tmp_path / "a.pt")
    array = open_checkpoint(tmp_path / "a.pt")["w"]
    assert (array if array.base is None else array.base).nbytes == 4 * 11
