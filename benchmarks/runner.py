"""Times candidates against each other: a process each, in turns, so that none disturbs or is favoured by the hour.

A candidate's process waits on a pipe while the others run. Its first call, which may compile, is compared with the
float64 reference and not timed: a wrong result is an error, not a time.
"""

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_core.benchmarks import ours
from mamba_core.benchmarks.cases import Case, expected
from mamba_core.benchmarks.floors import FLOORS
from mamba_core.benchmarks.frameworks import Timed
from mamba_core.benchmarks.peers import PEERS
from mamba_core.spec.tolerances import relative_l2

# Relative L2 errors beyond which it is another function: how exact the same one is, the tests ask of ours, and others'
# scans round more than ours may.
WRONG = {"float32": 1e-3, "bfloat16": 1e-1}
# A turn begins with a call that is not timed, because the system may have taken back what was freed since the last, and
# to have it again can cost more than the call; one longer than LONG seconds is the turn. Then it has as many calls as
# BRIEF seconds hold, and FEWEST at least: a virtual machine's host may take memory at any time.
LONG, BRIEF, FEWEST = 5.0, 0.5, 3
# Seconds. A call longer than this is made once: its first is its memory and its only turn, compiled or not.
ONCE = 30.0
# Bytes that a candidate may keep beside its inputs while the others run, as MLX does for its next call.
KEPT = 2**30


class Settings(NamedTuple):
    """rounds: turns of each candidate. budget: seconds after which it has no more. limit: seconds for one answer."""

    rounds: int = 9
    budget: float = 30.0
    limit: float = 900.0
    threads: int = 1


class CandidateError(Exception):
    """A candidate cannot go on. `absent` if that is because something is not installed."""

    def __init__(self, reason: str, absent: bool = False):
        super().__init__(reason)
        self.absent = absent


def candidates(case: Case, backends: list[str]) -> dict[str, tuple[str, Callable]]:
    """Name -> (role, how it is made from the case): ours, then the peers, then the floor."""
    found = {name: ("ours", make) for name, make in ours.candidates(case, backends).items()}
    found |= {name: ("peer", PEERS[name]) for name in case.peers}
    return found | ({f"floor: {case.floor}": ("floor", FLOORS[case.floor])} if case.floor else {})


def measure(case: Case, entrants: Mapping[str, tuple[str, Callable]], settings: Settings, log=None, start=None) -> dict:
    """Everything that the report needs of a case.

    Args:
        entrants: as `candidates` gives them.
        log: called with a line before each step.
        start: (make, case, threads) -> a `Worker`, or what has its `ask` and `close`.
    """
    log, start = log or (lambda line: None), start or Worker
    workers = {name: start(make, case, settings.threads) for name, (_, make) in entrants.items()}
    entries = {name: {"role": role} for name, (role, _) in entrants.items()}

    def ask(name, command):
        """The answer, or None from one that cannot go on, whose entry then says why."""
        log(f"{case.name}: {name}, {command}")
        try:
            return workers[name].ask(command, settings.limit) if "error" not in entries[name] else None
        except CandidateError as fault:
            entries[name] |= {"error": str(fault), "absent": fault.absent}
            return None

    try:
        right = expected(case)
        for name, entry in entries.items():
            result = ask(name, "first")
            right = _check(entry, case, result, right)
            entry |= ask(name, "memory") or {}
        turns = {name: partial(ask, name, "turn") for name, entry in entries.items() if "error" not in entry}
        for name, seconds in alternate(turns, settings).items():
            entries[name]["seconds"] = [taken / case.parts for taken in seconds]
    finally:
        for worker in workers.values():
            worker.close()
    return describe(case) | {"candidates": summary(entries, case)}


