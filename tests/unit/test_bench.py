"""The benchmarks: how candidates are timed and judged, the file of results, the report, and the command."""

import dataclasses
import json
import mmap
import os
import time

import numpy as np
import pytest

from mamba_core.architectures.mamba2 import Mamba2Config
from mamba_core.benchmarks import cases, ours, report, runner, store
from mamba_core.benchmarks.cases import Case
from mamba_core.benchmarks.frameworks import Timed
from mamba_core.benchmarks.runner import CandidateError, Settings, Worker, alternate, measure
from mamba_core.cli import main
from mamba_core.config import MambaConfig
from mamba_core.spec.tolerances import relative_l2

pytest.importorskip("rich")
TINY = {
    "mamba": MambaConfig(d_model=8, n_layer=1, vocab_size=32, d_state=4),
    "mamba2": Mamba2Config(d_model=8, n_layer=1, vocab_size=32, d_state=4, headdim=4),
}
MIB = 2**20


def tiny(work, dtype="float32", length=5, architecture="mamba", **more):
    config = TINY["mamba2" if work.startswith("ssd") else architecture]
    config = dataclasses.replace(config, task="layers") if work == "block" else config
    return Case("tiny", "scan", work, config, length, dtype, **more)


class Clock:
    """Stands still but where a turn says that it takes time."""

    def __init__(self):
        self.now, self.turns = 0.0, []

    def __call__(self):
        return self.now

    def turn(self, name, seconds, answer=True):
        def take():
            self.turns.append(name)
            self.now += seconds
            return seconds if answer else None

        return take


def test_candidates_take_turns_and_each_begins_a_round():
    clock = Clock()
    seconds = alternate({name: clock.turn(name, 1.0) for name in "abc"}, Settings(rounds=3), clock)
    assert "".join(clock.turns) == "abc" + "bca" + "cab"
    assert seconds == {name: [1.0] * 3 for name in "abc"}


def test_one_that_has_used_its_budget_has_no_more_turns():
    clock = Clock()
    turns = {"quick": clock.turn("quick", 1.0), "slow": clock.turn("slow", 30.0)}
    assert alternate(turns, Settings(rounds=4, budget=50.0), clock) == {"quick": [1.0] * 4, "slow": [30.0] * 2}


def test_one_that_fails_has_no_more_turns():
    clock = Clock()
    turns = {"broken": clock.turn("broken", 1.0, answer=False), "sound": clock.turn("sound", 1.0)}
    assert alternate(turns, Settings(rounds=3), clock) == {"broken": [], "sound": [1.0] * 3}
    assert clock.turns.count("broken") == 1


class FakeWorker:
    """Answers from a list of seconds and a result."""

    def __init__(self, answers, case, threads):
        self.first, seconds = answers
        self.turns = iter(seconds)

    def ask(self, command, limit):
        if isinstance(self.first, CandidateError):
            raise self.first
        if command == "turn":
            return next(self.turns)
        return self.first if command == "first" else {"extra_bytes": 1, "peak_bytes": 2}

    def close(self):
        pass


def judged(case, **answers):
    entrants = {name: ("floor" if name == "floor" else "ours", given) for name, given in answers.items()}
    return measure(case, entrants, Settings(rounds=5), start=FakeWorker)["candidates"]


def test_medians_quartiles_and_ratios():
    case = tiny("scan", baseline="slow")
    right = cases.expected(case)
    found = judged(case, fast=(right, [9, 1, 3, 2, 4]), slow=(right, [12] * 5), floor=(None, [2] * 5))
    assert found["fast"]["seconds"] == [9, 1, 3, 2, 4]
    assert (found["fast"]["median"], found["fast"]["quartiles"]) == (3, [2, 4])
    assert (found["fast"]["speedup"], found["fast"]["over_floor"]) == (4, 1.5)
    assert (found["slow"]["speedup"], found["slow"]["over_floor"]) == (1, 6)
    assert "over_floor" not in found["floor"]


def test_decoding_is_told_by_the_token():
    case = tiny("decode")
    found = judged(case, ours=(cases.expected(case), [32.0] * 5))
    assert found["ours"]["median"] == 32.0 / cases.DECODED


def test_a_wrong_result_is_no_time():
    case = tiny("scan")
    right = cases.expected(case)
    found = judged(
        case, wrong=([right[0] * 1.01], [1] * 5), broken=([right[0] * np.nan], [1] * 5), right=(right, [2] * 5)
    )
    assert "wrong: relative L2 error 1.0e-02" in found["wrong"]["error"]
    assert "wrong: relative L2 error inf" in found["broken"]["error"]
    assert not {"median", "seconds"} & (found["wrong"].keys() | found["broken"].keys())
    assert found["right"]["median"] == 2


def test_beyond_the_reference_candidates_are_compared_with_each_other():
    case = tiny("scan", length=cases.LONGEST_REFERENCE + 1)
    first = [np.ones((1, 2))]
    found = judged(case, a=(first, [1] * 5), b=([first[0] * 2], [1] * 5))
    assert "median" in found["a"]
    assert "wrong" in found["b"]["error"]


