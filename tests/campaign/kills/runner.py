"""The kills of one campaign, and what came of them."""

import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from tests.campaign.kills import injected
from tests.campaign.kills.random_kills import killed_at_random
from tests.campaign.kills.scenarios import Scenario, conversions, prepare, trainings
from tests.campaign.kills.warm import Warm, warm

# How many of a hundred random kills each backend has; a conversion verifies on it.
SHARES = {"torch": 80, "mlx": 12, "jax": 8}


class Report:
    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def failed(self, where: str) -> None:
        self.failures.append(f"{where}: {traceback.format_exc(limit=0).strip().splitlines()[-1][:600]}")
        print(self.failures[-1], flush=True)

    def to_json(self) -> dict[str, Any]:
        return {"kills": dict(self.kills), "outcomes": dict(self.outcomes), "failures": self.failures}


def campaign(random_kills: int, injected_kills: int, full_disks: int, seed: int) -> tuple[Report, dict[str, Any]]:
    report, began = Report(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        left = random_kills
        for backend, share in SHARES.items():
            part = left if backend == list(SHARES)[-1] else min(left, round(random_kills * share / 100))
            left -= part
            if part:
                _at_random(Path(folder, backend), backend, part, seed, report)
        if reason := injected.available() if injected_kills or full_disks else None:
            report.failures.append(f"nothing was injected: {reason}")
        elif injected_kills or full_disks:
            _injected(Path(folder, "injected"), injected_kills, full_disks, seed, report)
    return report, report.to_json() | {"seconds": round(time.perf_counter() - began), "seed": seed}


def _scenarios(root: Path, backend: str, server: Warm) -> list[Scenario]:
    root.mkdir(parents=True)
    made = [*conversions(root), *trainings(root, backend)]
    for scenario in made:
        prepare(scenario, server, root)
    return made


def _at_random(root: Path, backend: str, kills: int, seed: int, report: Report) -> None:
    r = Random(f"{seed} {backend}")
    with warm(backend) as server:
        made = _scenarios(root, backend, server)
        conversions_, trainings_ = made[:-2], made[-2:]
        done = 0
        while done < kills:
            scenario = r.choice(trainings_ if r.random() < 0.6 else conversions_)
            before = sum(report.outcomes.values())
            try:
                count = killed_at_random(r, scenario, server, kills - done, report.outcomes)
            except Exception:
                report.failed(f"random, {backend}, {scenario.name}")
                count = max(1, sum(report.outcomes.values()) - before)
            done += count
            report.kills[f"random, {backend}, {scenario.name.split()[0]}"] += count
        print(f"{done} kills at random times on {backend}", flush=True)


def _injected(root: Path, kills: int, full_disks: int, seed: int, report: Report) -> None:
    r = Random(seed)
    with warm("torch") as server:
        made, log = _scenarios(root, "torch", server), root / "strace"
        found = [point for scenario in made for point in injected.points(scenario, server, log)]
        replaced = [scenario for scenario in made if not scenario.absent]
        pairs = [point for scenario in replaced for point in injected.points(scenario, server, log, exchange=False)]
        found += [point for point in pairs if point.call == "rename"]
        done = 0
        for point in injected.chosen(found, len(found), r):
            if done == kills:
                break
            reached = True
            try:
                reached = injected.killed_at(point, server, log, report.outcomes)
            except Exception:
                report.failed(f"injected, {point}")
            if reached:  # a thread may have made the call before or not at all
                report.kills[f"injected, {point.call}"] += 1
                done += 1
        print(f"{done} kills at system calls", flush=True)
        calls = "write", "fsync", "mkdir", "rename"
        writes = [point for point in found if point.call in calls and point.exchange and not point.said]
        for point in injected.chosen(writes, full_disks, r):
            try:
                injected.full_disk(point, server, log, report.outcomes)
            except Exception:
                report.failed(f"full disk, {point}")
