"""Command lines that start at once: a process that has imported a backend forks a child for each.

    python -m tests.campaign.kills.warm BACKEND

It reads a line of JSON a command, and answers with the child's id and then with its exit status.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# One thread, so that a run's bits are those of another run.
SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
SECONDS = 300.0  # for a command of seconds, on a busy machine


class Child:
    """A command that runs. output: the file of what it says."""

    def __init__(self, server: "Warm", pid: int, output: Path) -> None:
        self.pid, self.output, self._server = pid, output, server
        self._status: int | None = None

    def wait(self) -> int:
        """The exit status, or the negative number of the signal that ended it."""
        try:
            self._status = int(self._server.answer()) if self._status is None else self._status
        except RuntimeError:
            os.kill(self.pid, signal.SIGKILL)
            self._status = int(self._server.answer())
            raise
        return self._status

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def said(self) -> str:
        return self.output.read_text(errors="replace")


class Warm:
    """The process that has imported a backend, and forks."""

    def __init__(self, backend: str) -> None:
        line = [sys.executable, "-m", "tests.campaign.kills.warm", backend]
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | SETTINGS | {"MAMBA_CORE_BACKEND": backend}, cwd=Path(__file__).parents[3],
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.answer()

    def answer(self) -> str:
        """The next line. Raises RuntimeError for a command that hangs, or where the process has ended."""
        try:
            return self._lines.get(timeout=SECONDS)
        except queue.Empty:
            raise RuntimeError(f"no answer in {SECONDS:.0f} s") from None

    def _read(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            self._lines.put(line.strip())

    def start(self, argv: list[str], output: Path, *, stopped: bool = False, snapshots: Path | None = None) -> Child:
        """Begin a command. stopped: it waits for SIGCONT. snapshots: a folder for a copy of each checkpoint."""
        order = {"argv": argv, "output": str(output), "stopped": stopped, "snapshots": snapshots and str(snapshots)}
        self._process.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return Child(self, int(self.answer()), output)

    def run(self, argv: list[str], output: Path, **settings) -> int:
        """The exit status of a command that is left alone."""
        return self.start(argv, output, **settings).wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def warm(backend: str) -> Iterator[Warm]:
    server = Warm(backend)
    try:
        yield server
    finally:
        server.close()


def wait_until_stopped(pid: int) -> None:
    began = time.perf_counter()
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "tT":
        if time.perf_counter() - began > SECONDS:
            raise RuntimeError(f"process {pid} does not stop")
        time.sleep(0.001)


# --- the process that forks ------------------------------------------------------------------------


def _serve() -> None:
    from mamba_core import registry, training  # noqa: F401
    from mamba_core.cli import convert, main, train  # noqa: F401

    registry.get(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if not (pid := os.fork()):
            _child(order, main)
        print(pid, flush=True)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(order: dict, main) -> None:
    """Never returns."""
    status = 70
    try:
        file = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if order["snapshots"]:
            _keep_snapshots(Path(order["snapshots"]))
        if order["stopped"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        status = main(order["argv"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _keep_snapshots(folder: Path) -> None:
    """Copy each checkpoint that training writes, under the number of its steps."""
    modules = [module for name, module in sys.modules.items() if name.startswith("mamba_core.")]
    saving = [module for module in modules if callable(getattr(module, "save_checkpoint", None))]

    def keep(path, model, trainer, progress, *arguments, save=saving[0].save_checkpoint, **settings):
        save(path, model, trainer, progress, *arguments, **settings)
        shutil.copytree(path, folder / str(len(progress["history"])))

    for module in saving:
        module.save_checkpoint = keep  # type: ignore[attr-defined]


if __name__ == "__main__":
    _serve()
