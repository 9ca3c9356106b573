"""Kills at random times."""

import time
from collections import Counter
from random import Random

from tests.campaign.kills.scenarios import LostError, Scenario, Training, expect, hidden
from tests.campaign.kills.warm import Warm

MOST_IN_A_ROW = 6


def killed_at_random(r: Random, scenario: Scenario, server: Warm, left: int, outcomes: Counter) -> int:
    """Kills of one run and of those that go on with it, at most `left`; then one that is left alone. How many."""
    scenario.reset()
    kills, before = 0, scenario.found()
    while kills < min(left, MOST_IN_A_ROW):
        argv = scenario.argv if kills == 0 else scenario.next_argv(before)
        child = server.start(argv, scenario.log)
        time.sleep(r.uniform(0, 1.05 * scenario.seconds))
        status = child.kill()
        if status >= 0:  # it was done before
            said = child.said()
            expect(status == 0, f"ended with {status} by itself: {said[-500:]}")
            outcomes["done before the kill"] += 1
            break
        kills += 1
        found = scenario.found()
        outcomes[told(scenario, before, found)] += 1
        before = found
        if not isinstance(scenario, Training) and r.random() < 0.7:
            break
    scenario.go_on(server, before)
    outcomes["gone on with, to the same bits"] += 1
    return kills


def told(scenario: Scenario, before: str, found: str) -> str:
    """What a kill has left, checked against what there was before it."""
    kind = scenario.name.split()[0]
    if found == "absent":
        if before != "absent" and not any(name.endswith(".old") for name in hidden(scenario.root)):
            raise LostError(f"what was there, {before}, is gone")
        return f"{kind}: nothing yet" if before == "absent" else f"{kind}: moved aside"
    if isinstance(scenario, Training):
        expect(before == "absent" or int(found) >= int(before), f"went back from step {before} to {found}")
        return f"{kind}: a later checkpoint" if found != before else f"{kind}: the same checkpoint"
    expect(before != "new" or found == "new", f"went back from {before} to {found}")
    return f"{kind}: the {found} one"
