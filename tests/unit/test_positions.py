"""The timing of padded and packed batches: it runs on this code and on another commit, and its ratios are right."""

import json
from pathlib import Path

import numpy as np
import pytest

from mamba_core.benchmarks import positions, worktree
from mamba_core.benchmarks.positioned import KINDS, packed, padded

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "1", "--width", "16", "--batch", "2", "--length", "16", "--rounds", "2", "--backend", "torch"]


def test_both_works_are_timed_on_both_sides(tmp_path, capsys):
    pytest.importorskip("torch")
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    before = worktree._run(["git", "worktree", "list"], ROOT)
    out = tmp_path / "positions.json"
    assert positions.main([*TINY, "--base", "HEAD", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["seconds"]["torch"]) == {"forward", "training"}
    for sides in found["seconds"]["torch"].values():
        assert set(sides) == {"base", "here"}
        for kinds in sides.values():
            assert all(len(kinds[kind]) == 2 and min(kinds[kind]) > 0 for kind in KINDS)
    assert "ratio" in capsys.readouterr().out
    assert worktree._run(["git", "worktree", "list"], ROOT) == before


def test_ratios():
    seconds = {
        "base": {"plain": [2.0, 2.0, 9.0], "masked": [4.0] * 3, "packed": [6.0] * 3},
        "here": {"plain": [1.0] * 3, "masked": [1.5] * 3, "packed": [1.0] * 3},
    }
    found = {"commits": {"base": "a", "here": "b"}, "seconds": {"torch": {"forward": seconds}}}
    assert positions.columns(found) == ["base", "x plain", "here", "x plain", "ratio"]
    assert [row[1:] for row in positions.rows(found)] == [
        ["forward", "plain", "2,000 ms", "1.00", "1,000 ms", "1.00", "0.50"],
        ["forward", "masked", "4,000 ms", "2.00", "1,500 ms", "1.50", "0.38"],
        ["forward", "packed", "6,000 ms", "3.00", "1,000 ms", "1.00", "0.17"],
    ]


def test_rows_are_padded_and_packed_differently():
    assert padded(4, 16).sum(1).tolist() == [8, 10, 13, 16]
    assert all((np.diff(row) >= 0).all() and len(set(row.tolist())) >= 8 for row in packed(4, 16))


def test_a_side_that_fails_is_bad_input(capfd):
    assert positions.main([*TINY[:-1], "no-such-backend"]) == 2
    assert "ended with status 1" in capfd.readouterr().err