def test_one_that_is_absent_says_so_and_leaves_the_others():
    case = tiny("scan")
    absent = CandidateError("ModuleNotFoundError: No module named 'peer'", absent=True)
    found = judged(case, peer=(absent, []), ours=(cases.expected(case), [1] * 5))
    assert found["peer"] == {"role": "ours", "error": str(absent), "absent": True}
    assert found["ours"]["median"] == 1


def test_a_worker_that_dies_or_hangs_is_one_line():
    dying, hanging = Worker(os._exit, 3, 1), Worker(time.sleep, 600, 1)
    with pytest.raises(CandidateError, match="its process ended with status 3"):
        dying.ask("first", 60)
    with pytest.raises(CandidateError, match="took more than 0 s"):
        hanging.ask("first", 0.1)
    assert not hanging.process.is_alive()


def new_memory(size):
    """Bytes in pages of their own: those of an allocator may lie in memory that this process had before."""
    bytes_ = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    bytes_[:] = 1
    return bytes_


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_is_the_most_during_a_call_beyond_what_was_held():
    held = new_memory(32 * MIB)

    def call():
        scratch = new_memory(96 * MIB)
        del scratch
        return held[:1] + new_memory(16 * MIB)

    served = runner._Served(Timed(call, None))
    served.first()
    # Linux counts pages in lots: a little is missing. Both arrays together would be 112.
    assert 95 * MIB <= served.memory()["extra_bytes"] < 104 * MIB


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_one_that_keeps_much_gives_it_back_and_has_it_again_before_it_is_timed(monkeypatch):
    kept, warm = [], []

    def call():
        warm.append(bool(kept))
        kept.append(new_memory(16 * MIB))
        time.sleep(0.01)

    monkeypatch.setattr(runner, "KEPT", 8 * MIB)
    monkeypatch.setattr(runner, "BRIEF", 0)
    monkeypatch.setattr(runner, "_release", kept.clear)
    served = runner._Served(Timed(call, None))
    served.memory()
    assert served.turn() >= 0.01
    assert warm == [False, False] + [True] * runner.FEWEST
    assert kept == []


@pytest.mark.parametrize(
    ("calls", "used", "turn"),
    [
        ([0.9, 0.4, 0.1, 0.6], 4, 0.4),  # the least number of calls
        ([0.9, *[0.125] * 4], 5, 0.125),  # as many as it takes
        ([7.0], 1, 7.0),  # too long to be called for nothing
    ],
)
def test_a_turn_is_the_median_of_calls_after_one_that_does_not_count(monkeypatch, calls, used, turn):
    left = [*calls, 0.0]
    monkeypatch.setattr(runner, "_seconds", lambda call: left.pop(0))
    assert runner._Served(Timed(None, None)).turn() == turn
    assert len(calls) + 1 - len(left) == used


def test_a_call_that_takes_very_long_is_made_once(monkeypatch):
    calls = []

    def call():
        calls.append(new_memory(64 * MIB)[0])
        time.sleep(0.01)

    monkeypatch.setattr(runner, "ONCE", 0.01)
    served = runner._Served(Timed(call, None))
    served.first()
    assert served.memory()["extra_bytes"] > 60 * MIB
    assert served.turn() >= 0.01
    assert served.turn() is None
    assert len(calls) == 1


@pytest.mark.parametrize("work", cases.WORKS)
def test_every_backend_computes_what_is_timed(backend, work):
    case = tiny(work)
    entrants = ours.candidates(case, [backend.name])
    assert len(entrants) >= (1 if case.op is None else 2)
    for name, make in entrants.items():
        timed = make(case)
        result = timed.arrays(timed.call())
        for value, expected in zip(result, cases.expected(case), strict=True):
            assert relative_l2(value, expected) <= 1e-5, name


PEER_CASES = {(peer, case.work, case.config.architecture) for case in cases.CASES.values() for peer in case.peers}


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "work", "architecture"), sorted(PEER_CASES))
def test_every_peer_computes_what_is_timed(peer, work, architecture):
    case = tiny(work, length=16, architecture=architecture, peers=(peer,))
    (entry,) = measure(case, runner.candidates(case, []), Settings(rounds=1))["candidates"].values()
    if entry.get("absent"):
        pytest.skip(entry["error"])
    assert entry.get("error") is None
    assert entry["median"] > 0


def bench(*arguments):
    return main(["bench", *map(str, arguments)])


def test_the_command_measures_a_case_on_each_backend(backend, tmp_path, capsys):
    out = tmp_path / "bench.json"
    chosen = ("--quick", "--backends", backend.name, "--threads", 1, "--out", out, "--case")
    assert bench(*chosen, "scaling-forward-128", "--json") == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["machine"]["processor"]
    assert backend.name in found["machine"]["versions"]
    entry = found["cases"]["scaling-forward-128"]["candidates"][backend.name]
    assert entry["quartiles"][0] <= entry["median"] <= entry["quartiles"][1]
    assert entry["peak_bytes"] > entry["extra_bytes"] >= 0


