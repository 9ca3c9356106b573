"""Kills and full disks at system calls, by strace."""

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.campaign.kills.random_kills import told
from tests.campaign.kills.scenarios import Scenario, expect, hidden
from tests.campaign.kills.warm import Child, Warm, wait_until_stopped

# What changes names and files.
CALLS = ("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "fsync", "fdatasync", "ftruncate",
         "write", "pwrite64", "sendfile", "copy_file_range")  # fmt: skip
# Those of which each is tried before the second write is.
SELDOM = ("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "fsync", "ftruncate")
NO_EXCHANGE = "renameat2:error=ENOSYS"
_CALL = re.compile(rf"\b({'|'.join(CALLS)})\((\d*)")
_INJECTED = re.compile(r"\b(write)\((\d+).*\(INJECTED\)")


class Point(NamedTuple):
    """The `number`-th call of a scenario.

    exchange: whether two names can be exchanged in one step there. said: it writes to standard output or error.
    """

    scenario: Scenario
    call: str
    number: int
    exchange: bool = True
    said: bool = False

    def __str__(self) -> str:
        return f"{self.scenario.name}, {self.call} {self.number}{'' if self.exchange else ', without an exchange'}"


def available() -> str | None:
    """None where strace is there and can follow a process, else why not."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, timeout=60)
    return None if done.returncode == 0 else done.stderr.strip()


def traced(scenario: Scenario, server: Warm, injections: list[str], log: Path) -> Child:
    """The scenario's command, ended, with faults injected into its system calls; the calls are in `log`."""
    child = server.start(scenario.argv, scenario.log, stopped=True)
    wait_until_stopped(child.pid)
    line = ["strace", "-f", "-p", str(child.pid), "-o", str(log), "-e", f"trace={','.join(CALLS)}"]
    line += [part for injection in injections for part in ("-e", f"inject={injection}")]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as tracer:
        for line in tracer.stderr:  # type: ignore[union-attr]
            if "attached" in line:
                break
        os.kill(child.pid, signal.SIGCONT)
        child.wait()
        tracer.stderr.read()  # type: ignore[union-attr]
    return child


def points(scenario: Scenario, server: Warm, log: Path, exchange: bool = True) -> list[Point]:
    """Every call of an undisturbed run."""
    scenario.reset()
    child = traced(scenario, server, [] if exchange else [NO_EXCHANGE], log)
    expect(child.wait() == 0, f"{scenario.name} ended with {child.wait()}: {child.said()[-500:]}")
    counts: Counter[str] = Counter()
    found = []
    for call in filter(None, map(_CALL.search, log.read_text().splitlines())):
        counts[call[1]] += 1
        found.append(Point(scenario, call[1], counts[call[1]], exchange, call[2] in ("1", "2")))
    return found


def killed_at(point: Point, server: Warm, log: Path, outcomes: Counter) -> bool:
    """Kill the run there, look, and go on. False where it did not come so far."""
    scenario = point.scenario
    scenario.reset()
    before = scenario.found()
    injections = [] if point.exchange else [NO_EXCHANGE]
    child = traced(scenario, server, [*injections, f"{point.call}:signal=KILL:when={point.number}"], log)
    if child.wait() != -signal.SIGKILL:
        expect(child.wait() == 0, f"ended with {child.wait()}: {child.said()[-500:]}")
        return False
    outcomes[told(scenario, before, scenario.found())] += 1
    scenario.go_on(server, scenario.found())
    outcomes["gone on with, to the same bits"] += 1
    return True


def full_disk(point: Point, server: Warm, log: Path, outcomes: Counter) -> bool:
    """At that call the disk is full: one line, status 2, what was there before, and nothing beside it."""
    scenario = point.scenario
    scenario.reset()
    before = scenario.found()
    child = traced(scenario, server, [f"{point.call}:error=ENOSPC:when={point.number}"], log)
    status = child.wait()
    if any(line[1] in ("1", "2") for line in _INJECTED.findall(log.read_text())):
        outcomes["full disk: where the output goes"] += 1
    elif status == 0:
        outcomes["full disk: not reached"] += 1
    else:
        expect(status == 2, f"ended with {status}")
        found = scenario.found()
        told(scenario, before, found)
        expect(_lines(child) == 1, f"said {child.said()[-500:]}")
        expect(not hidden(scenario.root), f"left {hidden(scenario.root)}")
        outcomes[f"full disk: status {status}, {'the old one' if found == before else 'a later one'}"] += 1
    scenario.go_on(server, scenario.found())
    return True


def _lines(child: Child) -> int:
    """How many lines tell of a fault, beside the log of a training and a bar that shows how far a conversion is."""
    expect("Traceback" not in child.said(), f"said {child.said()[-800:]}")
    return len(
        [line for line in child.said().splitlines() if line.strip() and not line.startswith("{") and "━" not in line]
    )


def chosen(found: list[Point], count: int, r: Random) -> list[Point]:
    """So many of the calls: those that are seldom first, each kind and each scenario in turn."""
    by_kind: dict[tuple, list[Point]] = {}
    for point in found:
        key = point.call not in SELDOM, point.scenario.name, point.call, point.exchange
        by_kind.setdefault(key, []).append(point)
    for kind in by_kind.values():
        r.shuffle(kind)
    queues = [by_kind[key] for key in sorted(by_kind)]
    picked: list[Point] = []
    while len(picked) < count and any(queues):
        picked += [queue.pop() for queue in queues if queue][: count - len(picked)]
    return picked
