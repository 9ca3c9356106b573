"""What pyproject.toml lists by hand is what there is: a module that is not listed is in no wheel."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_of_modules_is_a_package():
    expected = set()
    for name in ("mamba_core", "backends", "weights", "benchmarks"):
        folders = {path.parent.relative_to(ROOT) for path in (ROOT / name).rglob("*.py")}
        expected |= {".".join(folder.parts) for folder in folders}
    expected = {name if name.startswith("mamba_core") else f"mamba_core.{name}" for name in expected}
    assert sorted(SETUPTOOLS["packages"]) == sorted(expected)


def test_every_source_of_the_extension_is_listed():
    (module,) = SETUPTOOLS["ext-modules"]
    native = ROOT / "backends" / "native"
    for key, pattern in (("sources", "*.cpp"), ("depends", "*.h")):
        assert sorted(module[key]) == sorted(str(path.relative_to(ROOT)) for path in native.glob(pattern))
