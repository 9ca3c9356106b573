"""Broken backends: copies of one of ours, each with a small realistic fault, put where Python looks for the backend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import mamba_core.backends

ROOT = Path(__file__).parents[2]
BACKENDS = ROOT / "backends"
SUITE = "tests/conformance"
# What Hypothesis draws first changes with every constant in our sources: with 15 a mutant may be missed by bad luck.
EXAMPLES = "60"


class Mutant(NamedTuple):
    """file: of the backend's folder. Every place where `old` stands becomes `new`."""

    file: str
    old: str
    new: str


def by_name(caught_by: dict[str, dict[str, Mutant]]) -> dict[str, Mutant]:
    """The mutants of all properties."""
    return {name: mutant for mutants in caught_by.values() for name, mutant in mutants.items()}


def use(backend: str, name: str, mutant: Mutant, folder: Path) -> None:
    """Copy the backend into the folder, break the copy and put it where `mamba_core.backends` is looked for."""
    shutil.copytree(BACKENDS / backend, folder / backend, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / backend / mutant.file
    source = path.read_text()
    assert mutant.old in source, f"{name}: {mutant.file} no longer holds {mutant.old!r}"
    path.write_text(source.replace(mutant.old, mutant.new))
    mamba_core.backends.__path__.insert(0, str(folder))


def run(backend: str, mutants: str, name: str, law: str) -> subprocess.CompletedProcess:
    """One property of the suite on a broken backend. mutants: the module of this folder that holds the mutant."""
    command = [sys.executable, "-m", "pytest", SUITE, "--backend", backend, "-x", "-k", law, "-p", "tests.meta.plugin"]
    environment = os.environ | {
        "MUTANTS": mutants,
        "MUTANT": name,
        "HYPOTHESIS_PROFILE": "unshrunk",
        "MAMBA_CORE_NATIVE": "0",
        "EXAMPLES": EXAMPLES,
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def assert_rejected(done: subprocess.CompletedProcess, law: str) -> None:
    """By this property, and because a test of it failed."""
    assert done.returncode == 1, f"not rejected:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert f"::{law}" in done.stdout, f"rejected for another reason than a failing test:\n{done.stdout[-2000:]}"
