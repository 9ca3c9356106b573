"""A campaign over many cases in several processes, which are watched from outside: none that dies or hangs is lost."""

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import time
import tracemalloc
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign import limits, standin
from tests.campaign.cases import Case, Special, make
from tests.campaign.inputs import bases
from tests.campaign.verdict import Bench, Verdict

CHUNK = 500
KEPT = 10  # inputs of failures that are alike
TRACED_EVERY = 2000  # cases whose memory is measured by tracemalloc, which is slow
# After which a process that does not answer is killed, whatever it waits in.
SILENT_SECONDS = 90.0
REPORT_SECONDS = 15.0


@dataclass
class Tally:
    """What a chunk of cases, or all of them, came to."""

    cases: int = 0
    outcomes: Counter = field(default_factory=Counter)
    entries: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    failures: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter = field(default_factory=Counter)  # of failures that are alike
    causes: Counter = field(default_factory=Counter)  # what boundaries have caught
    slowest: tuple[float, int, str] = (0.0, -1, "")  # seconds a megabyte, case, kind
    largest: tuple[int, int, str] = (0, -1, "")  # rise of the peak in bytes, case, kind
    traced: tuple[float, int, str] = (0.0, -1, "")  # bytes allocated by Python, at once

    def add(self, case: Case, verdict: Verdict, traced: int) -> None:
        self.cases += 1
        self.outcomes[verdict.outcome] += 1
        self.entries[case.entry, verdict.outcome if not verdict.failed else "failed"] += 1
        for kind in case.kind.split(" and "):
            self.kinds[kind] += 1
        if verdict.cause:
            self.causes[verdict.cause] += 1
        if verdict.failed:
            self.fail(case.number, verdict)
        rate = verdict.seconds / max(1.0, case.nbytes / limits.MEGABYTE)
        self.slowest = max(self.slowest, (rate, case.number, f"{case.kind} of {case.base.name}"))
        self.largest = max(self.largest, (verdict.memory, case.number, f"{case.kind} of {case.base.name}"))
        self.traced = max(self.traced, (traced, case.number, f"{case.kind} of {case.base.name}"))

    def fail(self, number: int, verdict: Verdict) -> None:
        self.counts[verdict.signature] += 1
        if len(self.failures[verdict.signature]) < KEPT:
            self.failures[verdict.signature].append((number, verdict.told))

    def merge(self, other: "Tally") -> None:
        self.cases += other.cases
        for name in ("outcomes", "entries", "kinds", "counts", "causes"):
            getattr(self, name).update(getattr(other, name))
        for signature, found in other.failures.items():
            self.failures[signature] = (self.failures[signature] + found)[:KEPT]
        for name in ("slowest", "largest", "traced"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

    @property
    def failed(self) -> int:
        return sum(self.counts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "outcomes": dict(self.outcomes.most_common()),
            "entries": {" ".join(key): count for key, count in sorted(self.entries.items())},
            "kinds": dict(sorted(self.kinds.items())),
            "causes": dict(self.causes.most_common()),
            "failures": dict(self.counts.most_common()),
            "slowest": self.slowest,
            "largest": self.largest,
            "traced": self.traced,
        }


def learned(root: Path) -> Bench:
    """A bench that has read every valid input in every way, so that all that is imported late has been."""
    bench = Bench(root)
    for base in bases().values():
        for entry in dict.fromkeys(base.reads):
            if not base.name.startswith("adapter"):
                bench.learn(Case(-1, base, entry, "none", {}, False, dict(base.options), Random(1)))
    return bench


def run_cases(bench: Bench, seed: int, numbers: range, told=lambda number: None) -> Tally:
    """Those cases, here and now; told is called before each."""
    tally = Tally()
    for number in numbers:
        told(number)
        case = make(seed, number)
        if traced := number % TRACED_EVERY == 1:
            tracemalloc.start()
        verdict = bench.run(case)
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        tracemalloc.stop()
        tally.add(case, verdict, peak)
    return tally


# --- processes -------------------------------------------------------------------------------------


class _Worker:
    """A process that is given chunks of cases, one after the other."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._seed = root, seed
        self.current = multiprocessing.Value("q", -1)
        self.numbers = range(0)
        self.changed = time.perf_counter()
        self._last = -1
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        folder = Path(tempfile.mkdtemp(dir=self._root)) / "bench"
        arguments = (folder, self._seed, theirs, self.current)
        self.process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        self.process.start()
        theirs.close()

    def give(self, numbers: range) -> None:
        self.numbers, self.changed = numbers, time.perf_counter()
        self.current.value = numbers.start
        self.pipe.send(numbers)

    def hangs(self) -> bool:
        if self.current.value != self._last:
            self._last, self.changed = self.current.value, time.perf_counter()
        return time.perf_counter() - self.changed > SILENT_SECONDS

    def died(self) -> tuple[int, str]:
        """The case that the process died in, or was killed in, and how; there is a new process."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        number, code = self.current.value, self.process.exitcode
        self._start()
        return number, f"the process ended with {code}"


def _work(root: Path, seed: int, pipe, current) -> None:
    """What a process does: chunks of cases, until it is told that there are no more."""
    log = os.open(root.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with standin.installed():
        bench = learned(root)
        limits.limit_memory()

        def told(number: int) -> None:
            current.value = number

        while (numbers := pipe.recv()) is not None:
            pipe.send(run_cases(bench, seed, numbers, told))
    os._exit(0)


def campaign(cases: int, seed: int, jobs: int, keep: Path, first: int = 0) -> Tally:
    """All cases, the inputs of failures kept in a folder."""
    bases()
    tally, began, reported = Tally(), time.perf_counter(), time.perf_counter()
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="campaign-", dir=shared))
    chunks = deque(range(at, min(at + CHUNK, first + cases)) for at in range(first, first + cases, CHUNK))
    workers, shown = [_Worker(root, seed) for _ in range(jobs)], set[str]()
    try:
        busy = [worker for worker in workers if _next(worker, chunks)]
        while busy:
            multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=1)
            for worker in list(busy):
                if _answered(worker, tally, chunks) and not _next(worker, chunks):
                    busy.remove(worker)
            if time.perf_counter() - reported > REPORT_SECONDS:
                reported = time.perf_counter()
                rate = tally.cases / (reported - began)
                print(f"{tally.cases:,} cases, {rate:,.0f} a second, {tally.failed} failures", flush=True)
                for signature in [each for each in tally.counts if each not in shown]:
                    shown.add(signature)
                    print(f"case {tally.failures[signature][0][0]}: {signature}", flush=True)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
        shutil.rmtree(root, ignore_errors=True)
    for signature, found in tally.failures.items():
        for number, told in found:
            keep_input(keep, make(seed, number), seed, f"{signature}\n{told}")
    return tally


