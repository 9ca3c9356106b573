"""The tests of the native library reject small realistic faults in its C++."""

# ruff: noqa: E501 (a row is a mutant)

import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from mamba_core.backends.native import library
from tests.meta.broken import ROOT, run_pytest

SOURCES = Path(library.__file__).parent

pytestmark = [
    pytest.mark.skipif(library.missing() is not None, reason=f"native library: {library.missing()}"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


class Mutant(NamedTuple):
    """Every place of the file where `old` stands becomes `new`."""

    file: str
    old: str
    new: str


SCAN, CONV, NORM, VECTORS = "selective_scan.cpp", "causal_conv.cpp", "add_norm.cpp", "vectors.h"
SSD, SSD_BACK, SSD_CHUNK, SSD_TILES, MATRICES = (
    "ssd.cpp",
    "ssd_backward.cpp",
    "ssd_chunk.h",
    "ssd_tiles.h",
    "matrices.h",
)
STEP, SSD_STEP, PARTS, PRODUCTS, PHASES = (
    "mamba_step.cpp",
    "ssd_step.cpp",
    "block_parts.h",
    "products.cpp",
    "phases.cpp",
)
# The file of tests that is to reject a source's mutants, where it is not the first.
TESTS = dict.fromkeys((STEP, PARTS, PRODUCTS), "tests/unit/test_native_step.py")
TESTS |= {SSD_STEP: "tests/unit/test_native_ssd_step.py"}
TESTS |= dict.fromkeys((SSD, SSD_BACK, SSD_CHUNK, SSD_TILES, MATRICES), "tests/unit/test_native_ssd.py")
# The sources that test_native.py calls, of the many that read a header.
CALLED = {VECTORS: (SCAN, CONV, NORM)}
MUTANTS = {
    "restart ignored": Mutant(SCAN, "        if (w.restart[t])\n            for (int j = 0; j < COUNT; j++) h[j] = V{};\n", ""),
    "restart ignored where the gradient recomputes": Mutant(SCAN, "h[j]);\n            if (w.restart[t]) h[j] = V{};", "h[j]);"),
    "restart ignored in the gradient": Mutant(SCAN, "if (w.restart[t]) g[j] = dlog = V{};", ""),
    "y of masked positions": Mutant(SCAN, "masked ? V{} : value", "value"),
    "mask ignored": Mutant(SCAN, "masked = s.mask && !s.mask[position]", "masked = false"),
    "an exponential a little off": Mutant(VECTORS, "2.4022650719e-1f", "2.4022950719e-1f"),
    "an exponential far out": Mutant(VECTORS, "    value = value < -104.0f ? splat(-104.0f) : value;\n", ""),
    "a logarithm a little off": Mutant(VECTORS, "0.285925835f", "0.2839f"),
    "bfloat16 ties away from zero": Mutant(VECTORS, "0x7fff + (bits >> 16 & 1)", "0x8000"),
    "bfloat16 NaN rounded to infinity": Mutant(VECTORS, "value == value ? rounded : bits | 0x400000", "rounded"),
    "log 2 a little off": Mutant(SCAN, "* 0.6931471806f + du * x", "* 0.6931971806f + du * x"),
    "final state's gradient ignored": Mutant(SCAN, "load_state(s, w.g, s.dfinal_state", "load_state(s, w.g, nullptr"),
    "no derivative of softplus": Mutant(SCAN, "if (through_softplus) ddelta *=", "if (false) ddelta *="),
    "derivative of the gate": Mutant(SCAN, "gate * (1.0f + z * (1.0f - gate))", "gate * (1.0f + z)"),
    "D missing from dx": Mutant(SCAN, "+ dlinear * load(w.D + c);", ";"),
    "first row's sums only": Mutant(SCAN, "row < b; row++)\n        for (int64_t k", "row < 1; row++)\n        for (int64_t k"),
    "first block's sums only": Mutant(SCAN, "block < blocks_of(s); block++", "block < 1; block++"),
    "last channels not written": Mutant(VECTORS, "memcpy(to, whole, left *", "memcpy(to, whole, (left - 1) *"),
    "first chunk's state for all": Mutant(SCAN, "memcpy(w.h, boundary(s, task.row, task.block, chunk)",
                                          "memcpy(w.h, boundary(s, task.row, task.block, 0)"),
    "states transposed half": Mutant(VECTORS, "for (int step = 1; step < WIDTH", "for (int step = 2; step < WIDTH"),
    "conv: taps the other way round": Mutant(CONV, "s.weight + tap * s.e;", "s.weight + (s.k - 1 - tap) * s.e;"),
    "conv: a tap before the restart": Mutant(CONV, "input < call.rows[row].first[number] ?", "false ?"),
    "conv: gradient across a restart": Mutant(CONV, "|| input < of.first[seen]", ""),
    "conv: gradient within a chunk": Mutant(CONV, "from + own + carried(s) < of.count ? from + own + carried(s) : of.count",
                                            "from + own"),
    "conv: no gradient of the final state": Mutant(CONV, "kept = s.dfinal_state &&", "kept = false && s.dfinal_state &&"),
    "conv: state across a restart": Mutant(CONV, "input < last_run(s, rows[row]) ?", "false ?"),
    "conv: initial state's gradient": Mutant(CONV, "row, 0, slot - carried(s));", "row, 0, slot);"),
    "conv: no derivative of SiLU": Mutant(CONV, "gate * (1.0f + linear * (1.0f - gate))", "gate"),
    "conv: sums of the halo too": Mutant(CONV, "if (number >= from + own) continue;", ""),
    "conv: one task's sums": Mutant(CONV, "task < tasks; task++", "task < 1; task++"),
    "conv: masked positions not zeroed": Mutant(CONV, "            memset(*y, 0, row_bytes(s));\n", ""),
    "conv: together across a restart": Mutant(CONV, "    if (of.first[last] != of.first[number]) return false;\n", ""),
    "conv: together with one that is masked": Mutant(CONV, " || of.number[t + TOGETHER - 1] != last", ""),
    "conv: together where taps are missing": Mutant(CONV, "taps.count < s.k || ", ""),
    "scan: twice as many states as there are": Mutant(SCAN, "s.n - k > STATES ?", "true ?"),
    "ssds: a restart ignored": Mutant(SSD_CHUNK, "if (!t || (restart && restart[t]))", "if (!t)"),
    "ssds: a restart at a chunk's first position": Mutant(SSD_CHUNK, "restart && restart[0] ? 0 : runs.bounds[1]", "runs.bounds[1]"),
    "ssds: passed through a restart": Mutant(SSD_CHUNK, "return count == 1 && entered;", "return entered;"),
    "ssds: sums off the grid": Mutant(SSD_CHUNK, "off_grid += log - nearest", "off_grid += 0.0f * (log - nearest)"),
    "ssds: all sums on the grid": Mutant(SSD_CHUNK, "(log * GRID + ROUNDER - ROUNDER) / GRID", "log"),
    "ssds: an infinite rate": Mutant(SSD_CHUNK, "scaled < -FLT_MAX ? -FLT_MAX : scaled", "scaled"),
    "ssds: a logarithm without an end": Mutant(SSD_CHUNK, "product < LEAST_LOG ? LEAST_LOG : product", "product"),
    "ssds: no bias of dt": Mutant(SSD_CHUNK, "if (s.dt_bias) step.raw +=", "if (false) step.raw +="),
    "ssds: no most step": Mutant(SSD_CHUNK, "step.size > s.most ? splat(s.most) : step.size", "step.size"),
    "ssds: no least step": Mutant(SSD_CHUNK, "step.unlimited < s.least ? splat(s.least) : step.unlimited", "step.unlimited"),
    "ssds: masked positions count": Mutant(SSD_CHUNK, "absent = start + t >= s.l || is_masked(s, row, start + t)", "absent = start + t >= s.l"),
    "ssds: D of a channel as that of a head": Mutant(SSD_CHUNK, "s.D + head * s.p + c,", "s.D + c,"),
    "ssds: Inf left by a decay of zero": Mutant(SSD_CHUNK, "if (through != 0.0f)", "if (true)"),
    "ssds: groups tiled": Mutant(SSD, "group = head / heads_of_group(s)", "group = head % s.g"),
    "ssds: weights of later positions": Mutant(SSD, "numbers_from(j) <= (float)i ? value : V{}", "value"),
    "ssds: not the decay to the state": Mutant(SSD, "sums[r][v] *= w.decays.start[t + r]", "sums[r][v] *= w.decays.start[t]"),
    "ssds: a later run reads the state before the chunk": Mutant(SSD, "end <= runs.entered};", "true};"),
    "ssds: an earlier run reaches the state": Mutant(SSD, "whole(s.n), p, runs.leaving, runs.bounds", "whole(s.n), p, 0, runs.bounds"),
    "ssds: y of masked positions": Mutant(SSD, "if (is_masked(s, row, start + t)) return write", "if (false) return write"),
    "ssds: no gate": Mutant(SSD, "value *= gate * sigmoid(gate)", "value *= sigmoid(gate)"),
    "ssds: the next span begins anew": Mutant(SSD, "span.first ? s.final_state : s.initial_state", "s.initial_state"),
    "ssds: boundaries of the state after": Mutant(SSD, "boundary(s, row, chunk, head), state", "boundary(s, row, 0, head), state"),
    "ssds: the next span's gradients of states": Mutant(SSD_BACK, "memcpy(gradients.after(row, end - 1, 0), memory + row * of_states", "memcpy(gradients.after(row, end - 1, 0), memory"),
    "ssds: one span's sums": Mutant(SSD_BACK, "totals[row * size + k] += sums[k]", "totals[row * size + k] = sums[k]"),
    "ssds: first row's sums": Mutant(SSD_BACK, "row < s.b; row++)\n        for (int64_t k = 0; k < size; k++) totals[k]", "row < 1; row++)\n        for (int64_t k = 0; k < size; k++) totals[k]"),
    "ssds: gradient of the final state": Mutant(SSD_BACK, "        if (s.dfinal_state)\n", "        if (false)\n"),
    "ssds: gradient across a run": Mutant(SSD_TILES, "number < end ? weight : zero", "weight"),
    "ssds: gradient of later positions": Mutant(SSD_TILES, "number < first ? zero : decay", "decay"),
    "ssds: Inf of another run": Mutant(SSD_TILES, "weight == zero ? zero : sums[r][v] * weight", "sums[r][v] * weight"),
    "ssds: D missing from dx": Mutant(SSD_TILES, " + load(w.dlinear + at) * load(w.D + k)", ""),
    "ssds: the decay to the end missing from du": Mutant(SSD_TILES, "sums[r][v] *= w.of_head.end[j + r];", ""),
    "ssds: logarithms to the end": Mutant(SSD_BACK, "dlog[t] += before;", ""),
    "ssds: logarithms from the start": Mutant(SSD_BACK, "(t < c.runs.entered ? after : 0.0f)", "0.0f"),
    "ssds: logarithms of the whole chunk": Mutant(SSD_BACK, "if (through == 0.0f) return 0.0f;", "return 0.0f;"),
    "ssds: logarithms between positions": Mutant(SSD_BACK, "numbers < (float)j ? V{} : before", "before"),
    "ssds: gradient of an infinite rate": Mutant(SSD_BACK, "c.s.A[c.head] < -FLT_MAX ? -FLT_MAX : c.s.A[c.head]", "c.s.A[c.head]"),
    "ssds: gradient of a limited step": Mutant(SSD_BACK, "value = step.unlimited > s.most ? V{} : value;", ""),
    "ssds: no derivative of the softplus": Mutant(SSD_BACK, "if (s.dt_softplus) value *=", "if (false) value *="),
    "ssds: derivative of the gate": Mutant(SSD_TILES, "gate * (1.0f + z * (1.0f - gate))", "gate * (1.0f + z)"),
    "ssds: gradient of masked dt": Mutant(SSD_BACK, "            if (masked) {\n                value = V{};", "            if (false) {\n                value = V{};"),
    "ssds: dy of masked positions": Mutant(SSD_TILES, "if (!masked && k < s.p) {", "if (k < s.p) {"),
    "ssds: the last rows of a tile": Mutant(MATRICES, "if (row < end) tile.template at<1, VECS>(row, column);", ""),
    "ssds: the transpose's end not zero": Mutant(MATRICES, "row < divide_up(rows, WIDEST) * WIDEST", "row < rows"),
    "norm: of what was not rounded": Mutant(NORM, "if (RESIDUAL_BFLOAT16) sum =", "if (false) sum ="),
    "norm: no eps": Mutant(NORM, "square / s.d + s.eps", "square / s.d"),
    "step: B and C normed as one": Mutant(STEP, "dtbc + s.r, s.n, s.B_norm);\n        norm_in_place(s, dtbc + s.r + s.n, s.n, s.C_norm);", "dtbc + s.r, 2 * s.n, nullptr);"),
    "step: dt not normed": Mutant(STEP, "norm_in_place(s, dtbc, s.r, s.dt_norm);", ""),
    "step: the block's eps for dt, B and C": Mutant(STEP, "count, s.selection_eps);", "count, s.eps);"),
    "step: dt, B and C normed without weights": Mutant(STEP, "if (weight) value *=", "if (false) value *="),
    "step: C normed with B's weight": Mutant(STEP, "s.n, s.C_norm)", "s.n, s.B_norm)"),
    "step: dt, B and C always normed": Mutant(STEP, "if (s.selection_eps > 0) {", "{"),
    "step: first lanes of a norm": Mutant(PARTS, "lane < WIDTH; lane++) sum +=", "lane < WIDTH - 1; lane++) sum +="),
    "step: window not moved on": Mutant(PARTS, "if (j) write(", "if (j > 1) write("),
    "step: first part of a product's inputs": Mutant(PRODUCTS, "i == inputs.first);\n    for (; i", "true);\n    for (; i"),
    "ssd: groups tiled": Mutant(SSD_STEP, "head / (s.h / s.g) * s.n", "head % s.g * s.n"),
    "ssd: the first head's D": Mutant(SSD_STEP, "splat(s.D[head])", "splat(s.D[0])"),
    "ssd: D of a channel as that of a head": Mutant(SSD_STEP, "if (s.D_per_channel) D =", "if (false) D ="),
    "ssd: no least step": Mutant(SSD_STEP, "step < s.least ? s.least : ", ""),
    "ssd: no most step": Mutant(SSD_STEP, "step > s.most ? s.most : step", "step"),
    "ssd: limit before the softplus": Mutant(SSD_STEP, "step = softplus(projected(s, w, row, dt_of(s) + head, 1) + s.dt_bias[head])[0];\n    step = step < s.least ? s.least : step > s.most ? s.most : step;",
                                             "raw = (projected(s, w, row, dt_of(s) + head, 1) + s.dt_bias[head])[0];\n    float step = softplus(splat(raw < s.least ? s.least : raw > s.most ? s.most : raw))[0];"),
    "ssd: no bias of dt": Mutant(SSD_STEP, " + s.dt_bias[head])", ")"),
    "ssd: a rate beyond the floats": Mutant(SSD_STEP, "    rate = rate > FLT_MAX ? FLT_MAX : rate;\n", ""),
    "ssd: always gated before the norm": Mutant(SSD_STEP, "!(s.gated_norm && s.norm_before_gate)", "true"),
    "ssd: not gated without a norm": Mutant(SSD_STEP, "!(s.gated_norm && s.norm_before_gate)", "!s.norm_before_gate"),
    "ssd: one norm of all groups": Mutant(SSD_STEP, "plan.add(norm_group, s.b * s.g)", "plan.add(norm_group, s.b)"),
    "ssd: the weight of the first group": Mutant(SSD_STEP, "(first + c), left, s.bfloat16)", "c, left, s.bfloat16)"),
    "ssd: the gate of the first group": Mutant(SSD_STEP, "z_of(s) + first + c, left", "z_of(s) + c, left"),
    "ssd: the block's eps in the gated norm": Mutant(SSD_STEP, "count, s.gated_eps)", "count, s.eps)"),
    "ssd: gate and gated exchanged": Mutant(SSD_STEP, "silu(gate) * gated", "gate * silu(gated)"),
    "ssd: beside after the recurrence": Mutant(SSD_STEP, "w.y + row * inner_of(s) + c, silu(gate)", "w.y + row * inner_of(s) + scanned_of(s) + c, silu(gate)"),
    "ssd: the last share of beside": Mutant(SSD_STEP, "divide_up(s.beside, s.h), head)", "s.beside / s.h, head)"),
    "ssd: one row's states for all": Mutant(SSD_STEP, "state = (row * s.h + head)", "state = head"),
    "ssd: B for C": Mutant(SSD_STEP, "*C = B + s.g * s.n", "*C = B"),
    "norm: last rows": Mutant(NORM, "k < s.rows && k < (index + 1) * NORM_ROWS", "k < s.rows && k + 1 < (index + 1) * NORM_ROWS"),
}  # fmt: skip

# Of the many of one file those that are tried without --slow.
QUICK = (
    "ssd: groups tiled",
    "ssd: always gated before the norm",
    "ssds: weights of later positions",
    "ssds: Inf of another run",
)


def tried():
    for name, mutant in MUTANTS.items():
        slow = mutant.file in (SSD_STEP, SSD, SSD_BACK, SSD_CHUNK, SSD_TILES, MATRICES) and name not in QUICK
        yield pytest.param(name, id=name, marks=pytest.mark.slow if slow else ())


def read_by(source: Path) -> set[str]:
    """The files of the folder that a compiler reads for that source, by name."""
    names, found = [source.name], set()
    while names:
        if (name := names.pop()) not in found:
            found.add(name)
            included = re.findall(r'#include "(.*)"', (source.parent / name).read_text())
            names += [other for other in included if (source.parent / other).exists()]
    return found


def compiled(source: Path) -> Path:
    """Without optimising: that would take longer than the tests."""
    subprocess.run(["c++", "-O0", "-w", "-c", "-fPIC", source, "-o", source.with_suffix(".o")], check=True)
    return source.with_suffix(".o")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A copy of the sources with their objects."""
    folder = tmp_path_factory.mktemp("native")
    for source in [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]:
        shutil.copy(source, folder)
    for source in folder.glob("*.cpp"):
        compiled(source)
    return folder


@pytest.mark.parametrize("name", list(tried()))
def test_the_tests_reject(name, whole, tmp_path):
    mutant, folder = MUTANTS[name], tmp_path / "native"
    shutil.copytree(whole, folder)
    text = (folder / mutant.file).read_text()
    assert mutant.old in text, f"{mutant.file} has no {mutant.old!r}"
    (folder / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    called = CALLED.get(mutant.file, [source.name for source in SOURCES.glob("*.cpp")])
    changed = [compiled(folder / name) for name in called if mutant.file in read_by(folder / name)]
    broken = tmp_path / "broken.so"
    # Each object has a header's functions, and the linker takes the first.
    others = [path for path in folder.glob("*.o") if path not in changed]
    subprocess.run(["c++", "-shared", "-pthread", *changed, *others, "-o", broken], check=True)
    tests = TESTS.get(mutant.file, "tests/unit/test_native.py")
    environment = {"MAMBA_CORE_NATIVE": str(broken), "HYPOTHESIS_PROFILE": "unshrunk"}
    done = run_pytest([ROOT / tests, "-x", "-k", "not sanitizers"], environment)
    # A mutant that reads outside its arrays may end the process instead of failing a test.
    failed = done.returncode == 1 and "FAILED tests/" in done.stdout
    assert failed or done.returncode == -signal.SIGSEGV, f"not rejected:\n{done.stdout[-2000:]}"