def alternate(
    turns: Mapping[str, Callable[[], float | None]], settings: Settings, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Every candidate's seconds, one of each turn: round by round, and each round is begun by another.

    One that has used its budget, or whose turn gave None, has no more turns.
    """
    names, left = list(turns), dict.fromkeys(turns, settings.budget)
    seconds = {name: [] for name in names}
    for index in range(settings.rounds if names else 0):
        first = index % len(names)
        for name in [name for name in names[first:] + names[:first] if left[name] > 0]:
            started = clock()
            if (taken := turns[name]()) is None:
                left[name] = 0
                continue
            seconds[name].append(taken)
            left[name] -= clock() - started
    return seconds


def summary(entries: Mapping[str, dict], case: Case) -> dict[str, dict]:
    """The entries with their medians and quartiles, and those as ratios.

    speedup: the baseline's median by theirs. over_floor: their median by the floor's.
    """
    found = {name: entry | _quartiles(entry.get("seconds")) for name, entry in entries.items()}
    baseline = found.get(case.baseline, {}).get("median")
    floor = next((entry.get("median") for entry in found.values() if entry["role"] == "floor"), None)
    for entry in found.values():
        if "median" in entry and entry["role"] != "floor":
            entry |= {"speedup": baseline / entry["median"]} if baseline else {}
            entry |= {"over_floor": entry["median"] / floor} if floor else {}
    return found


def describe(case: Case) -> dict[str, Any]:
    fields = dataclasses.asdict(case) | {"config": case.config.to_dict(), "title": case.title}
    return {name: value for name, value in fields.items() if name not in ("name", "peers")}


def _check(entry: dict, case: Case, result: list | None, right: list | None) -> list | None:
    """Enters the error of a result; returns what the next must equal, which is this one where nothing is known."""
    if result is None or "error" in entry:
        return right
    if right is None:
        return result
    entry["difference"] = max(relative_l2(value, expected) for value, expected in zip(result, right, strict=True))
    if not entry["difference"] <= WRONG[case.dtype]:
        entry["error"] = f"its result is wrong: relative L2 error {entry['difference']:.1e}"
    return right


def _quartiles(seconds: list[float] | None) -> dict:
    if not seconds:
        return {}
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "quartiles": [low, high]}


class Worker:
    """A candidate in a process of its own, made at once; `ask` waits for an answer."""

    def __init__(self, make: Callable, case: Case, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, case, threads), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, command: str, limit: float) -> Any:
        """The answer to "first", "memory" or "turn"; see `_Served`.

        Raises:
            CandidateError: it failed, died, or took longer than `limit` seconds.
        """
        try:
            self.pipe.send(command)
            if not self.pipe.poll(limit):
                self.close()
                raise CandidateError(f"took more than {limit:.0f} s")
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise CandidateError(f"its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, CandidateError):
            raise answer
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def _serve(pipe, make: Callable, case: Case, threads: int) -> None:
    """The worker's process: answers until its parent ends."""
    served, fault = None, None
    try:
        _limit_threads(threads)
        served = _Served(make(case))
    except Exception as error:
        fault = _fault(error)
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        try:
            answer = fault or getattr(served, command)()
        except Exception as error:
            answer = fault = _fault(error)
        pipe.send(answer)


def _fault(error: Exception) -> CandidateError:
    reason = " ".join(str(error).split())
    return CandidateError(f"{type(error).__name__}: {reason}"[:300], absent=isinstance(error, ImportError))


def _limit_threads(threads: int) -> None:
    """Before a framework is imported. JAX and MLX count the cores that the process may run on."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class _Served:
    """What a worker is asked for."""

    def __init__(self, timed: Timed):
        self.timed = timed
        self.seconds, self.sizes, self.turns = 0.0, {}, 0
        self.keeps_much = False

    def first(self) -> list[np.ndarray] | None:
        """The result of the first call, None if it is not to be compared."""
        result = self._watched_call()
        return None if self.timed.arrays is None else self.timed.arrays(result)

    def memory(self) -> dict[str, int]:
        """extra_bytes: the most memory during a call beyond that before it. peak_bytes: the most in all."""
        # Where the most cannot be forgotten (not Linux), what the first call added to it, which may have compiled.
        if self.seconds <= ONCE and _forget_most_resident():
            self._watched_call()
        _release()
        return self.sizes

    def turn(self) -> float | None:
        """Seconds of a call; None where there will be no other."""
        self.turns += 1
        if self.seconds > ONCE:
            return self.seconds if self.turns == 1 else None
        taken = self._timed_calls()
        if self.keeps_much:
            _release()
        return taken

    def _watched_call(self) -> Any:
        """Its result; keeps what it took."""
        _release()
        forgotten = _forget_most_resident()
        held, before = _status("VmRSS") if forgotten else 0, _most_resident()
        started = time.perf_counter()
        result = self.timed.call()
        self.seconds = time.perf_counter() - started
        if forgotten:
            peak = _status("VmHWM")
            self.sizes = {"extra_bytes": max(0, peak - held), "peak_bytes": peak}
            self.keeps_much = _status("VmRSS") - held > KEPT
        else:
            peak = _most_resident()
            self.sizes = {"extra_bytes": peak - before, "peak_bytes": peak}
        return result

    def _timed_calls(self) -> float:
        first = _seconds(self.timed.call)
        if first >= LONG:
            return first
        taken = []
        while sum(taken) < BRIEF or len(taken) < FEWEST:
            taken.append(_seconds(self.timed.call))
        return statistics.median(taken)


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _release() -> None:
    """Gives back to the system what was freed, so that it does not hide what a call needs."""
    gc.collect()
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_most_resident() -> bool:
    """Whether the system could."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _most_resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
