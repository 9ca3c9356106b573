"""The package as installed: what importing it brings in, missing frameworks, the wheel, the README."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mamba_core import registry

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "jax", "flax", "optax", "mlx", "transformers", "huggingface_hub", "rich", "matplotlib")


def python(code: str, *options: str, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_import_brings_in_no_framework():
    done = python(f"""
        import sys, mamba_core
        print([name for name in {FRAMEWORKS} if name in sys.modules])
    """)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_checkout_that_is_not_installed_says_to_install_it(tmp_path):
    """-S leaves out the finder of an editable installation, which knows where the package's other folders are."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import mamba_core"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    fault = done.stderr.strip().splitlines()[-1]
    assert fault.startswith("ImportError: mamba_core is imported from a checkout that is not installed")
    assert "pip install -e ." in fault


HIDE = """
    import sys, importlib.abc
    class Hide(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] in {hidden!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    sys.meta_path.insert(0, Hide())
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name in {hidden!r} else found(name, package)
"""


@pytest.mark.parametrize("name", list(registry.PACKAGES))
def test_a_missing_framework_names_its_extra_and_leaves_the_others(name):
    others = [other for other in registry.PACKAGES if other != name and not registry.missing_packages(other)]
    code = textwrap.dedent(HIDE.format(hidden=registry.PACKAGES[name])) + textwrap.dedent(f"""
        import mamba_core as mc
        config = mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16)
        for other in {others}:
            print(mc.build(config, backend=other).backend)
        print(mc.available_backends()[{name!r}].missing)
        try:
            mc.build(config, backend={name!r})
        except ImportError as error:
            print(error)
    """)
    done = python(code)
    message = f"pip install 'mamba_core[{name}]'"
    *built, missing, error = done.stdout.strip().splitlines() or ["", done.stderr]
    assert built == others, done.stderr
    assert message in missing
    assert message in error


def test_a_fault_inside_a_framework_is_shown_as_itself(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    (tmp_path / "mlx" / "core.py").write_text("raise RuntimeError('the driver is too old')")
    (tmp_path / "mlx" / "nn.py").write_text("")
    done = python(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mamba_core as mc
        mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=16), backend="mlx")
    """)
    assert "RuntimeError: the driver is too old" in done.stderr


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="no backend 'tensorflow'; expected one of torch, mlx, jax"):
        registry.get("tensorflow")


@pytest.mark.parametrize("attribute", ["devices", "kernels"])
def test_backends_says_what_there_is(backend, attribute):
    import mamba_core as mc

    info = mc.available_backends()[backend.name]
    assert info.missing is None
    assert info.version
    assert getattr(info, attribute)
    assert mc.backends.__path__, "the function is the package too"


@pytest.fixture(scope="session", params=["c++", None], ids=["with a compiler", "without a compiler"])
def compiler(request):
    if request.param and shutil.which(request.param) is None:
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, compiler):
    """The wheel, unpacked: importable without the repository and without installing."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because a build leaves its own files behind
    for name in ("mamba_core", "backends", "weights", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", *build, "-w", folder, source]
    compilers = {} if compiler else {"CC": "false", "CXX": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | compilers)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    target = ["--no-deps", "--quiet", "--target", folder / "site", built]
    subprocess.run([sys.executable, "-m", "pip", "install", *target], check=True, capture_output=True)
    return folder / "site"


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    installed = {str(path.relative_to(wheel)) for path in wheel.rglob("*.py")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "mamba_core").rglob("*.py")}
    for folder in ("backends", "weights", "benchmarks"):
        expected |= {f"mamba_core/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert installed == expected


def test_the_wheel_works_on_each_backend(backend, compiler, wheel, tmp_path):
    """-S and a path of the wheel and the site's packages, less the editable install of this repository."""
    done = python(
        f"""
        import sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
        sys.path.insert(0, {str(wheel)!r})
        import mamba_core as mc
        assert mc.__file__.startswith({str(wheel)!r}), mc.__file__
        model = mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=256), backend={backend.name!r})
        mc.save(model, "model")
        result = mc.generate(mc.load("model", backend={backend.name!r}), "x", max_new_tokens=3)
        print(len(result.tokens[0]), mc.available_backends()[{backend.name!r}].kernels["selective_scan"]["native"])
    """,
        cwd=tmp_path,
    )
    tokens, _, native = done.stdout.strip().partition(" ")
    assert tokens == "3", done.stdout + done.stderr
    assert native == "None" if compiler else native.startswith("not built; with a C++ compiler")
    assert done.stderr.count("the CPU kernels in C++ are left out of this installation") == (0 if compiler else 1)


def snippets() -> dict[str, str]:
    """The Python blocks of the README, by the heading that they stand under."""
    found, heading = {}, ""
    for match in re.finditer(
        r"^#+ (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```$", README, re.MULTILINE | re.DOTALL
    ):
        heading = match["heading"] or heading
        if match["code"]:
            found[heading] = found.get(heading, "") + match["code"]
    return found


README = (ROOT / "README.md").read_text()
TOO_LARGE = {"mamba_core"}  # the first block builds 130M parameters; see the slow test


@pytest.mark.parametrize("heading", [heading for heading in snippets() if heading not in TOO_LARGE])
def test_readme_snippets_run(heading, tmp_path):
    for name in registry.PACKAGES:
        if name.lower() in snippets()[heading] and registry.missing_packages(name):
            pytest.skip(f"{name} not installed")
    done = python(snippets()[heading], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_readme_opening_runs(tmp_path):
    done = python(snippets()["mamba_core"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_python_block_of_the_readme_is_run():
    run = sum(code.count("import mamba_core as mc") for code in snippets().values())
    assert run == README.count("```python") >= 8, "each block imports mamba_core once, and stands under a heading"
