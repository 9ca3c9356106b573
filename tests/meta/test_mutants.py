"""The conformance suite rejects every broken backend, and each by the property that is meant to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.mutants import CAUGHT_BY

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
SUITE = "tests/conformance"
# What Hypothesis draws first changes with every constant in our sources: with 15 a mutant may be missed by bad luck.
EXAMPLES = "60"


def run(name: str, law: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", SUITE, "--backend", "torch", "-x", "-k", law, "-p", "tests.meta.plugin"]
    environment = os.environ | {
        "MUTANT": name,
        "HYPOTHESIS_PROFILE": "unshrunk",
        "MAMBA_CORE_NATIVE": "0",
        "EXAMPLES": EXAMPLES,
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("law", "name"), [(law, name) for law, mutants in CAUGHT_BY.items() for name in mutants])
def test_the_suite_rejects(law, name):
    done = run(name, law)
    assert done.returncode == 1, f"not rejected:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert f"::{law}" in done.stdout, f"rejected for another reason than a failing test:\n{done.stdout[-2000:]}"
