"""Vim-tiny on one GPU, beside the model of its authors and a ViT of the same size from timm.

    python -m mamba_core.benchmarks.gpu_vision --out vision.json

The authors' model needs their repository on the path, its folders vim and mamba-1p1p1. All models have float32
parameters and compute under bfloat16 autocast, as Vim was trained. Times are medians on the host's clock, as a user
sees them. A training step is ours of `mc.train`, and for the others AdamW, with gradients cut to a norm of 1.
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mamba_core import factory
from mamba_core.backends.torch import training as torch_training
from mamba_core.benchmarks.gpu_jamba import median_wall
from mamba_core.benchmarks.gpu_torch import BF16, DEVICE, attempt, copy_bandwidth, line, profile, timed_training
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.config import preset
from mamba_core.training import TrainSettings

# Pixels a side, and images in a batch.
SIZES = ((224, 128), (1248, 8))
# Of one image, for the growth of memory.
SIDES = (224, 448, 896, 1248)
CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all by default")
    parser.add_argument("--who", action="append", choices=MODELS, help="repeatable; all by default")
    parser.add_argument("--profile", action="store_true", help="the kernels that took the most time, too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = {"gpu": torch.cuda.get_device_name(), "processor": processor(), "cores": cores()}
    report |= {"torch": torch.__version__, "copy_tb_per_s": copy_bandwidth(), "rows": []}
    for part in arguments.part or PARTS:
        for row in PARTS[part](arguments):
            report["rows"].append({"part": part} | row)
            print(line(row), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def forward(arguments):
    for who in arguments.who or MODELS:
        for side, batch in SIZES:
            yield attempt(f"forward {side} px b{batch}, {who}", partial(_forward, who, side, batch, arguments))


def compiled(arguments):
    """The same by `torch.compile` as CUDA graphs: as they come, small launches keep the host busier than the GPU."""
    for who in arguments.who or MODELS:
        for side, batch in SIZES:
            measure = partial(_forward, who, side, batch, arguments, mode="reduce-overhead")
            yield attempt(f"forward {side} px b{batch}, {who}, compiled", measure)


def training(arguments):
    for who in arguments.who or MODELS:
        for side, batch in SIZES:
            yield attempt(f"training step {side} px b{batch}, {who}", partial(_training, who, side, batch, arguments))


def memory(arguments):
    """Of a training step on one image, by its side."""
    for who in arguments.who or MODELS:
        for side in SIDES:
            yield attempt(f"training step {side} px b1, {who}", partial(_training, who, side, 1, arguments))


def _forward(who: str, side: int, batch: int, arguments, mode: str | None = None) -> dict:
    model, images = MODELS[who](side).eval(), torch.randn(batch, 3, side, side, device=DEVICE)
    model = model if mode is None else torch.compile(model, mode=mode)

    @torch.no_grad()
    def call():
        with torch.autocast(DEVICE, BF16):
            return model(images)

    call(), call()  # compiled programs are captured at the second call
    found = {"ms": median_wall(call, 15), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    if arguments.profile:
        profile(call, 2)
    return found


def _training(who: str, side: int, batch: int, arguments) -> dict:
    rng, model = np.random.default_rng(0), MODELS[who](side).train()
    images, classes = rng.normal(size=(batch, 3, side, side)).astype(np.float32), rng.integers(0, CLASSES, batch)
    if who == "ours":
        return timed_training(_our_step(model, images, classes), arguments)
    return timed_training(_their_step(model, images, classes), arguments)


def _our_step(model, images, classes):
    trainer = torch_training.Trainer(model, TrainSettings(steps=1000, warmup_steps=10))

    def step():
        with torch.autocast(DEVICE, BF16):
            trainer.step({"inputs": images, "targets": classes})

    return step


def _their_step(model, images, classes):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def step():
        # Ours take them from the host too.
        given, targets = torch.from_numpy(images).to(DEVICE), torch.from_numpy(classes).to(DEVICE)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, BF16):
            loss = F.cross_entropy(model(given), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def _ours(side: int):
    config = dataclasses.replace(preset("vim-tiny"), task_options={"image_size": side, "num_classes": CLASSES})
    return factory.build(config, backend="torch", device=DEVICE)


def _of_the_authors(side: int):
    from models_mamba import VisionMamba

    return VisionMamba(
        img_size=side, final_pool_type="mean", if_divide_out=True, use_middle_cls_token=True, drop_path_rate=0.0
    ).to(DEVICE)


def _vit(side: int):
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=side, num_classes=CLASSES).to(DEVICE)


MODELS = {"ours": _ours, "hustvl's": _of_the_authors, "timm's ViT": _vit}
PARTS = {"forward": forward, "compiled": compiled, "training": training, "memory": memory}

if __name__ == "__main__":
    main()
