"""Jamba on one GPU, beside transformers: a long prompt, decoding, a training step, and a context of 256K.

    python -m mamba_core.benchmarks.gpu_jamba --out jamba.json

The 3B model has the sizes of jamba-reasoning-3b and random weights; the one that is trained has about a billion
parameters. transformers computes its Mamba layers by mamba_ssm's kernels where these are installed, and says so.
"""

import argparse
import dataclasses
import json
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mamba_core.backends.torch import decoding as torch_decoding
from mamba_core.backends.torch import training as torch_training
from mamba_core.benchmarks import gpu_torch
from mamba_core.benchmarks.gpu_torch import BF16, DEVICE, attempt, line, random_model, timed_training
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.config import preset
from mamba_core.spec.params import parameter_count
from mamba_core.training import TrainSettings

CONFIG = preset("jamba-reasoning-3b")
TRAINED = dataclasses.replace(
    CONFIG, d_model=2048, n_layer=16, d_intermediate=5632, num_heads=16, num_kv_heads=4, attn_layer_period=8,
    attn_layer_offset=4, dt_rank="auto", eos_token_id=2,
)  # fmt: skip
PROMPT, BATCH, LENGTH, CONTEXT = 8192, 4, 2048, 262_144


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all by default")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--profile", action="store_true", help="the kernels that took the most time, too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = {"gpu": torch.cuda.get_device_name(), "processor": processor(), "cores": cores()}
    report |= {"torch": torch.__version__, "copy_tb_per_s": (bandwidth := gpu_torch.copy_bandwidth()), "rows": []}
    for part in arguments.part or PARTS:
        for row in PARTS[part](arguments):
            if "bytes" in row:
                row["floor_ms"] = row["bytes"] / bandwidth / 1e9
            report["rows"].append({"part": part} | row)
            print(line(row), {k: v for k, v in row.items() if k in ("fast_path", "expected_gb")}, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def decoding(arguments):
    for batch in (1, 16):
        yield attempt(f"decode 3B b{batch}, per step", partial(gpu_torch.decode_ours, CONFIG, batch, arguments))
    yield attempt("decode 3B b1, per step, 4 bits", partial(gpu_torch.decode_ours, CONFIG, 1, arguments, 4))


def prompts(arguments):
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, PROMPT)).astype(np.int32)

    def ours():
        model, mask = random_model(CONFIG, BF16), np.ones(tokens.shape, bool)
        call = partial(torch_decoding.prefill, model, tokens, mask)
        found = {"ms": median_wall(call), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        if arguments.profile:
            gpu_torch.profile(call, 1)
        return found

    def theirs():
        model, ids = peer(CONFIG).to(BF16).eval(), torch.from_numpy(tokens).long().to(DEVICE)

        @torch.no_grad()
        def call():
            return model(ids, logits_to_keep=1, use_cache=True)

        found = {"ms": median_wall(call), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        return found | {"fast_path": fast_path()}

    yield attempt(f"prompt of {PROMPT}, 3B b1", ours)
    if not arguments.no_peers:
        yield attempt(f"prompt of {PROMPT}, 3B b1, transformers", theirs)


def training(arguments):
    tokens = np.random.default_rng(0).integers(0, TRAINED.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    billions = f"{parameter_count(TRAINED) / 1e9:.2f}B b{BATCH} l{LENGTH}"

    def ours():
        trainer = torch_training.Trainer(random_model(TRAINED), TrainSettings(steps=1000, warmup_steps=10))

        def step():
            with torch.autocast(DEVICE, BF16):
                trainer.step(tokens)

        return timed_training(step, arguments)

    def theirs():
        # In bfloat16 throughout: under autocast its norms give float32, which mamba_ssm's scan refuses beside bfloat16.
        model = peer(TRAINED).to(BF16).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        ids = torch.from_numpy(tokens).long().to(DEVICE)

        def step():
            optimizer.zero_grad()
            logits = model(ids[:, :-1], use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return timed_training(step, arguments) | {"fast_path": fast_path()}

    yield attempt(f"training step {billions}", ours)
    if not arguments.no_peers:
        yield attempt(f"training step {billions}, transformers", theirs)


def context(arguments):
    """A prompt of 256K at once, and a token after it, beside the memory that it should take."""

    def measure():
        model = random_model(CONFIG, BF16)
        weights = sum(value.nbytes for value in model.parameters())
        layers = [CONFIG.attention(layer) for layer in range(CONFIG.n_layer)]
        cache = sum(4 * CONTEXT * each.kv_heads * each.head_dim for each in layers if each is not None)
        # The widest layer has three arrays of its width at a time, and four of the residual stream are about.
        widest = 2 * CONTEXT * (3 * 2 * CONFIG.d_intermediate + 4 * CONFIG.d_model)
        tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, CONTEXT)).astype(np.int32)
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        out = torch_decoding.prefill(model, tokens, np.ones(tokens.shape, bool))
        torch.cuda.synchronize()
        found = {"ms": 1e3 * (time.perf_counter() - started), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        assert out.logits.isfinite().all()
        return found | {"expected_gb": (weights + cache + widest) / 1e9}

    yield attempt(f"prompt of {CONTEXT}, 3B b1", measure)


def peer(config):
    """transformers' model of a config, on the GPU, with its own initial values."""
    from transformers import JambaConfig, JambaForCausalLM

    with torch.device(DEVICE):
        return JambaForCausalLM(JambaConfig(**{**config.to_hf(), "use_mamba_kernels": fast_path()}))


def fast_path() -> bool:
    """Whether mamba_ssm's kernels and causal_conv1d's are there, by which transformers computes Mamba layers."""
    try:
        import causal_conv1d  # noqa: F401
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except ImportError:
        return False
    return True


def median_wall(call, rounds: int = 5) -> float:
    """Milliseconds of the host's clock; the peak of memory begins anew before the last rounds."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    walls = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        walls.append(1e3 * (time.perf_counter() - started))
        if sum(walls) > 20_000:
            break
    return statistics.median(walls)


PARTS = {"decoding": decoding, "prompts": prompts, "training": training, "context": context}

if __name__ == "__main__":
    main()
