"""The annotations: complete on every public name, and right by a type checker, for us and for a user's script."""

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import mamba_core as mc

ROOT = Path(__file__).parents[2]
# The folders of the top level that the installation maps into the package.
MAPPED = {"backends": "backends", "benchmarks": "benchmarks", "weights": "weights"}
SCRIPT = """
from pathlib import Path

import mamba_core as mc

config = mc.MambaConfig(d_model=64, n_layer=2, vocab_size=256)
model = mc.build(config, backend="torch", kernels={"selective_scan": "chunked"})
result = mc.generate(model, ["def ", "class "], max_new_tokens=4, temperature=0.5)
tokens: list[list[int]] = result.tokens
reasons: list[str | None] = result.finish_reasons
report: mc.Parity = mc.parity("model", backends=["torch"])
passed: bool = report.passed
conversion: mc.Conversion = mc.convert(Path("a"), "b", to="hf")
names: list[str] = [row.target for row in conversion.tensors]
for piece in mc.stream(model, "text"):
    text: str = piece
mc.save(model, "model", overwrite=True)
"""
WRONG = """
import mamba_core as mc

mc.MambaConfig(d_modell=64)
number: int = mc.generate(None, "text").tokens
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The package as an installation lays it out, for a checker that knows no mapping of folders."""
    folder = tmp_path_factory.mktemp("types")
    package = folder / "mamba_core"
    package.mkdir()
    for item in (ROOT / "mamba_core").iterdir():
        (package / item.name).symlink_to(item)
    for name, place in MAPPED.items():
        (package / name).symlink_to(ROOT / place)
    return folder


def check(tree, *arguments):
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *arguments]
    command += ["--cache-dir", tree / "cache"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600)


def test_the_package_has_no_type_errors(tree):
    pytest.importorskip("mypy")
    done = check(tree, "-p", "mamba_core")
    assert done.returncode == 0, done.stdout


def test_a_user_s_script_is_checked(tree):
    pytest.importorskip("mypy")
    (tree / "right.py").write_text(SCRIPT)
    (tree / "wrong.py").write_text(WRONG)
    right, wrong = check(tree, "right.py"), check(tree, "wrong.py")
    assert right.returncode == 0, right.stdout
    assert 'Unexpected keyword argument "d_modell"' in wrong.stdout
    assert "Incompatible types in assignment" in wrong.stdout


@pytest.mark.parametrize("name", mc.__all__)
def test_a_public_name_is_annotated(name):
    value = getattr(mc, name)
    functions = [value] if inspect.isfunction(value) else []
    if inspect.isclass(value) and value.__module__.startswith("mamba_core"):
        public = {key: item for key, item in vars(value).items() if key == "__init__" or not key.startswith("_")}
        functions += [
            item for item in public.values() if inspect.isfunction(item) and item.__module__ == value.__module__
        ]
    for function in functions:
        hints = typing.get_type_hints(function)
        wanted = {parameter for parameter in inspect.signature(function).parameters if parameter != "self"}
        missing = wanted - set(hints) | ({"return"} - set(hints) if function.__name__ != "__init__" else set())
        assert not missing, f"{function.__qualname__} has no annotation of {', '.join(sorted(missing))}"


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "mamba_core" / "py.typed").is_file()
