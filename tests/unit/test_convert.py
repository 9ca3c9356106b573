"""The converter: what it writes, says and refuses, and what is left when it is stopped, killed or out of space."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib

import ml_dtypes
import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.init import initial_values
from mamba_core.spec.params import parameter_table
from mamba_core.weights import verify
from mamba_core.weights.formats import CheckpointError, TensorSource
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_layout, write_model

CONFIG = mc.MambaConfig(d_model=16, n_layer=2, vocab_size=40, d_state=4)
A_LOG = "backbone.layers.0.mixer.A_log"
EMBEDDING = "backbone.embeddings.weight"
NORM = "backbone.norm_f.weight"


def values(dtype: str = "float32") -> dict[str, np.ndarray]:
    """Initial values, every one in that dtype, A_log too."""
    return {name: value.astype(np.dtype(dtype)) for name, value in initial_values(CONFIG)}


def write_source(folder, arrays, config=CONFIG):
    folder.mkdir()
    sources = [TensorSource(name, array.shape, array.dtype.name, lambda a=array: a) for name, array in arrays.items()]
    write_layout(folder, config, sources, "hf")
    return folder


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source", values())


def left(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what it says ----------------------------------------------------------------------------------


def test_the_report_has_a_row_for_every_tensor_with_the_checksum_of_its_bytes(source, tmp_path):
    done = mc.convert(source, tmp_path / "out", to="mamba_ssm")
    written = open_checkpoint(tmp_path / "out")
    assert [row.target for row in done.tensors] == list(written)
    for row in done.tensors:
        array = written[row.target]
        assert row.checksum == f"{zlib.crc32(array.tobytes()):08x}"
        assert (row.shape, row.source_dtype, row.dtype) == (array.shape, "float32", "float32")
    names = {row.target: row.source for row in done.tensors}
    assert names["backbone.embedding.weight"] == names["lm_head.weight"] == EMBEDDING
    assert done.nbytes == sum(array.nbytes for array in written.values())
    assert json.loads(done.to_json())["tensors"][0]["checksum"] == done.tensors[0].checksum
    assert (done.source_layout, done.target_layout) == ("hf", "mamba_ssm")


@pytest.mark.parametrize("to", ["mambapy", "mambapy_mlx"])
def test_the_report_has_the_checksums_in_zip_files_too(source, tmp_path, to):
    done = mc.convert(source, tmp_path / "out", to=to)
    written = open_checkpoint(tmp_path / "out")
    assert {row.target: row.checksum for row in done.tensors} == {
        name: f"{zlib.crc32(array.tobytes()):08x}" for name, array in written.items()
    }


def test_the_report_names_transforms(source, tmp_path):
    done = mc.convert(source, tmp_path / "out", to="mlx_lm")
    transformed = {row.target: row.transform for row in done.tensors if row.transform}
    assert transformed == {
        f"backbone.layers.{layer}.mixer.conv1d.weight": "as is -> (e,1,k) as (e,k,1)" for layer in range(2)
    }


@pytest.mark.parametrize("to", ["hf", "mamba_ssm", "mambapy_mlx"])
def test_progress_counts_bytes_up_to_all_of_them(source, tmp_path, to):
    seen = []
    done = mc.convert(source, tmp_path / "out", to=to, progress=lambda *counts: seen.append(counts))
    assert seen[-1][0] == done.nbytes
    assert {total for _, total in seen} == {done.nbytes}
    assert [count for count, _ in seen] == sorted({count for count, _ in seen})
    assert len(seen) == len(done.tensors)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_counted(tmp_path, dtype, bad):
    arrays = values(dtype)
    arrays[NORM][3] = bad
    arrays[EMBEDDING][:2, 5] = bad
    write_source(tmp_path / "source", arrays)
    done = mc.convert(tmp_path / "source", tmp_path / "out", to="hf")
    assert done.nonfinite == {EMBEDDING: 2, NORM: 1}
    assert mc.inspect(tmp_path / "source", values=True).nonfinite == {EMBEDDING: 2, NORM: 1}
    assert mc.inspect(tmp_path / "source").nonfinite is None


def test_finite_values_are_not_counted(source, tmp_path):
    done = mc.convert(source, tmp_path / "out", to="hf")
    assert done.nonfinite == {}
    assert mc.inspect(source, values=True).nonfinite == {}


def test_the_tokenizer_comes_along(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    mc.convert(source, tmp_path / "out", to="hf")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# --- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_without_a_dtype_bytes_are_kept(tmp_path, dtype):
    arrays = values(dtype)
    write_source(tmp_path / "source", arrays)
    mc.convert(tmp_path / "source", tmp_path / "out", to="hf")
    for name, array in open_model(tmp_path / "out").tensors():
        assert array.dtype == arrays[name].dtype
        assert array.tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float64", "float32")]
)
def test_a_cast_that_rounds_must_be_allowed(tmp_path, stored, dtype):
    arrays = values(stored)
    write_source(tmp_path / "source", arrays)
    with pytest.raises(ValueError, match=rf"{stored} to {dtype} rounds the values of \d+ tensors.*--lossy"):
        mc.convert(tmp_path / "source", tmp_path / "out", to="hf", dtype=dtype)
    assert left(tmp_path) == ["source"]
    done = mc.convert(tmp_path / "source", tmp_path / "out", to="hf", dtype=dtype, lossy=True)
    table = parameter_table(CONFIG)
    for name, array in open_model(tmp_path / "out").tensors():
        expected = arrays[name].astype(np.dtype(table[name].dtype(dtype)))
        assert array.dtype == expected.dtype
        assert array.tobytes() == expected.tobytes()
    assert {(row.source_dtype, row.dtype) for row in done.tensors} == {(stored, dtype), (stored, "float32")}


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_cast_that_widens_is_exact(tmp_path, stored):
    arrays = values(stored)
    write_source(tmp_path / "source", arrays)
    mc.convert(tmp_path / "source", tmp_path / "out", to="hf", dtype="float32")
    for name, array in open_model(tmp_path / "out").tensors():
        assert array.dtype == np.float32
        assert array.astype(arrays[name].dtype).tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize(("value", "dtype"), [(-70000.0, "float16"), (3.4e38, "bfloat16"), (1e300, "float32")])
def test_a_value_beyond_the_dtype_is_an_error(tmp_path, value, dtype):
    arrays = values("float64" if value == 1e300 else "float32")
    arrays[NORM][2] = value
    write_source(tmp_path / "source", arrays)
    with pytest.raises(
        CheckpointError, match=rf"'{NORM}'.* {dtype}: its largest value, {abs(value):g},".replace("+", r"\+")
    ):
        mc.convert(tmp_path / "source", tmp_path / "out", to="hf", dtype=dtype, lossy=True)
    assert left(tmp_path) == ["source"]


def test_an_infinity_stays_one(tmp_path):
    arrays = values()
    arrays[NORM][:2] = np.inf, np.nan
    write_source(tmp_path / "source", arrays)
    done = mc.convert(tmp_path / "source", tmp_path / "out", to="hf", dtype="float16", lossy=True)
    assert done.nonfinite == {NORM: 2}


def test_a_tensor_of_many_blocks(tmp_path):
    """Casts and checksums go on from block to block; the last one is cut."""
    config = mc.MambaConfig(d_model=200, n_layer=1, vocab_size=3001, d_state=4)
    arrays = dict(initial_values(config))
    assert arrays[EMBEDDING].nbytes > 2 * 2**20
    write_source(tmp_path / "source", arrays, config)
    done = mc.convert(tmp_path / "source", tmp_path / "out", to="hf", dtype="bfloat16", lossy=True)
    written = open_checkpoint(tmp_path / "out")[EMBEDDING]
    assert written.tobytes() == arrays[EMBEDDING].astype(ml_dtypes.bfloat16).tobytes()
    assert done.tensors[0].checksum == f"{zlib.crc32(written.tobytes()):08x}"
    kept = mc.convert(tmp_path / "source", tmp_path / "kept", to="hf")
    assert kept.tensors[0].checksum == f"{zlib.crc32(arrays[EMBEDDING].tobytes()):08x}"


# --- settings --------------------------------------------------------------------------------------


def test_shards(source, tmp_path):
    mc.convert(source, tmp_path / "out", to="hf", shard_bytes=5000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert dict(open_model(tmp_path / "out").tensors()).keys() == values().keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of float32"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"shard_bytes": 1.5}, "shard_bytes is 1.5"),
        ({"shard_bytes": 100, "to": "mamba_ssm"}, "shard_bytes is for safetensors alone"),
        ({"to": "gguf"}, "layout is 'gguf'"),
        ({"layout": "gguf"}, "layout is 'gguf'"),
        ({"file_format": "gguf"}, "file_format is 'gguf'"),
        ({"compat": "minimamba"}, "compat is 'minimamba'"),
    ],
)
def test_settings_that_are_refused(source, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        mc.convert(source, tmp_path / "out", **({"to": "hf"} | settings))
    assert left(tmp_path) == ["source"]


# --- verification ----------------------------------------------------------------------------------


def test_verification_reads_again_and_runs_both(source, tmp_path, backend, monkeypatch):
    monkeypatch.setenv("MAMBA_CORE_BACKEND", backend.name)
    for target, settings in (("same", {}), ("cast", {"dtype": "bfloat16", "lossy": True})):
        done = mc.convert(source, tmp_path / target, to="mamba_ssm", verify=True, **settings)
        assert done.verification.tensors == len(done.tensors)
        assert done.verification.backend == backend.name
        assert done.verification.dtype == settings.get("dtype", "float32")
        assert done.verification.positions == verify.LENGTH


def test_verification_by_the_reference_where_there_is_no_framework(source, tmp_path, monkeypatch):
    def none():
        raise ImportError("no framework is installed")

    monkeypatch.setattr(verify.registry, "default_name", none)
    done = mc.convert(source, tmp_path / "out", to="mamba_ssm", verify=True)
    assert done.verification.backend == "reference"
    # A cast is no other function: both are run with the values of the dtype that is written.
    cast = mc.convert(source, tmp_path / "cast", to="hf", dtype="bfloat16", lossy=True, verify=True)
    assert (cast.verification.backend, cast.verification.dtype) == ("reference", "float64")
    monkeypatch.setattr(verify, "REFERENCE_PARAMETERS", 10)
    assert mc.convert(source, tmp_path / "other", to="hf", verify=True).verification.backend is None


def test_verification_sees_bytes_that_changed_on_disk(source, tmp_path, monkeypatch):
    from mamba_core.weights import convert

    def damage(folder, *arguments, **settings):
        write_layout(folder, *arguments, **settings)
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(convert, "write_layout", damage)
    with pytest.raises(CheckpointError, match=r"verification failed: .* was read otherwise"):
        mc.convert(source, tmp_path / "out", to="hf", verify=True)
    assert left(tmp_path) == ["source"]


def test_verification_sees_another_function(source, tmp_path, monkeypatch):
    from mamba_core.weights import convert

    def change(folder, config, *arguments, **settings):
        write_layout(folder, config, *arguments, **settings)
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {"layer_norm_epsilon": 0.1}))

    monkeypatch.setattr(convert, "write_layout", change)
    with pytest.raises(CheckpointError, match=r"verification failed: on .* it computes something else"):
        mc.convert(source, tmp_path / "out", to="hf", verify=True)
    assert left(tmp_path) == ["source"]


# --- atomicity -------------------------------------------------------------------------------------

CONVERT = (
    "import sys, mamba_core.weights.convert as c; c.convert(sys.argv[1], sys.argv[2], to='hf', progress={progress})"
)
HANG = "lambda done, total: (print('writing', flush=True), __import__('time').sleep(60))"


def start(source, target, progress="None"):
    command = [sys.executable, "-c", CONVERT.format(progress=progress), str(source), str(target)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="the locks are of POSIX")
def test_a_killed_conversion_leaves_no_target_and_the_next_clears_up(source, tmp_path):
    target = tmp_path / "out"
    process = start(source, target, HANG)
    assert process.stdout.readline() == "writing\n"
    during = left(tmp_path)
    assert len(during) == 2
    assert not target.exists()
    with pytest.raises(CheckpointError, match="out: is being written by another process"):
        mc.convert(source, target, to="hf")
    assert left(tmp_path) == during, "the folder of a conversion that runs is left alone"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert left(tmp_path) == during
    mc.convert(source, target, to="hf")
    assert left(tmp_path) == ["out", "source"]
    assert dict(open_model(target).tensors()).keys() == values().keys()


def test_a_target_that_holds_the_source_is_refused(source, tmp_path):
    inner = tmp_path / "out" / "source"
    shutil.copytree(source, inner)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is or holds the source"):
        mc.convert(inner, tmp_path / "out", to="hf", overwrite=True)
    assert left(inner) == left(source)


def test_a_target_is_overwritten_only_when_asked(source, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not empty"):
        mc.convert(source, target, to="hf")
    assert left(target) == ["config.json"]
    mc.convert(source, target, to="hf", overwrite=True)
    assert left(target) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is of POSIX")
@pytest.mark.parametrize("to", ["hf", "mamba_ssm", "mambapy_mlx"])
def test_no_room_on_the_disk(source, tmp_path, to):
    """A limit on the size of files stands for the disk: the write fails in the middle of a tensor."""
    program = (
        "import resource, sys\nfrom mamba_core.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "convert", str(source), str(tmp_path / "out"), "--to", to, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"mamba-core: {tmp_path / 'out'}: cannot be written: File too large\n"
    assert left(tmp_path) == ["source"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="out: cannot be written: Permission denied"):
        mc.convert(source, tmp_path / "closed" / "out", to="hf")


# --- the command -----------------------------------------------------------------------------------


def test_command(source, tmp_path, capsys):
    from mamba_core.cli import main

    report = tmp_path / "report.json"
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", "hf", "--dtype", "float16", "--tensors"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert left(tmp_path) == ["source"]
    assert main([*arguments, "--lossy", "--verify", "--shard-size", "5KB", "--report", str(report)]) == 0
    shown = capsys.readouterr()
    assert "from hf to hf" in shown.out
    assert "agree bit for bit" in " ".join(shown.out.split())
    assert "convert" in shown.err, "progress is shown"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert main([*arguments, "--lossy", "--overwrite", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == ""
    by_name = [
        {row["target"]: row["checksum"] for row in each["tensors"]} for each in (found, json.loads(report.read_text()))
    ]
    assert by_name[0] == by_name[1]


def test_command_warns_of_values_that_are_not_finite(tmp_path, capsys):
    from mamba_core.cli import main

    arrays = values()
    arrays[NORM][3] = np.nan
    write_source(tmp_path / "source", arrays)
    for arguments in (["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "hf"],
                      ["inspect", str(tmp_path / "source"), "--values"]):  # fmt: skip
        assert main(arguments) == 0
        assert f"warning: '{NORM}' holds 1 NaN or infinite values" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5k", 1500), ("7", 7)])
def test_sizes(text, size):
    from mamba_core.cli.convert import parse_size

    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "2TB", "nan", "1e3", "1GBB"])
def test_sizes_that_are_refused(source, tmp_path, text, capsys):
    from mamba_core.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(source), str(tmp_path / "out"), "--to", "hf", f"--shard-size={text}"])
    assert stopped.value.code == 2
    assert "is no size" in capsys.readouterr().err


# --- the hub ---------------------------------------------------------------------------------------


def fake_cache(root, source, repository="someone/mamba", commit="0" * 40):
    """A folder as huggingface_hub keeps it, with one revision, "main"."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    source.rename(folder / "snapshots" / commit)


