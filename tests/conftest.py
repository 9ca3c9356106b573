"""What all tests share: the options --slow and --backend, Hypothesis's profiles, and what JAX has compiled."""

import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, Phase, settings

from mamba_core import registry

# The tests' arrays are too small for threads to pay, and on a busy machine they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

for profile, examples in (("ci", 15), ("unshrunk", 15), ("local", 200)):
    settings.register_profile(
        profile,
        max_examples=int(os.environ.get("EXAMPLES", examples)),
        derandomize=profile != "local",
        phases=[phase for phase in Phase if not (profile == "unshrunk" and phase in (Phase.shrink, Phase.explain))],
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Of one run alone. Each process of it, the workers' and those that tests start, takes what another has compiled.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def pytest_configure(config):
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # a user's, or that of the run which started this process
        return
    folder = tempfile.mkdtemp(prefix="mamba-core-tests-")
    os.environ.update(COMPILED | {"JAX_COMPILATION_CACHE_DIR": folder})
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")
    parser.addoption("--backend", action="append", help="test this backend only; repeatable")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend") or registry.names()
        metafunc.parametrize("backend", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request):
    """A backend under test; skipped where its framework is not installed."""
    if missing := registry.missing_packages(request.param):
        pytest.skip(f"{', '.join(missing)} not installed")
    return registry.get(request.param)


def pytest_report_header(config):
    names = config.getoption("--backend") or registry.names()
    return "backends: " + ", ".join(
        f"{name} (missing {', '.join(missing)})" if (missing := registry.missing_packages(name)) else name
        for name in names
    )
