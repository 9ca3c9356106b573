"""The comparison of bits with another commit: it runs the code that it names, and sees an op that is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mamba_core.benchmarks import digests, worktree
from mamba_core.benchmarks.digested import digest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mamba_core", "backends", "weights", "benchmarks")


@pytest.fixture
def copy(tmp_path):
    """A checkout like this one."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def changed(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_it_runs_the_package_of_the_checkout_and_the_benchmarks_of_this_one(copy):
    shutil.rmtree(copy / "backends" / "gpu")
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import worktree
worktree.use(worktree.Path({str(copy)!r}))
import mamba_core, mamba_core.weights, mamba_core.backends.native
from mamba_core.benchmarks import digested
for module in (mamba_core, mamba_core.weights, mamba_core.backends.native, digested):
    print(module.__file__)
print(importlib.util.find_spec("mamba_core.backends.torch") is not None)
print(importlib.util.find_spec("mamba_core.backends.gpu") is not None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *files, present, missing = done.stdout.split() or [done.stderr, "", ""]
    theirs = [str(copy / part / "__init__.py") for part in ("mamba_core", "weights", "backends/native")]
    assert files == [*theirs, str(ROOT / "benchmarks" / "digested.py")], done.stderr
    # The installation has the folder that the checkout does not have.
    assert (present, missing) == ("True", "False")


def test_a_broken_op_is_seen(copy, capsys):
    pytest.importorskip("torch")
    ours = digests.measure(ROOT, ["torch"], only="float32, sequential")
    assert digests.report(digests.measure(copy, ["torch"], only="float32, sequential"), ours) == 0
    changed(
        copy / "backends" / "torch" / "ops" / "causal_conv.py", "F.silu(value) if activation", "value if activation"
    )
    assert digests.report(digests.measure(copy, ["torch"], only="float32, sequential"), ours) == 1
    told = capsys.readouterr().out
    differing = {name.partition(" | ")[0] for name in told.splitlines() if " | " in name}
    assert "torch, float32, sequential, conv" in differing
    assert "torch, float32, sequential, scan" not in differing


def test_a_single_bit_is_seen_and_sized():
    value = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    other = value.copy()
    other.view(np.int32)[3, 4] ^= 1
    found = digests.compare({"a": digest(value)}, {"a": digest(other)})
    assert [difference.name for difference in found] == ["a"]
    assert 0 < found[0].distance < 1e-6
    assert digests.compare({"a": digest(value)}, {"a": digest(value.copy())}) == []


def test_a_distance_is_near_the_true_one():
    a, b = np.random.default_rng(0).normal(size=(2, 3000))
    true = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 0.6 < digests.distance(digest(a), digest(b)) / true < 1.6


def test_what_only_one_side_has_differs():
    value = digest(np.ones(3))
    assert [found.detail for found in digests.compare({"a": value}, {"b": value})] == ["only there", "only here"]
    (found,) = digests.compare({"a": value}, {"a": digest(np.ones((3, 1)))})
    assert found.distance == float("inf")
    assert digests.report({}, {}) == 1, "nothing was compared"


def test_digests_are_kept_and_compared_with(tmp_path, capsys):
    pytest.importorskip("torch")
    file = tmp_path / "digests.json"
    options = ["--backend", "torch", "--only", "float32, auto, conv"]
    assert digests.main([*options, "--out", str(file)]) == 0
    assert digests.main([*options, "--against", str(file)]) == 0
    assert digests.main([*options, "--against", str(file), "--threads", "2"]) == 2
    assert "was made with threads 1, not 2" in capsys.readouterr().err


def test_an_unknown_commit_is_one_line(capsys):
    assert digests.main(["--base", "no-such-commit"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_library_of_other_sources_is_built_again(copy, monkeypatch):
    ran = []
    monkeypatch.setattr(worktree, "_run", lambda line, folder: ran.append(line))
    if worktree._library(ROOT) is None:
        pytest.skip("no native library here")
    built = worktree._library(copy)
    built.unlink()
    worktree._provide_library(copy)
    assert not ran
    assert built.read_bytes() == worktree._library(ROOT).read_bytes()
    built.unlink()
    changed(copy / "backends" / "native" / "add_norm.cpp", "\n", "\n\n")
    with pytest.raises(ValueError, match="cannot be built"):
        worktree._provide_library(copy)
    assert "build_ext" in ran[0]
