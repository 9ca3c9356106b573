"""Time and memory of a conversion against a plain copy of the bytes that it wrote, both synced to disk.

    python -m mamba_core.benchmarks.convert                      # mamba-370m in float32, 1.5 GB
    python -m mamba_core.benchmarks.convert --preset mamba-2.8b --dtype bfloat16
                                                                 # 5.5 GB; needs three times that on disk

Makes a checkpoint of that size, converts it in a process of its own, copies the result, and so on in turns. Adds to
results/convert.json, with the machine.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from mamba_core import architectures
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.config import COMPUTE_DTYPES, preset
from mamba_core.spec.params import parameter_table
from mamba_core.weights.convert import convert
from mamba_core.weights.formats import DTYPES, TensorSource, count_bytes
from mamba_core.weights.writing import write_layout

RESULTS = Path(__file__).parent / "results" / "convert.json"
# What is converted, and whether it keeps the bytes.
CASES = {"hf": {"to": "hf"}, "mamba_ssm": {"to": "mamba_ssm"}, "hf, cast": {"to": "hf", "lossy": True}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", choices=architectures.presets(), default="mamba-370m")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch", type=Path, help="a folder on the disk to measure; the system's for temporary files"
    )
    arguments = parser.parse_args()
    config = preset(arguments.preset)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        write_layout(source, config, random_sources(config, arguments.dtype), "hf")
        other = "float32" if arguments.dtype == "bfloat16" else "bfloat16"
        rows = {
            name: measure(source, settings | ({"dtype": other} if "lossy" in settings else {}), arguments.rounds)
            for name, settings in CASES.items()
        }
    table = parameter_table(config).values()
    largest = max(count_bytes(parameter.shape, parameter.dtype(arguments.dtype)) for parameter in table)
    report = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    key = f"{arguments.preset} {arguments.dtype}"
    report[key] = {"processor": processor(), "cores": cores(), "largest_tensor_mb": largest / 1e6, "to": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{key}: largest tensor {largest / 1e6:.0f} MB")
    for name, row in rows.items():
        print(f"{name:10} {row['gigabytes']:5.2f} GB, ratio to a copy {row['ratio']:.2f}, peak {row['peak_mb']:.0f} MB")


def random_sources(config, dtype: str):
    """Random values of a model's scale; one stretch of them serves every tensor."""
    values = np.random.default_rng(0).normal(0, 0.02, 2**20)
    stretches = {stored: values.astype(DTYPES[stored].numpy) for stored in ("float32", dtype)}
    for name, parameter in parameter_table(config).items():
        stored = parameter.dtype(dtype)
        read = lambda stored=stored, shape=parameter.shape: np.resize(stretches[stored], shape)  # noqa: E731
        yield TensorSource(name, parameter.shape, stored, read)


def measure(source: Path, settings: dict, rounds: int) -> dict:
    """Seconds of each round, the ratio of their medians, and the largest resident set of the converting process."""
    target, copy = source.with_name("target"), source.with_name("copy")
    seconds, copied, peaks = [], [], []
    for _ in range(rounds):
        os.sync()  # none pays for what the one before left to be written
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            elapsed, peak = pool.apply(timed_convert, (source, target, settings))
        seconds.append(elapsed)
        peaks.append(peak)
        os.sync()
        copied.append(timed_copy(target, copy))
        size = sum(path.stat().st_size for path in target.iterdir())
        shutil.rmtree(target)
        shutil.rmtree(copy)
    ratio = statistics.median(seconds) / statistics.median(copied)
    found = {"gigabytes": size / 1e9, "ratio": ratio, "peak_mb": max(peaks) / 1e6}
    return found | {"convert_seconds": seconds, "copy_seconds": copied}


def timed_convert(source: Path, target: Path, settings: dict) -> tuple[float, int]:
    """Seconds, and the peak resident set in bytes of this process, its imports and the mapped file's pages included."""
    started = time.perf_counter()
    convert(source, target, **settings)
    elapsed = time.perf_counter() - started
    # Not getrusage, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    return elapsed, next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def timed_copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
