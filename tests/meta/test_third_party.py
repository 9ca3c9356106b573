"""A backend of another package, found by its entry point, runs the conformance suite with one command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
MODULE = """
from types import SimpleNamespace

import mamba_core.backends.torch

backend = SimpleNamespace(**vars(mamba_core.backends.torch) | {"name": "mine"})
"""


def test_a_registered_backend_runs_the_suite(tmp_path):
    """A package as pip would install it: a module and its metadata."""
    metadata = tmp_path / "mine-0.1.dist-info"
    metadata.mkdir()
    (tmp_path / "mine.py").write_text(MODULE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[mamba_core.backends]\nmine = mine:backend\n")
    # Few examples: it is ours under another name, and what is tried is that the suite finds it.
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "EXAMPLES": "3"}
    command = [sys.executable, "-m", "pytest", "tests/conformance", "--backend", "mine", "-k", "ops or model"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
