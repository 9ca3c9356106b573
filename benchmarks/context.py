"""A long prompt on a CPU within memory that is computed beforehand: the sizes of a preset, random weights.

    python -m mamba_core.benchmarks.context --preset jamba-reasoning-3b --length 16384 --out context.json

It is read in pieces, as `mc.generate` reads a prompt. Memory is the largest resident set of the process.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

from mamba_core.backends.torch import decoding, ops
from mamba_core.backends.torch.heads import model_class
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.config import preset
from mamba_core.generation import PREFILL_CHUNK
from mamba_core.kernels import Kernels
from mamba_core.spec import state as states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="jamba-reasoning-3b")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config, before = preset(arguments.preset), _resident()
    model = random_model(config)
    expected = _expected(config, model, arguments.length) + before
    print(f"expected {expected / 1e9:.2f} GB", flush=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, arguments.length)).astype(np.int32)
    started = time.perf_counter()
    state = None
    for first in range(0, arguments.length, PREFILL_CHUNK):
        piece = tokens[:, first : first + PREFILL_CHUNK]
        out = decoding.prefill(model, piece, np.ones(piece.shape, bool), state)
        state = out.state
    seconds = time.perf_counter() - started
    assert out.logits.isfinite().all()
    report = {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    report |= {"preset": arguments.preset, "length": arguments.length, "dtype": "bfloat16", "seconds": seconds}
    report |= {"expected_gb": expected / 1e9, "peak_gb": _resident() / 1e9}
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def random_model(config):
    """In bfloat16, values of the right size."""
    with torch.device("meta"):
        model = model_class(config.task)(config, Kernels.read("auto", ops.available_kernels("cpu")))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("A_log"):
                value.copy_(torch.arange(1, value.shape[-1] + 1).log().expand_as(value))
            elif value.ndim == 1:
                value.fill_(-4.0 if name.endswith("dt_proj.bias") else 1.0)
            else:
                value.uniform_(-1.0, 1.0).mul_(value.shape[-1] ** -0.5)
    model.built = type(model)
    return model.requires_grad_(False)


def _expected(config, model, length: int) -> int:
    """Bytes of the weights, the state, and what the widest layer has of a piece at a time."""
    weights = sum(value.nbytes for value in model.parameters())
    fields = states.table(config)
    # A cache that is doubled exists twice while it is copied.
    kept = sum(4 * np.prod(field.stored_shape(1, 2 * length), dtype=np.int64) for _, field in fields)
    widest = 2 * PREFILL_CHUNK * (3 * 2 * config.d_intermediate + 8 * config.d_model)
    scores = 4 * PREFILL_CHUNK * 2048
    return int(weights + kept + widest + scores)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
