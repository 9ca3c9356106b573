"""JAX's training step on one GPU: mamba-130m in bfloat16, batch 8, length 2048, AdamW; the scan is in `gpu_scan`.

    python -m mamba_core.benchmarks.gpu_jax --out jax.json

The median of some steps by the host's clock, each with its loss on the host.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

import mamba_core as mc
from mamba_core.backends.jax.training import Trainer
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.config import preset
from mamba_core.training import TrainSettings

BATCH, LENGTH, STEPS = 8, 2048, 10


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time JAX's training step on a GPU.")
    parser.add_argument("--kernel", default="auto", help="of the scan")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--preset", default="mamba-130m")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    device = jax.devices()[0]
    found = {"device": device.device_kind, "jax": jax.__version__, "processor": processor(), "cores": cores()}
    found |= training(arguments)
    print(json.dumps(found, indent=1), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def training(arguments) -> dict:
    config = preset(arguments.preset)
    model = mc.build(config, backend="jax", dtype="bfloat16", kernels=arguments.kernel)
    trainer = Trainer(model, TrainSettings(steps=1000, warmup_steps=10))
    shape = arguments.batch, arguments.length + 1
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    losses, times = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        losses.append(trainer.step(tokens)[0])
        times.append(time.perf_counter() - started)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "kernel": model.kernels,
        "shape": shape,
        # The first compiles; the second may, where arrays are placed otherwise.
        "first seconds": round(times[0], 2),
        "milliseconds": round(1e3 * statistics.median(times[2:]), 3),
        "peak GB": round(memory.get("peak_bytes_in_use", 0) / 1e9, 2),
        "losses": [losses[0], losses[-1]],
    }


if __name__ == "__main__":
    main()
