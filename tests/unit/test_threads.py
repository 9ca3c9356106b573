"""What a process shares: the threads of the native library, its own or those of torch's OpenMP, and freed memory."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from mamba_core.backends.native import library
from tests.unit.native_arrays import scan

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}")

# What is to run in a process of its own: torch in it, the scan on so many threads, and how many threads there are.
BEGIN = """
import os
import numpy as np
from tests.unit.native_arrays import scan
rng = np.random.default_rng(0)
arrays = {name: rng.normal(size=(2, 512, 96)).astype("f") for name in ("x", "delta")}
arrays |= {name: rng.normal(size=(2, 512, 16)).astype("f") for name in ("B", "C")}
arrays["A"] = -np.ones((96, 16), "f")
count = lambda: len(os.listdir("/proc/self/task"))
"""


def run(code: str) -> str:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-c", BEGIN + code], env=environment, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the threads of a process by /proc")


@linux
def test_own_threads_end_with_the_call():
    assert run("before = count(); scan(2, delta_softplus=True, **arrays); print(count() - before)") == "0"


@linux
def test_torch_s_threads_are_used():
    pytest.importorskip("torch")
    code = """
import torch
if "libgomp" not in open("/proc/self/maps").read():
    print("no GNU OpenMP")
    raise SystemExit
alone = scan(2, delta_softplus=True, **arrays)
import mamba_core.backends.torch as backend
before = count()
scan(2, delta_softplus=True, **arrays)
assert count() == before, "the import changes nothing"
x = torch.ones(1, 2, 3)
op = backend.op("selective_scan")
op.selective_scan(x, x, -torch.ones(3, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4), kernel="native")
together = scan(2, delta_softplus=True, **arrays)
print(count() - before, all(np.array_equal(a, b) for a, b in zip(alone, together)))
"""
    found = run(code)
    if found == "no GNU OpenMP":
        pytest.skip(found)
    assert found == "1 True"  # the runtime's helper stays


@linux
def test_a_fork_has_threads_again():
    pytest.importorskip("torch")
    code = """
import torch
from mamba_core.backends.torch.kernels.native_tensors import share_threads
share_threads()
wanted, *_ = scan(2, delta_softplus=True, **arrays)
if (child := os.fork()) == 0:
    found, *_ = scan(2, delta_softplus=True, **arrays)
    os._exit(0 if np.array_equal(found, wanted) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "0"


@pytest.mark.parametrize(
    ("wanted", "threads"), [("3", 3), (" 3 ", 3), ("3,2", 3), ("", None), ("0", None), ("-1", None), ("many", None)]
)
def test_the_environment_says_how_many_threads(monkeypatch, wanted, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = library.threads()
    assert cores >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert library.threads() == (threads or cores)


def test_no_openmp_in_the_process_is_no_error(monkeypatch):
    def missing(*_, **__):
        raise OSError("no such file")

    monkeypatch.setattr(library.ctypes, "CDLL", missing)
    library.use_openmp()
    x = np.ones((1, 4, 3), np.float32)
    y, *_ = scan(2, x=x, delta=x, A=-np.ones((3, 1), np.float32), B=x[..., :1], C=x[..., :1])
    assert np.isfinite(y).all()


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
# How much longer the heap is after torch had ten arrays of 16 MB.
KEPT = """
import torch
import mamba_core as mc
mc.build(mc.MambaConfig(d_model=8, n_layer=1, vocab_size=8), backend="torch", device="cpu")

def heap_end():
    heap, = (line.split()[0].split("-")[1] for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
    return int(heap, 16)

before = heap_end()
arrays = [torch.empty(2**24, dtype=torch.uint8) for _ in range(10)]
del arrays
print(heap_end() - before)
"""


@linux
@glibc
def test_torch_s_arrays_are_of_memory_that_is_kept():
    """In the heap, whose free end stays for the next arrays; what glibc maps by itself goes back when it is freed."""
    pytest.importorskip("torch")
    assert int(run(KEPT)) > 100 * 2**20


@linux
@glibc
def test_an_import_changes_no_setting_of_the_process():
    pytest.importorskip("torch")
    without_a_model = "\n".join(line for line in KEPT.splitlines() if not line.startswith("mc.build"))
    code = "\nimport mamba_core.backends.torch as backend\nprint(sorted(backend.in_force().values()))"
    kept, settings = run(without_a_model + code).splitlines()
    assert int(kept) < 2**20
    assert "until a model is built" in settings
    assert "until the first call" in settings


@linux
@glibc
def test_the_environment_may_forbid_both(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("MAMBA_CORE_TUNE", "0")
    monkeypatch.setenv("MAMBA_CORE_OPENMP", "0")
    code = "\nimport mamba_core.backends.torch as backend\nprint(*backend.in_force().values(), sep=chr(10))"
    kept, malloc, threads = run(KEPT + code).splitlines()
    assert int(kept) < 2**20
    assert "MAMBA_CORE_TUNE=0" in malloc
    assert "MAMBA_CORE_OPENMP=0" in threads


@linux
@glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "9999"), ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_threshold=9999")],
)
def test_what_the_environment_says_of_the_allocator_stays(monkeypatch, name, value):
    pytest.importorskip("torch")
    monkeypatch.setenv(name, value)
    assert int(run(KEPT)) < 2**20
