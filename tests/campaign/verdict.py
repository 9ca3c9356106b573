"""One case from its files to its verdict: accepted, refused with one line, or a failure of a kind."""

import os
import re
import shutil
import socket
import traceback
from pathlib import Path
from typing import NamedTuple

from mamba_core.weights.formats import CheckpointError
from tests.campaign import limits
from tests.campaign.cases import Case, Special
from tests.campaign.entries import ENTRIES, SECRET, CommandError, InconsistentError
from tests.campaign.inputs import Base

MAX_MESSAGE = 2048
_TRACEBACK = re.compile(r'Traceback|File "|\.py", line|panicked at')
# What is documented beside CheckpointError: of every entry, for what was asked for, and of some.
_EXPECTED = (ValueError,)
_DOCUMENTED: dict[str, tuple[type[BaseException], ...]] = {
    "config": (TypeError, OSError),
}


class Verdict(NamedTuple):
    """outcome: "accepted", "refused", or the kind of failure. told: the message, or what is wrong.

    seconds: processor time. memory: bytes by which the peak of the process rose. cause: the kind of exception, and the
    function, that a boundary has turned into the error, where no file should cause one of that kind.
    """

    outcome: str
    told: str
    seconds: float
    memory: int
    cause: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in ("accepted", "refused")

    @property
    def signature(self) -> str:
        """The same for failures that are alike: the kind, and the message without what is particular."""
        return f"{self.outcome}: {re.sub(r'[0-9]+', '#', self.told.splitlines()[0] if self.told else '')[:90]}"


class Bench:
    """A folder of a process's own, in which every valid input lies, and one case after the other is made of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir(parents=True)
        (self.root / "secret").write_bytes(SECRET)
        self.guard, self.clock = limits.Guard(root), limits.Clock()
        self._whole: dict[tuple[str, str], dict] = {}
        self._laid: set[str] = set()

    def run(self, case: Case) -> Verdict:
        folder = self._lay(case.base)
        for name, data in case.files.items():
            put(folder, name, data)
        try:
            return self._judged(case, folder)
        finally:
            for name in case.files:
                put(folder, name, case.base.files[name])
            shutil.rmtree(self.root / "converted", ignore_errors=True)

    def learn(self, case: Case) -> None:
        """What is read of the valid input. It must be accepted."""
        target = self._lay(case.base) / case.base.target
        self._whole[case.base.name, case.entry] = ENTRIES[case.entry](target, case)
        shutil.rmtree(self.root / "converted", ignore_errors=True)

    def _lay(self, base: Base) -> Path:
        folder = self.root / base.name
        if base.name not in self._laid:
            folder.mkdir()
            for name, data in base.files.items():
                put(folder, name, data)
            self._laid.add(base.name)
        return folder

    def _judged(self, case: Case, folder: Path) -> Verdict:
        target = self._file_of(case, folder)
        self.guard.broken.clear()
        before, fault, read = limits.peak_memory(), None, {}
        self.guard.armed = True
        self.clock.start(case.nbytes)
        try:
            read = ENTRIES[case.entry](target, case)
        except BaseException as raised:  # whatever a reader raises is judged
            fault = raised
        try:
            seconds = self.clock.stop()
        except limits.SlowError:
            seconds = self.clock.stop()
        self.guard.armed = False
        memory = limits.peak_memory() - before
        outcome, told = self._outcome(case, fault, read, memory)
        if isinstance(fault, KeyboardInterrupt):
            raise fault
        return Verdict(outcome, told, seconds, memory, _cause(fault))

    def _file_of(self, case: Case, folder: Path) -> Path:
        """What is given to the entry: the input's target, or for single files one that was changed."""
        if case.entry == "file" and not case.base.target:
            changed = sorted(case.files)[0]
            shard = re.match(r"model-\d+-of", changed)
            return folder if shard else folder / changed
        return folder / case.base.target

    def _outcome(self, case: Case, fault: BaseException | None, read: dict, memory: int) -> tuple[str, str]:
        if self.clock.rang:
            return "slow", f"{case.kind}: {fault}"
        if self.guard.broken:
            return self.guard.broken[0].split(":")[0], "; ".join(self.guard.broken[:5])
        if memory > limits.allowed_memory(case.nbytes):
            return "memory", f"{case.kind}: {memory / 2**20:.0f} MiB for {case.nbytes} bytes"
        if left := self._left(fault):
            return "leftover", left
        if isinstance(fault, InconsistentError):
            return "inconsistent", f"{case.entry}: {fault}"
        if fault is not None:
            return _refusal(case, fault, str(self.root))
        if case.covered and not self._same(case, read):
            return "unchecked", f"{case.kind}: {case.entry} accepted a change that a checksum covers"
        return "accepted", ""

    def _same(self, case: Case, read: dict) -> bool:
        whole = self._whole.get((case.base.name, case.entry), {})
        return all(read[name] == value for name, value in whole.items() if name in read)

    def _left(self, fault: BaseException | None) -> str:
        """Partial files beside the target, and a target that should not be there."""
        found = set(os.listdir(self.root)) - self._laid - {"secret"}
        allowed = {"converted"} if fault is None or isinstance(fault, InconsistentError) else set()
        return ", ".join(sorted(found - allowed))


def _refusal(case: Case, fault: BaseException, root: str) -> tuple[str, str]:
    if isinstance(fault, CommandError):
        return "command", str(fault)
    allowed = (*_EXPECTED, *_DOCUMENTED.get(case.entry, ()))
    message = str(fault)
    if not isinstance(fault, allowed) or isinstance(fault, UnicodeError):
        return f"exception {type(fault).__name__}", f"{_place(fault)}: {message[:300]}"
    if len(message) > MAX_MESSAGE:
        return "long message", f"{_place(fault)}: {len(message)} characters: {message[:200]}"
    if _TRACEBACK.search(message) or not message.strip():
        return "traceback in the message", f"{_place(fault)}: {message[:300]}"
    if isinstance(fault, CheckpointError) and ("\n" in message or not message.isprintable()):
        return "several lines", f"{_place(fault)}: {message[:300]!r}"
    named = (root, *case.base.files)
    if isinstance(fault, CheckpointError) and not any(name in message for name in named):
        return "no name in the message", f"{_place(fault)}: {message[:300]}"
    return "refused", message


def _cause(fault: BaseException | None) -> str:
    cause = fault.__cause__ if isinstance(fault, CheckpointError) else None
    if cause is None or isinstance(cause, (ValueError, OSError, RecursionError)) or type(cause) is Exception:
        return ""
    return f"{type(cause).__name__} in {_place(cause)}"


def _place(fault: BaseException) -> str:
    """The last function of this project that the fault came through."""
    frames = [frame for frame in traceback.extract_tb(fault.__traceback__) if "tests/campaign" not in frame.filename]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    frame = (own or frames or traceback.extract_tb(fault.__traceback__))[-1:]
    return f"{Path(frame[0].filename).name}:{frame[0].name}" if frame else "no place"


def put(folder: Path, name: str, data: bytes | Special) -> None:
    """A file, or what stands in its place, anew: whoever has the old one mapped keeps it."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if not isinstance(data, Special):
        path.write_bytes(data)
    elif data.kind == "link":
        path.symlink_to({"SELF": name, "SECRET": "../secret"}.get(data.value, data.value))
    elif data.kind == "fifo":
        os.mkfifo(path)
    elif data.kind == "folder":
        path.mkdir()
    elif data.kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif data.kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(data.value)
