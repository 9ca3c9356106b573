"""mamba-core doctor: its verdicts, its report and its exit status."""

import getpass
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_core import selftest
from mamba_core.cli import doctor, main
from mamba_core.registry import installed

NAME = next((name for name in ("mlx", "torch", "jax") if name in installed()), None)
pytestmark = pytest.mark.skipif(NAME is None, reason="no framework is installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA_CORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def rows(*verdicts, details=("y is 3.2e-02 from the plain kernel",)):
    return [selftest.Row(NAME, "cpu", "an_op", f"k{i}", verdict, details) for i, verdict in enumerate(verdicts)]


@pytest.fixture
def judging(monkeypatch):
    """Says which rows are found, without a process."""

    def judge(*found):
        monkeypatch.setattr(doctor, "judged", lambda *_, **__: iter(found))

    return judge


def test_all_passed(judging, capsys, tmp_path):
    judging(*rows("passed", "not tried", "cannot run"))
    assert main(["doctor", "--backend", NAME]) == 0
    out = capsys.readouterr().out
    assert "0 failed" in out
    assert "for an issue" not in out
    assert json.loads((tmp_path / doctor.REPORT).read_text())["kernels"][0]["verdict"] == "passed"


def test_one_failed(judging, capsys):
    judging(*rows("passed", "failed"))
    assert main(["doctor", "--backend", NAME]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "an_op by k1 on cpu failed: y is 3.2e-02 from the plain kernel" in out
    assert f"1 failed; the report is {doctor.REPORT}, for an issue" in out


def test_json(judging, capsys):
    judging(*rows("failed"))
    assert main(["doctor", "--backend", NAME, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path(doctor.REPORT).read_text())
    assert set(printed) >= {"mamba_core", "python", "system", "packages", "compilers", "environment", "devices"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--backend", "nonsense"], "no backend 'nonsense'"),
        (["--kernel", "nonsense"], "no kernel 'nonsense'"),
        (["--out", "nowhere/report.json"], "nowhere is no folder"),
    ],
)
def test_bad_arguments(judging, capsys, arguments, told):
    judging()
    assert main(["doctor", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_kernel_that_can_run_nowhere_is_no_success(judging, capsys):
    judging(*rows("cannot run", details=("it runs on a TPU only",)))
    assert main(["doctor", "--kernel", "k0"]) == 2
    assert "kernel 'k0' cannot run here: it runs on a TPU only" in capsys.readouterr().err


def test_the_report_names_no_path_and_no_person(judging, monkeypatch, capsys):
    monkeypatch.setenv("MAMBA_CORE_NATIVE", str(Path.home() / "alice" / "kernels.so"))
    monkeypatch.setenv("MAMBA_CORE_TUNE", "0")
    judging(*rows("failed", details=(selftest._told(RuntimeError("in /home/alice/x/kernel.py, line 3")),)))
    main(["doctor", "--backend", NAME])
    text = Path(doctor.REPORT).read_text()
    report = json.loads(text)
    assert report["environment"]["MAMBA_CORE_NATIVE"] == "(a path)"
    assert report["environment"]["MAMBA_CORE_TUNE"] == "0"
    assert "MAMBA_CORE_CACHE" in report["environment"]
    for private in ("alice", str(Path.home()), str(ROOT), os.getcwd(), f"/{getpass.getuser()}/"):
        assert private not in text
    assert "in kernel.py, line 3" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice/a b/c.py: no", "a b/c.py: no"),
        ("'/usr/lib/x.so' and /tmp/y", "'x.so' and y"),
        ("C:\\Users\\alice\\k.dll", "k.dll"),
        ("C:\\Users\\alice", "~"),
        ("/Users/alice", "~"),
        ("a/b and 3/4 and x: 1.0/2", "a/b and 3/4 and x: 1.0/2"),
    ],
)
def test_paths_are_cut(text, expected):
    assert selftest.without_paths(text) == expected


def test_without_rich_the_table_is_plain(judging, monkeypatch, capsys):
    judging(*rows("passed"))
    monkeypatch.setitem(sys.modules, "mamba_core.cli.output", None)
    assert main(["doctor", "--backend", NAME]) == 0
    assert f"{NAME:7}  cpu     an_op  k0      passed" in capsys.readouterr().out


# --- in a process of its own -------------------------------------------------------------------------------

# Before the frameworks: one kernel is broken as its value says, and the others are left out.
SITE = """
import os
from mamba_core import selftest

real = selftest.every

def every(backend, kernel=None):
    rows = real(backend, kernel)
    broken = os.environ["BROKEN"]
    kernels = backend.op("selective_scan").KERNELS
    def fail(*_, **__):
        os._exit(7) if broken == "ends" else (_ for _ in ()).throw(RuntimeError("a fault of /home/alice/k.cu"))
    if broken:
        kernels["chunked"] = fail
    return [row for row in rows if row.op == "selective_scan" and row.kernel in ("chunked", "sequential")]

selftest.every = every
"""


@pytest.fixture
def judged(monkeypatch, tmp_path):
    def judge(broken):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SITE}\n"

        def started(name, kernel, done):
            work = f"selftest.work({name!r}, {kernel!r}, {done!r})"
            command = [sys.executable, "-c", code + work]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"BROKEN": broken})

        monkeypatch.setattr(doctor, "_start", started)
        status = main(["doctor", "--backend", NAME, "--json"])
        return status, json.loads(Path(doctor.REPORT).read_text())

    return judge


@pytest.mark.parametrize(
    ("broken", "verdict", "told"),
    [
        ("", "passed", None),
        ("raises", "failed", "it raises RuntimeError: a fault of k.cu"),
        ("ends", "failed", "its process ended with status 7"),
    ],
)
def test_each_kernel_is_tried_whatever_the_others_do(judged, broken, verdict, told):
    status, report = judged(broken)
    assert status == (1 if broken else 0)
    found = {row["kernel"]: row for row in report["kernels"]}
    assert found["chunked"]["verdict"] == verdict
    assert found["sequential"]["verdict"] == "passed"
    assert told is None or told in found["chunked"]["details"][0]
    assert "cpu" in report["devices"][NAME]


def test_a_backend_that_cannot_be_imported_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / f"{NAME}.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (row,) = doctor.judged(NAME, None, {})
    assert row.verdict == "failed"


def test_the_doctor_itself_on_one_kernel(capsys):
    assert main(["doctor", "--backend", NAME, "--kernel", "chunked"]) == 0
    report = json.loads(Path(doctor.REPORT).read_text())
    assert {(row["op"], row["verdict"]) for row in report["kernels"]} == {
        ("selective_scan", "passed"),
        ("ssd", "passed"),
    }
    # "auto" knows it from now on.
    assert len(list(Path("cache", "selftests").glob("*.json"))) == 2
