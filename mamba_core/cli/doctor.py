"""mamba-core doctor: try every kernel that runs here against its op's reference or plain kernel, and write a report.

The exit status is 0 if all passed, 1 if something is wrong, 2 for bad input. The report has no paths and no names of
people. Each backend is tried in a process of its own, which a kernel may end.
"""

import argparse
import json
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mamba_core import environment, registry
from mamba_core.backends.gpu import nvrtc
from mamba_core.backends.native import library
from mamba_core.selftest import LINE, LONGEST, Row, without_paths
from mamba_core.version import VERSION

PACKAGES = ("numpy", "ml_dtypes", "torch", "triton", "mlx", "mlx-metal", "jax", "jaxlib", "libtpu", "flax")
COLUMNS = ["backend", "device", "op", "kernel", "verdict"]
REPORT = "mamba-core-doctor.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help=f"{', '.join(registry.names())}; every one that is installed")
    parser.add_argument("--kernel", metavar="NAME", help="the kernels of this name alone")
    parser.add_argument("--out", type=Path, default=Path(REPORT), metavar="FILE", help=f"the report; {REPORT}")
    parser.add_argument("--json", action="store_true", help="print the report")


def run(arguments: argparse.Namespace) -> int:
    names = registry.installed() if arguments.backend is None else [arguments.backend]
    if not names:
        raise ImportError("no framework is installed; pip install 'mamba_core[torch]', or [mlx], or [jax]")
    for name in names:
        _check_backend(name)
    if not arguments.out.parent.is_dir():
        raise ValueError(f"{arguments.out.parent} is no folder; --out is a file in one that exists")
    devices: dict[str, dict] = {}
    rows = [row for name in names for row in judged(name, arguments.kernel, devices, quiet=arguments.json)]
    if arguments.kernel is not None:
        _check_kernel(arguments.kernel, rows)
    report = facts() | {"devices": devices, "kernels": [row._asdict() for row in rows]}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _show(rows, arguments.out)
    return 1 if any(row.verdict == "failed" for row in rows) else 0


def facts() -> dict:
    """What an issue should say of the machine and of what is installed."""
    found = {"mamba_core": VERSION, "python": platform.python_version(), "system": platform.platform()}
    found |= {"processor": platform.processor() or platform.machine()}
    compilers = {"python": platform.python_compiler(), "NVRTC": nvrtc.missing() or "found"}
    compilers |= {"CPU kernels": library.missing() or "built"}
    variables = {
        name: "(a path)" if "/" in value or "\\" in value else without_paths(value)
        for name, value in environment.values_set().items()
    }
    compilers = {name: without_paths(text) for name, text in compilers.items()}
    return found | {"packages": _packages(), "compilers": compilers, "environment": variables}


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def judged(name: str, kernel: str | None, devices: dict[str, dict], quiet: bool = True) -> Iterator[Row]:
    """A row for each kernel of a backend. A process that a kernel ends is followed by another, for the rest."""
    done: list[list[str]] = []
    while True:
        begun = None
        process = _start(name, kernel, done)
        with _Deadline(process) as deadline:
            for line in process.stdout or ():
                if not line.startswith(LINE):
                    continue
                deadline.restart()
                told = json.loads(line.removeprefix(LINE))
                if "devices" in told:
                    devices[name] = told["devices"]
                elif "fault" in told:
                    yield Row(name, "-", "-", "-", "failed", (told["fault"],))
                elif "begin" in told:
                    begun = Row(*told["begin"])
                    done.append([begun.device, begun.op, begun.kernel])
                    if not quiet:
                        print(f"mamba-core: {name}: {begun.op} by {begun.kernel} on {begun.device}", file=sys.stderr)
                else:
                    begun = None
                    row = Row(*told["row"])
                    yield row._replace(details=tuple(row.details))
        status = process.wait()
        if status == 0:
            return
        ended = f"its process ended with {_name(status)}"
        if begun is None:
            yield Row(name, "-", "-", "-", "failed", (ended,))
            return
        yield begun._replace(verdict="failed", details=(ended,))


def _start(name: str, kernel: str | None, done: list[list[str]]) -> subprocess.Popen:
    code = f"from mamba_core import selftest; selftest.work({name!r}, {kernel!r}, {done!r})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


class _Deadline:
    """Ends a process that says nothing for longer than a trial may take."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.restart()

    def restart(self) -> None:
        self.cancel()
        self._timer = threading.Timer(LONGEST + 60, self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        if (timer := getattr(self, "_timer", None)) is not None:
            timer.cancel()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cancel()


def _name(status: int) -> str:
    if status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            return f"signal {-status}"
    return f"status {status}"


def _check_backend(name: str) -> None:
    """Without an import of the framework: on some devices one process alone can compute."""
    if name not in registry.names():
        raise ValueError(f"no backend {name!r}; expected one of {', '.join(registry.names())}")
    if missing := registry.missing_packages(name):
        raise ImportError(f"backend {name!r} needs {', '.join(missing)}; pip install 'mamba_core[{name}]'")


def _check_kernel(kernel: str, rows: list[Row]) -> None:
    if not rows:
        raise ValueError(f"no kernel {kernel!r}; `mamba-core info` lists them")
    if all(row.verdict == "cannot run" for row in rows):
        raise ValueError(f"kernel {kernel!r} cannot run here: {rows[0].details[0]}")


def _show(rows: list[Row], out: Path) -> None:
    """By rich where it is installed."""
    try:
        from mamba_core.cli.output import print_table
    except ImportError:
        print_table = _print_plain
    print_table(f"mamba_core {VERSION}", COLUMNS, [[getattr(row, name) for name in COLUMNS] for row in rows])
    for row in rows:
        if row.verdict == "failed":
            print(f"{row.backend} {row.op} by {row.kernel} on {row.device} failed: {row.details[0]}")
    failed = sum(row.verdict == "failed" for row in rows)
    print(f"{failed} failed; the report is {out}" + (", for an issue" if failed else ""))


def _print_plain(title: str, columns: list[str], rows: list[list]) -> None:
    widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in [columns, *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