def test_results_of_other_conditions_are_not_mixed(tmp_path):
    out = tmp_path / "bench.json"
    found = {"machine": {"processor": "this"}, "threads": 2, "quick": False, "cases": {}}
    kept = found | {"cases": {"scan-forward": {}}}
    assert store.begin(out, found) == found
    store.write(out, kept)
    assert store.begin(out, found) == kept
    with pytest.raises(ValueError, match="measured with another threads, quick; give another --out"):
        store.begin(out, found | {"threads": 1, "quick": True})
    for text in ("no JSON", "[]", '{"errors": {}}'):
        out.write_text(text)
        with pytest.raises(ValueError, match="holds no results of mamba-core bench"):
            store.begin(out, found)


def test_list(capsys):
    assert bench("--list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed) == set(cases.CASES)
    assert "(1, 2048, 1536, 16) float32" in listed["scan-forward"]["title"]
    assert "(1, 2048, 24, 64, 128) float32" in listed["ssd-forward"]["title"]
    assert bench("--list", "--case", "model") == 0
    shown = capsys.readouterr().out
    assert "decode-bfloat16" in shown
    assert "scaling" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "scan-sideways"], "no case 'scan-sideways'; see mamba-core bench --list"),
        (["--quick", "--case", "scaling-training-65536"], "--quick runs none of scaling-training-65536"),
        (["--backends", "abacus"], "no backend 'abacus' to time; expected some of"),
        (["--threads", "0"], "--threads is 0; expected 1 to"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


README = """# Title

<!-- bench:scan -->
old
<!-- end -->

Text | with | bars.

<!-- bench:model -->
kept
<!-- end -->
"""


def test_the_report_replaces_between_its_markers_only():
    replaced = report.replace(README, {"scan": "| new |"})
    assert replaced == README.replace("old", "\n| new |\n")
    assert report.replace(replaced, {"scan": "| new |"}) == replaced
    with pytest.raises(ValueError, match="no <!-- bench:other -->"):
        report.replace(README, {"other": "| new |"})


def results(quick=False):
    entry = {"role": "ours", "median": 0.0125, "speedup": 42.0, "over_floor": 2.4, "extra_bytes": 56 * MIB}
    peer = {"role": "peer", "median": 0.525, "speedup": 1.0, "extra_bytes": 1728 * MIB}
    absent = {"role": "peer", "error": "not installed", "absent": True}
    candidates = {"torch native": entry, "mambapy": peer, "minimamba": absent}
    found = {name: {"baseline": "mambapy", "candidates": candidates} for name in ("scan-forward", "scan-gradient")}
    for work in ("forward", "training"):
        for length in (1024, 4096, 65536):
            line = {"role": "ours", "median": length / 1e5, "extra_bytes": length * 2**14, "peak_bytes": 2**31}
            found[f"scaling-{work}-{length}"] = {"length": length, "candidates": {"torch": line}}
    machine = {"processor": "A processor", "versions": {"torch": "1.0"}}
    return {"machine": machine, "threads": 2, "quick": quick, "cases": found}


def test_the_report_makes_tables_and_the_plot(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README + "<!-- bench:scaling -->\n<!-- end -->\n")
    store.write(tmp_path / "bench.json", results())
    report.main([str(tmp_path), str(readme)])
    text = readme.read_text()
    assert "A processor, 2 threads; torch 1.0." in text
    assert "| torch native | 12.5 ms (2.4 floors) | 42.00 | 56 MiB |" in text
    assert "| mambapy | 525 ms | 1.00 | 1,728 MiB |" in text
    assert "minimamba" not in text
    assert "| training | torch | 1,024 to 65,536 | 655 ms | 0% | 0% | 1.00 GiB |" in text
    assert "kept" in text
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_quick_results_are_not_reported(tmp_path):
    store.write(tmp_path / "bench.json", results(quick=True))
    (tmp_path / "README.md").write_text(README)
    with pytest.raises(ValueError, match="made with --quick"):
        report.main([str(tmp_path), str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == README


def test_how_far_from_a_line():
    lengths = np.array([128, 1024, 8192, 65536])
    assert report.bend(lengths, 3.0 + 0.01 * lengths) < 1e-9
    assert 0.03 < report.bend(lengths, 0.01 * lengths * [1, 1, 1.1, 1]) < 0.1
    assert report.bend(lengths, lengths**2.0) > 0.5


def test_milliseconds():
    assert [store.milliseconds(seconds) for seconds in (0.000504, 0.0125, 0.525, 0.9999, 4.8294)] == [
        "0.504 ms",
        "12.5 ms",
        "525 ms",
        "1,000 ms",
        "4,829 ms",
    ]
