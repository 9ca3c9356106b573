"""Broken backends: copies of one of ours, each with a small realistic fault, put where Python looks for the backend."""

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import mamba_core.backends

ROOT = Path(__file__).parents[2]
BACKENDS = ROOT / "backends"
SUITE = ROOT / "tests" / "conformance"
# What Hypothesis draws first changes with every constant in our sources: with 15 a mutant may be missed by bad luck.
EXAMPLES = "60"
# pytest imports no plugin that happens to be installed, which would take half the time of most runs.
UNPLUGGED = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


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


def run(backend: str, mutants: str, name: str, law: str) -> CompletedProcess:
    """One property of the suite on a broken backend. mutants: the module of this folder that holds the mutant."""
    files = [path for path in sorted(SUITE.glob("test_*.py")) if f"def {law}(" in path.read_text()]
    assert files, f"{SUITE.name} has no {law}"
    command = [*(f"{path}::{law}" for path in files), "--backend", backend, "-x", "-p", "tests.meta.plugin"]
    environment = {
        "MUTANTS": mutants,
        "MUTANT": name,
        "HYPOTHESIS_PROFILE": "unshrunk",
        "MAMBA_CORE_NATIVE": "0",
        "EXAMPLES": EXAMPLES,
    }
    return run_pytest(command, environment)


def run_pytest(arguments: list, environment: dict[str, str], seconds: float = 300.0) -> CompletedProcess:
    """pytest in a process of its own, forked from one that has imported the frameworks, but no backend."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.meta.imported"])
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        command = [str(argument) for argument in arguments]
        process = context.Process(target=_pytest, args=(command, os.environ | UNPLUGGED | environment, output.name))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        return CompletedProcess(command, process.exitcode, output.read(), "")


def _pytest(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """What the process does; it ends with pytest's status."""
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    import pytest

    sys.exit(int(pytest.main(arguments)))


def assert_rejected(done: CompletedProcess, law: str) -> None:
    """By this property, and because a test of it failed."""
    assert done.returncode == 1, f"not rejected:\n{done.stdout[-2000:]}"
    assert f"::{law}" in done.stdout, f"rejected for another reason than a failing test:\n{done.stdout[-2000:]}"
