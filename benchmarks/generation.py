"""Long generation: the time and memory of each of many decoded tokens, and the memory of a long prompt in chunks.

    python -m mamba_core.benchmarks.generation decode                   # 100,000 tokens on every backend, minutes
    python -m mamba_core.benchmarks.generation prompt --backend torch   # 1,000,000 tokens of mamba-130m, half an hour

Each runs in a process of its own. Adds to results/generation.json, with the machine; decode draws a plot beside it.
Linux only: it reads /proc.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
from pathlib import Path
from time import perf_counter

import numpy as np

import mamba_core as mc
from mamba_core import architectures
from mamba_core.benchmarks.machine import cores, machine
from mamba_core.generation import PREFILL_CHUNK, Run
from mamba_core.registry import installed
from mamba_core.sampling import Sampling

RESULTS = Path(__file__).parent / "results" / "generation.json"
# Small, so that what grows with the tokens would show beside it.
CONFIG = mc.MambaConfig(d_model=64, n_layer=2, vocab_size=256, initializer_range=0.5, tie_embeddings=False)
SAMPLING = Sampling(temperature=1.0, top_k=50, presence_penalty=0.1)
POINTS = 100


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("decode", "prompt"))
    parser.add_argument("--backend", action="append", help="repeatable; all that are installed")
    parser.add_argument("--tokens", type=int, help="100,000 to decode, 1,000,000 of a prompt")
    parser.add_argument("--preset", choices=architectures.presets(), default="mamba-130m", help="of the prompt")
    arguments = parser.parse_args()
    for name in arguments.backend or installed():
        if arguments.what == "decode":
            entry = _apart(decode, name, arguments.tokens or 100_000)
        else:
            entry = _apart(prompt, name, arguments.preset, arguments.tokens or 1_000_000)
        # Read again, for the other may have ended in the meantime.
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"decode": {}, "prompt": {}}
        found[arguments.what][name] = {"machine": machine(), "threads": threads(), **entry}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, told(arguments.what, entry), flush=True)
    if arguments.what == "decode":
        plot(found["decode"], RESULTS.with_suffix(".png"))


def decode(name: str, tokens: int) -> dict:
    """POINTS pairs of seconds a token and bytes of resident memory, one for each part of the tokens."""
    model = mc.build(CONFIG, backend=name, device="cpu")
    run, part = Run(model, [[1, 2, 3]], SAMPLING, max_new_tokens=tokens), tokens // POINTS
    seconds, resident = [], []
    began = None
    for index, _ in enumerate(run.steps()):
        if index % part == 0:
            now = perf_counter()
            if began is not None:
                seconds.append((now - began) / part)
                resident.append(_memory("VmRSS"))
            began = perf_counter()
    return {"tokens": len(run.rows[0].tokens), "config": CONFIG.to_dict(), "seconds": seconds, "resident": resident}


def prompt(name: str, preset: str, tokens: int) -> dict:
    """The most resident memory while a prompt is read, above that with the weights and after a prompt of two tokens."""
    model = mc.build(preset, backend=name, device="cpu")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens).tolist()
    mc.generate(model, ids[:2], max_new_tokens=1)
    before = _memory("VmRSS")
    # Sets the most back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    result = mc.generate(model, ids, max_new_tokens=1)
    more = _memory("VmHWM") - before
    return {
        "preset": preset,
        "tokens": tokens,
        "chunk": PREFILL_CHUNK,
        "beside_the_weights": more,
        "seconds": result.prompt_seconds,
    }


def told(what: str, entry: dict) -> str:
    if what == "prompt":
        speed = entry["tokens"] / entry["seconds"]
        return f"{entry['tokens']:,} tokens: {entry['beside_the_weights'] / 2**20:.0f} MiB, {speed:.0f} tokens/s"
    # The first parts have what is compiled and what the allocator settles on.
    early, late = (statistics.median(part) for part in (entry["seconds"][5:25], entry["seconds"][-20:]))
    grown = entry["resident"][-1] - entry["resident"][5]
    return (
        f"{entry['tokens']:,} tokens: {early * 1e3:.3f} ms a token at first, {late * 1e3:.3f} ms at last; "
        f"{grown / 2**20:.1f} MiB more at last, {grown / (0.94 * entry['tokens']):.0f} bytes a token"
    )


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", cores()))


def plot(entries: dict[str, dict], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, entry in entries.items():
        at = np.arange(1, len(entry["seconds"]) + 1) * entry["tokens"] / POINTS
        panels[0].plot(at, np.array(entry["seconds"]) * 1e3, label=name)
        panels[1].plot(at, np.array(entry["resident"]) / 2**20, label=name)
    for axes, unit in zip(panels, ("milliseconds a token", "MiB resident"), strict=True):
        axes.set(xlabel="tokens", ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _apart(work, *arguments):
    """In a process of its own, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