def test_a_repository_in_the_cache_is_read_offline(source, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    fake_cache(tmp_path / "hub", source)
    program = (
        "import sys, mamba_core.weights.convert as c\n"
        "print(c.convert('someone/mamba', sys.argv[1], to='mamba_ssm', revision=sys.argv[2] or None).source_layout)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(revision):
        command = [sys.executable, "-c", program, str(tmp_path / f"out{revision}"), revision]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    for revision in ("", "main", "0" * 40):
        assert run(revision).stdout == "hf\n"
        assert open_model(tmp_path / f"out{revision}").config == CONFIG
    missing = run("v2")
    assert missing.returncode == 1
    assert "CheckpointError: someone/mamba: no such folder, and not to be had from the hub" in missing.stderr
    assert not (tmp_path / "outv2").exists()


# --- memory ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("settings", ["to='hf'", "to='mamba_ssm'", "to='hf', dtype='bfloat16', lossy=True"])
def test_peak_memory_is_about_the_largest_tensor(tmp_path, settings):
    """250 MB in tensors of 25 MB at most: a copy of the file, mapped pages included, would be seen."""
    config = mc.MambaConfig(d_model=1024, n_layer=8, vocab_size=6000, d_state=4)
    arrays = {name: np.zeros(parameter.shape, np.float32) for name, parameter in parameter_table(config).items()}
    folder = write_source(tmp_path / "source", arrays, config)
    program = (
        "import sys, mamba_core.weights.convert as c\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        f"before = peak(); c.convert(sys.argv[1], sys.argv[2], {settings}); print(peak() - before)"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    largest = max(array.nbytes for array in arrays.values())
    assert grown < largest + 30e6 < sum(array.nbytes for array in arrays.values()) / 3


def test_writing_a_model_and_converting_it_agree(tmp_path):
    """What `save` writes in a dtype is what `convert` writes of the float32 model."""
    write_source(tmp_path / "source", values())
    mc.convert(tmp_path / "source", tmp_path / "converted", to="hf", dtype="bfloat16", lossy=True)
    (tmp_path / "saved").mkdir()
    cast = {name: v.astype(np.dtype(parameter_table(CONFIG)[name].dtype("bfloat16"))) for name, v in values().items()}
    write_model(tmp_path / "saved", CONFIG, cast, layout="hf", dtype="bfloat16")
    saved, converted = (tmp_path / name / "model.safetensors" for name in ("saved", "converted"))
    assert saved.read_bytes() == converted.read_bytes()
