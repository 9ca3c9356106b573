"""Runs a benchmark on the code of another commit, beside this one.

    python benchmarks/worktree.py ROOT MODULE [ARGUMENT ...]

runs MODULE, such as mamba_core.benchmarks.digested, on the package whose checkout is ROOT. The benchmarks themselves
are those of this checkout, so that a commit can be measured that does not have them yet. What they import of the
package must therefore exist in both. This file imports nothing of the package.
"""

import contextlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = "mamba_core.benchmarks"
NATIVE = Path("backends", "native")


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of the commit in a temporary folder, with the native library where this checkout has it.

    Raises:
        ValueError: this is no git checkout, there is no such commit, or its library cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="mamba-core-") as folder:
        root = Path(folder, "checkout")
        _run(["git", "worktree", "add", "--detach", root, commit], ROOT)
        try:
            if _library(ROOT) is not None and "MAMBA_CORE_NATIVE" not in os.environ:
                _provide_library(root)
            yield root
        finally:
            _run(["git", "worktree", "remove", "--force", root], ROOT)


def command(root: Path, module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of the benchmarks on the package of a checkout."""
    return [sys.executable, os.fspath(Path(__file__).resolve()), os.fspath(root), module, *arguments]


def environment(threads: int) -> dict[str, str]:
    """Of a measuring process: so many threads, no GPU, and a folder where JAX keeps what it has compiled.

    A program of JAX that is the same in both commits is compiled once, and is then the same to the bit.
    """
    cache = Path(tempfile.gettempdir(), f"mamba-core-compiled-{os.getuid() if hasattr(os, 'getuid') else ''}")
    kept = {"JAX_COMPILATION_CACHE_DIR": os.fspath(cache), "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return kept | os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def commit_of(root: Path = ROOT) -> str:
    """The commit of a checkout, with a + where its files differ from it."""
    changed = _run(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return _run(["git", "rev-parse", "HEAD"], root).strip() + ("+" if changed else "")


class Checkout:
    """Finds the package in a checkout, whose folders the installation maps to packages; see pyproject.toml."""

    def __init__(self, root: Path):
        settings = _settings(root)
        self.folders = {name: root / folder for name, folder in settings["package-dir"].items()}
        self.folders[BENCHMARKS] = ROOT / "benchmarks"

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.folders:
            return None
        folder = self.folders[name]
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[os.fspath(folder)])


def use(root: Path) -> None:
    """Has this process import the package from a checkout, and from nowhere else."""
    # An editable installation would find here the modules that the checkout does not have.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "mamba_core" not in _mapped(finder)]
    sys.meta_path.insert(0, Checkout(root))


def _mapped(finder) -> dict:
    return getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", {})


def _settings(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]


def _provide_library(root: Path) -> None:
    """Copies this checkout's library if both are built from the same sources, or else builds it."""
    if _sources(root) == _sources(ROOT):
        shutil.copy2(_library(ROOT), root / NATIVE)
        return
    _run([sys.executable, "-c", "import setuptools; setuptools.setup()", "build_ext", "--inplace"], root)
    if _library(root) is None:
        raise ValueError(
            f"the native library of {root} cannot be built; MAMBA_CORE_NATIVE=0 leaves it out on both sides"
        )


def _library(root: Path) -> Path | None:
    return next((path for suffix in ("so", "pyd") for path in (root / NATIVE).glob(f"_kernels*.{suffix}")), None)


def _sources(root: Path) -> tuple:
    """All that a library is built from."""
    files = [path for pattern in ("*.cpp", "*.h") for path in (root / NATIVE).glob(pattern)]
    return _settings(root).get("ext-modules"), {path.name: path.read_bytes() for path in files}


def _run(line: list, folder: Path) -> str:
    try:
        return subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise ValueError(f"{line[0]} is not installed") from None
    except subprocess.CalledProcessError as fault:
        *_, last = ["no message", *fault.stderr.strip().splitlines()]
        raise ValueError(f"{' '.join(map(str, line[:3]))} failed: {last}") from None


if __name__ == "__main__":
    _, checkout, module, *arguments = sys.argv
    sys.path.pop(0)  # this file's folder, whose modules are none at the top level
    use(Path(checkout))
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
