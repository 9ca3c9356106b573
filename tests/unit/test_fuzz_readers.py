"""Readers on broken and hostile files: each is read, or is one line that names it, in bounded memory and time.

A slice of the campaign in `tests/campaign`, which is run by hand, and what was found before it.
"""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import mamba_core as mc
from mamba_core.spec.init import initial_values
from mamba_core.weights.formats import CheckpointError, sources_of, write_torch
from mamba_core.weights.io import open_checkpoint
from mamba_core.weights.opening import open_model
from mamba_core.weights.writing import write_model

ROOT = Path(__file__).parents[2]
CONFIG = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16, d_state=2)
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the limits are of Linux")


def campaign(tmp_path, cases: int, before: str = "") -> tuple[int, dict]:
    """(exit status, numbers) of the first cases, in a process of its own. before: what that runs first."""
    arguments = ["fuzz", "--cases", str(cases), "--jobs", "1", "--keep", str(tmp_path / "kept")]
    arguments += ["--out", str(tmp_path / "numbers.json")]
    run = f"import sys; from tests.campaign.__main__ import main; sys.argv[1:] = {arguments!r}; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{run}"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "numbers.json").exists(), done.stderr[-2000:]
    return done.returncode, json.loads((tmp_path / "numbers.json").read_text())


# --- a slice of the campaign -----------------------------------------------------------------------


@ON_LINUX
def test_a_slice_of_the_campaign(tmp_path):
    status, numbers = campaign(tmp_path, 2000)
    kept = [path.read_text() for path in sorted(tmp_path.glob("kept/*/FAILURE.txt"))]
    assert status == 0, "\n".join(kept)[:5000]
    assert numbers["cases"] == 2000
    assert numbers["outcomes"].keys() == {"accepted", "refused"}
    assert numbers["outcomes"]["accepted"] > 200


# Breaks the reader of safetensors where the metadata is another than usual.
UNUSUAL = """
from mamba_core.weights.formats import safetensors

check = safetensors._check_metadata

def broken(metadata):
    if isinstance(metadata, dict) and set(metadata) - {"format", "mamba_core_state"}:
        fail()
    check(metadata)

safetensors._check_metadata = broken
"""
# So many cases reach every reader that is broken.
SOME = 400
# How a reader is broken -> the outcome that tells of it, and the code that breaks it.
BROKEN = {
    "a check that is left out": (
        "unchecked",
        "from mamba_core.weights.formats import zip\nzip.Check.after = lambda *arguments: None",
    ),
    "an exception that is none of ours": (
        "exception KeyError",
        "from contextlib import nullcontext\nfrom mamba_core.weights import io, opening\n"
        "io.boundary = opening.boundary = lambda path: nullcontext()\nfail = lambda: {}[0]" + UNUSUAL,
    ),
    "a reader that sleeps": ("slow", "import time\nfail = lambda: time.sleep(3)" + UNUSUAL),
    "a command that is run": ("executes", "import os\nfail = lambda: os.system('true')" + UNUSUAL),
    "a process that dies": ("died", "import os\nfail = lambda: os.abort()" + UNUSUAL),
}


@ON_LINUX
@pytest.mark.parametrize("fault", BROKEN)
def test_the_campaign_tells_of(tmp_path, fault):
    outcome, code = BROKEN[fault]
    status, numbers = campaign(tmp_path, SOME, code)
    assert status == 1
    assert numbers["cases"] == SOME
    assert outcome in numbers["outcomes"], numbers["outcomes"]
    assert "python -m tests.campaign fuzz --seed 0 --case" in next(tmp_path.glob("kept/*/FAILURE.txt")).read_text()


# --- what was found --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def write_checkpoint(folder, layout):
    folder.mkdir(exist_ok=True)
    write_model(folder, CONFIG, dict(initial_values(CONFIG)), layout=layout, dtype="float32")
    return json.loads((folder / "config.json").read_text())


def refused(path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 2048


def test_names_of_a_hostile_file_cannot_break_the_line(folder):
    path = folder / "names"
    fields = write_checkpoint(path, "mamba_ssm")
    (path / "config.json").write_text(json.dumps(fields | {"ssm_cfg": {"a\nb\x1b[2J\u2028\ud800": None}}))
    with pytest.raises(CheckpointError, match=r"a\\nb\\x1b\[2J\\u2028\\ud800'$"):
        open_model(path)


def test_a_message_has_an_end(folder):
    path = folder / "long"
    fields = write_checkpoint(path, "mamba_ssm")
    (path / "config.json").write_text(json.dumps(fields | {"ssm_cfg": {"a" * 10**6: None}}))
    refused(path)


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
    refused(path)
