"""The table of environment variables: it lists every one that the sources read, and `mamba-core info` prints it."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from mamba_core import environment
from mamba_core.backends.native import library
from mamba_core.cli import main

ROOT = Path(__file__).parents[2]
FOLDERS = ("mamba_core", "backends", "weights", "benchmarks")
NAMES = {variable.name for variable in environment.VARIABLES}


def reads(source: str) -> set[str]:
    """The environment variables that a Python source reads, "?" where their name is not a constant of the source."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def name(node):
        value = node.value if isinstance(node, ast.Constant) else constants.get(getattr(node, "id", None))
        return value if isinstance(value, str) else "?"

    def is_environ(node):
        return getattr(node, "attr", getattr(node, "id", None)) in ("environ", "environb")

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value) and isinstance(node.ctx, ast.Load):
            found.add(name(node.slice))
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            found.add(name(node.left))
        elif isinstance(node, ast.Call):
            function = node.func
            method = getattr(function, "attr", getattr(function, "id", None))
            of_environ = isinstance(function, ast.Attribute) and is_environ(function.value)
            if method == "getenv" or (of_environ and method in ("get", "setdefault", "pop")):
                found.add(name(node.args[0]))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('os.environ.get("A")', {"A"}),
        ('os.environ["A"]', {"A"}),
        ('os.environ.setdefault("A", "0")', {"A"}),
        ('os.getenv("A", "0")', {"A"}),
        ('if "A" not in os.environ: pass', {"A"}),
        ('environ.get("A")', {"A"}),
        ('NAME = "A"\nos.environ.get(NAME)', {"A"}),
        ("os.environ.get(name())", {"?"}),
        ('os.environ["A"] = "1"', set()),
        ("other.get('A')", set()),
    ],
)
def test_a_read_is_found(source, expected):
    assert reads(source) == expected


def test_every_variable_that_is_read_is_in_the_table():
    unlisted = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            unlisted += [f"{path.relative_to(ROOT)}: {name}" for name in reads(path.read_text()) - NAMES]
        for pattern in ("*.cpp", "*.h", "*.cu"):
            for path in (ROOT / folder).rglob(pattern):
                names = re.findall(r'getenv\s*\(\s*"?(\w*)', path.read_text())
                unlisted += [f"{path.relative_to(ROOT)}: {name}" for name in names if name not in NAMES]
    # The table itself takes its own names.
    assert unlisted == ["mamba_core/environment.py: ?"]


def test_names_stand_once():
    assert len(NAMES) == len(environment.VARIABLES)
    assert all(all(variable) for variable in environment.VARIABLES)


def test_those_that_are_set_are_told(monkeypatch, capsys):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MAMBA_CORE_CACHE", "/somewhere")
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["environment"] == {"MAMBA_CORE_CACHE": "/somewhere"}
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert "MAMBA_CORE_CACHE" in told
    assert "MAMBA_CORE_NATIVE" not in told


def test_what_a_backend_says_is_in_force_is_told(backend, monkeypatch, capsys):
    arrays = sys.modules[f"mamba_core.backends.{backend.name}.arrays"]
    monkeypatch.setattr(arrays, "in_force", lambda: {"threads": "seven"}, raising=False)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"][backend.name]["in_force"] == {"threads": "seven"}
    assert main(["info"]) == 0
    assert "seven" in capsys.readouterr().out


def test_kernels_by_op_are_a_line_each(monkeypatch, capsys):
    from mamba_core import registry

    kernels = {"selective_scan": {"native": None, "cuda": "no GPU"}, "causal_conv": {"plain": None}}
    info = registry.BackendInfo("torch", "1", ("cpu",), kernels, None)
    monkeypatch.setattr(registry, "backends", lambda: {"torch": info})
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert "selective_scan: native" in told
    assert "causal_conv: plain" in told


def test_the_readme_lists_every_variable():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    missing = [name for name in NAMES if f"| `{name}` |" not in readme]
    assert not missing


def test_a_library_that_was_named_and_cannot_be_loaded_is_told(monkeypatch):
    monkeypatch.setenv("MAMBA_CORE_NATIVE", "/nowhere/kernels.so")
    with pytest.warns(UserWarning, match=r"MAMBA_CORE_NATIVE=/nowhere/kernels\.so cannot be loaded, so none is used"):
        assert "cannot be loaded" in library._find.__wrapped__()
