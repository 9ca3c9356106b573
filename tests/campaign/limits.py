"""The limits that a case runs under: time, memory, and what it may touch. What it breaks is told, whoever caught it."""

import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

MEGABYTE = 1_000_000
SECONDS = 2.0  # for a megabyte or less, and for each one more
# Beside the input itself, of which a copy or two may be made: what opcodes, headers and JSON are as objects.
MEMORY = 128 * 2**20
MEMORY_PER_BYTE = 120
HARD_MEMORY = 768 * 2**20  # private memory that the process cannot have more of
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
         "pickle.find_class", "socket.connect", "socket.bind", "os.startfile", "webbrowser.open", "ctypes.dlopen",
         "os.kill", "cpython.run_command")  # fmt: skip
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "shutil.rmtree", "shutil.copyfile", "shutil.move", "os.utime")  # fmt: skip
_OWN = tuple(str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[2]))
_OWN_READS = re.compile(r".*\.(py|pyc|so|jinja2|pth|txt)|/dev/urandom|/proc/.*")


class SlowError(BaseException):
    """A case took too long. No reader has a reason to catch this one."""


class Guard:
    """What the case that runs has broken, in words: `broken`. One a process, for audit hooks cannot be taken away."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.broken: list[str] = []
        self.armed = False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, (str, bytes)):
                self._opened(os.fsdecode(path), mode, flags or 0)
        elif event in _CHANGES:
            # The folder that a name stands in may be given as a descriptor, as rmtree does.
            names = [os.fsdecode(name) for name in arguments[:2] if isinstance(name, (str, bytes))]
            if any(not self._inside(name) for name in names if os.path.isabs(name)):
                self.broken.append(f"writes: {event} {names}")
        elif event in _RUNS and not (event == "ctypes.dlopen" and arguments[0] is None):
            self.broken.append(f"executes: {event} {arguments!r}"[:300])

    def _opened(self, path: str, mode: str | None, flags: int) -> None:
        writes = flags & _WRITES or any(letter in (mode or "") for letter in "wax+")
        if self._inside(path) or (not os.path.isabs(path) and flags & os.O_DIRECTORY):
            return
        if writes and path != os.devnull:
            self.broken.append(f"writes: open {path}")
        elif not writes and not (path.startswith(_OWN) or _OWN_READS.fullmatch(path)):
            self.broken.append(f"reads outside: {path}")

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")


class Clock:
    """Raises SlowError in the thread of a case that is past its time, and keeps that it did."""

    def __init__(self) -> None:
        self.rang = False
        self._seconds = self._began = self._waited = 0.0
        signal.signal(signal.SIGALRM, self._ring)

    def start(self, nbytes: int) -> None:
        self.rang, self._seconds = False, SECONDS * max(1.0, nbytes / MEGABYTE)
        self._began, self._waited = time.process_time(), time.perf_counter() - _queued()
        signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)

    def stop(self) -> float:
        """The seconds of processor time since the start."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        return time.process_time() - self._began

    def _ring(self, number: int, frame: object) -> None:
        # On a busy machine a case waits for its turn, which is no fault of the reader.
        spent, passed = time.process_time() - self._began, time.perf_counter() - _queued() - self._waited
        if max(spent, passed) >= 0.99 * self._seconds:
            self.rang = True
            raise SlowError(f"{spent:.1f} s of processor time, {passed:.1f} s in all")


def _queued() -> float:
    """Seconds that this process was ready to run and another one ran in its place."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def limit_memory() -> None:
    """Private memory beyond what the process has now, and no core files."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + HARD_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + 4 * HARD_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def peak_memory() -> int:
    """The most bytes that the process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def allowed_memory(nbytes: int) -> int:
    return MEMORY + MEMORY_PER_BYTE * nbytes