def _next(worker: _Worker, chunks: deque[range]) -> bool:
    if not chunks:
        return False
    worker.give(chunks.popleft())
    return True


def _answered(worker: _Worker, tally: Tally, chunks: deque[range]) -> bool:
    """Whether the process waits for a chunk. One that died in a case has been replaced, and what lies before and
    behind that case is to be done again."""
    try:
        if worker.pipe.poll():
            tally.merge(worker.pipe.recv())
            return True
        if worker.process.is_alive() and not worker.hangs():
            return False
    except (EOFError, OSError):
        pass
    number, how = worker.died()
    tally.cases += 1
    tally.outcomes["died"] += 1
    tally.fail(number, Verdict("died", how, 0.0, 0))
    rest = range(worker.numbers.start, number), range(number + 1, worker.numbers.stop)
    chunks.extendleft(numbers for numbers in rest if numbers)
    return True


def keep_input(keep: Path, case: Case, seed: int, told: str) -> Path:
    """The input of a failure as files, with what was wrong and the line that runs it again."""
    folder = keep / str(case.number)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (case.base.files | case.files).items():
        shown = folder / name
        shown.write_bytes(f"{data}".encode() if isinstance(data, Special) else data)
    again = f"python -m tests.campaign fuzz --seed {seed} --case {case.number}"
    lines = [told, f"{case.kind} of {', '.join(case.files)} in {case.base.name}, by {case.entry} {case.options}", again]
    (folder / "FAILURE.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    return folder
