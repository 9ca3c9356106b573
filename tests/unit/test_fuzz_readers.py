"""Readers on broken and hostile files: each is read, or is one line that names it, in bounded memory and time.

What was found here before stands as tests of its own at the end.
"""

import json
import struct
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mamba_core as mc
from mamba_core.spec.init import initial_values
from mamba_core.weights.formats import (
    CheckpointError,
    sources_of,
    write_npz,
    write_safetensors,
    write_safetensors_file,
    write_torch,
)
from mamba_core.weights.formats.pickle import load_pickle
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

ARRAYS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "v": np.ones(3, ml_dtypes.bfloat16), "s": np.array(7.0)}
WRITERS = {"a.safetensors": write_safetensors_file, "a.bin": write_torch, "a.npz": write_npz}
CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16, d_state=2)
MEMORY = 400e6
SECONDS = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def whole(folder):
    """File name -> the bytes of a good file."""
    for name, writer in WRITERS.items():
        writer(folder / name, sources_of(ARRAYS))
    return {name: (folder / name).read_bytes() for name in WRITERS}


@contextmanager
def bounded():
    """No more processor time than SECONDS, and no more memory than MEMORY beyond what there is, else a failure."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (int(used + MEMORY), before[1]))
    started = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - started < SECONDS


def read_or_refuse(path):
    """What the file holds, or None; any other outcome is a failure."""
    with bounded():
        try:
            opened = open_checkpoint(path)
            return {name: opened[name].tobytes() for name in opened}
        except CheckpointError as fault:
            message = str(fault)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 5000
    return None


def mutations():
    """Edits of bytes: (where, as a fraction of the length; how many go; what comes in their place)."""
    numbers = st.sampled_from(
        [b"\xff" * 4, b"\xff" * 8, b"\x00" * 4, struct.pack("<I", 2**31 - 1), b"9" * 30, b"-1", b"1e9"]
    )
    inserted = st.one_of(st.binary(max_size=6), numbers)
    edit = st.tuples(st.floats(0, 1), st.integers(0, 40), inserted)
    return st.lists(edit, min_size=1, max_size=4)


def mutate(data: bytes, edits) -> bytes:
    for where, removed, inserted in edits:
        at = int(where * len(data))
        data = data[:at] + inserted + data[at + removed :]
    return data


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_the_files_that_are_mutated_are_good(folder, whole, name):
    (folder / name).write_bytes(whole[name])
    assert read_or_refuse(folder / name) == {key: array.tobytes() for key, array in ARRAYS.items()}


@pytest.mark.parametrize("name", WRITERS)
@given(edits=mutations())
def test_edited_bytes(folder, whole, name, edits):
    (folder / name).write_bytes(mutate(whole[name], edits))
    read_or_refuse(folder / name)


@given(edits=mutations())
def test_an_edited_header_of_safetensors(folder, whole, edits):
    """The length is made right again, so that what is edited is parsed."""
    data = whole["a.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header = mutate(data[8 : 8 + length], edits)
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    read_or_refuse(folder / "a.safetensors")


HUGE = "an integer of more digits than Python reads"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16", "F8_E4M3", "U64", HUGE]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def dump_json(value) -> bytes:
    return json.dumps(value).replace(json.dumps(HUGE), "9" * 5000).encode()


@given(key=st.sampled_from(["dtype", "shape", "data_offsets", "more"]), value=json_values)
def test_any_value_in_a_header_of_safetensors(folder, key, value):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | {key: value}
    text = dump_json({"w": entry})
    (folder / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    read_or_refuse(folder / "a.safetensors")


@given(value=json_values)
def test_any_value_in_an_index(folder, value):
    path = folder / "model.safetensors.index.json"
    path.write_bytes(dump_json({"weight_map": value}))
    read_or_refuse(path)


@given(edits=mutations())
def test_an_edited_index(folder, edits):
    write_safetensors(folder / "shards", sources_of(ARRAYS), shard_bytes=10)
    path = folder / "shards" / "model.safetensors.index.json"
    path.write_bytes(mutate(path.read_bytes(), edits))
    read_or_refuse(path)


@given(edits=mutations())
def test_an_edited_pickle(folder, whole, edits):
    """The zip and its checksums are made right again."""
    (folder / "b.bin").write_bytes(whole["a.bin"])
    with zipfile.ZipFile(folder / "b.bin") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records["archive/data.pkl"] = mutate(records["archive/data.pkl"], edits)
    with zipfile.ZipFile(folder / "b.bin", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    read_or_refuse(folder / "b.bin")


OPCODES = [
    *(b"\x80\x02", b"N", b"\x88", b"\x89", b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e"),
    *(b"s", b"u", b"R", b"b", b"Q", b"0", b"2", b"1", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f"),
    *(b"K\x01", b"J\xff\xff\xff\xff", b"J\x02\x00\x00\x00", b"X\x01\x00\x00\x00w", b"X\x07\x00\x00\x00storage"),
    *(b"\x8a\x01\x05", b"\x8a\xff" + b"\x7f" * 255, b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"cos\nsystem\n"),
    *(b"\x81", b"cargparse\nNamespace\n", b"cpathlib\nPath\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"),
    *(b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n", b"ctorch\nbfloat16\n"),
]


@given(parts=st.lists(st.sampled_from(OPCODES), max_size=40))
def test_any_sequence_of_opcodes(parts):
    message = ""
    with bounded():
        try:
            load_pickle(b"\x80\x02" + b"".join(parts) + b".")
        except ValueError as fault:
            message = str(fault)
    assert "\n" not in message


# --- configs ---------------------------------------------------------------------------------------


def write_checkpoint(folder, layout):
    folder.mkdir(exist_ok=True)
    write_model(folder, CONFIG, dict(initial_values(CONFIG)), layout=layout, dtype="float32")
    return json.loads((folder / "config.json").read_text())


def open_or_refuse(path):
    with bounded():
        try:
            return open_model(path)
        except ValueError as fault:
            message = str(fault)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 5000
    return None


@pytest.mark.parametrize("layout", ["hf", "mamba_ssm", "mambapy", "mlx_lm"])
@given(data=st.data())
def test_any_value_in_a_config(folder, layout, data):
    path = folder / layout
    fields = write_checkpoint(path, layout)
    assert open_or_refuse(path).config.d_model == 8
    for key in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=2)):
        fields[key] = data.draw(json_values)
    (path / "config.json").write_bytes(dump_json(fields))
    open_or_refuse(path)


TOKEN_FILES = ("generation_config.json", "tokenizer_config.json", "added_tokens.json", "tokenizer.json", "vocab.json")
TOKEN_KEYS = ("eos_token_id", "bos_token", "eos_token", "added_tokens_decoder", "added_tokens", "model", "content")


@given(data=st.data())
def test_any_value_in_the_files_of_tokens(folder, data):
    path = folder / "tokens"
    write_checkpoint(path, "mamba_ssm")
    for name in TOKEN_FILES:
        keys = st.sampled_from(TOKEN_KEYS) | st.text(max_size=2)
        fields = {"eos_token": "a"} | data.draw(st.dictionaries(keys, json_values, max_size=3))
        (path / name).write_bytes(dump_json(fields))
    open_or_refuse(path)


@given(data=st.data())
def test_any_value_in_the_settings_of_a_quantisation(folder, data):
    path = folder / "quantised"
    fields = write_checkpoint(path, "mlx_lm")
    name = "backbone.layers.0.mixer.in_proj"
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 32]), max_size=3)
    arrays = dict(open_checkpoint(path))
    arrays[f"{name}.weight"] = np.zeros(data.draw(shapes), np.uint32)
    for end in ("scales", "biases"):
        arrays[f"{name}.{end}"] = np.zeros(data.draw(shapes), np.float32)
    write_safetensors_file(path / "new.safetensors", sources_of(arrays), metadata={"format": "mlx"})
    (path / "new.safetensors").replace(path / "model.safetensors")
    settings = {"group_size": 4, "bits": 4} | data.draw(
        st.dictionaries(st.sampled_from(["group_size", "bits", "mode", name]), json_values, max_size=2)
    )
    (path / "config.json").write_bytes(dump_json(fields | {"quantization": settings}))
    open_or_refuse(path)


# --- what was found --------------------------------------------------------------------------------


def test_names_of_a_hostile_file_cannot_break_the_line(folder):
    path = folder / "names"
    fields = write_checkpoint(path, "mamba_ssm")
    (path / "config.json").write_text(json.dumps(fields | {"ssm_cfg": {"a\nb\x1b[2J\u2028\ud800": None}}))
    with pytest.raises(CheckpointError, match=r"a\\nb\\x1b\[2J\\u2028\\ud800$"):
        open_model(path)


def test_a_message_has_an_end(folder):
    path = folder / "long"
    fields = write_checkpoint(path, "mamba_ssm")
    (path / "config.json").write_text(json.dumps(fields | {"ssm_cfg": {"a" * 10**6: None}}))
    assert open_or_refuse(path) is None


def test_a_tensor_that_repeats_itself_cannot_claim_more_than_the_file(folder):
    """A stride of zero: 10 GB in a file of 1 KB."""
    path = folder / "repeated.bin"
    write_torch(path, sources_of({"w": np.ones(1, np.float32)}))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    old, new = b"(J\1\0\0\0t(J\1\0\0\0t", b"(" + b"J" + struct.pack("<i", 2**31 - 1) + b"t(J\0\0\0\0t"
    assert records["archive/data.pkl"].count(old) == 1
    records["archive/data.pkl"] = records["archive/data.pkl"].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=r"'w': it claims 8589934588 bytes, more than the whole file has"):
        open_checkpoint(path)


def test_a_config_of_a_billion_layers(folder):
    path = folder / "deep"
    fields = write_checkpoint(path, "hf")
    (path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 10**9}))
    assert open_or_refuse(path) is None
