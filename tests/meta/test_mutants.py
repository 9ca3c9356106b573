"""The conformance suite rejects every broken backend, and accepts the one that is not broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.mutants import MUTANTS

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
SUITE = "tests/conformance"


def run(name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", SUITE, "--backend", "torch", "-x", "-p", "tests.meta.plugin"]
    environment = os.environ | {"MUTANT": name, "HYPOTHESIS_PROFILE": "ci"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_rejects(name, record_property):
    done = run(name)
    assert done.returncode == 1, f"not rejected:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    caught = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    assert caught, f"rejected for another reason than a failing test:\n{done.stdout[-2000:]}"
    record_property("caught by", caught[1])
