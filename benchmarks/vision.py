"""Vim-tiny on a CPU, beside mambapy's blocks of the same size and transformers' ViT-tiny.

    python -m mamba_core.benchmarks.vision --out vision.json

One image, float32, one thread. The models take turns; a time is the processor's, the median of the turns, and a call
before them is not timed. mambapy has blocks alone, which are given the patches; its training is left out at 1248
pixels, where it would keep 20 GB.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mamba_core import factory
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.config import preset

SIDES = (224, 1248)
TURNS = {224: 5, 1248: 2}
CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = {"processor": processor(), "cores": cores(), "threads": 1, "torch": torch.__version__, "rows": []}
    for side in SIDES:
        for work in (forward, training):
            models = {name: make(side) for name, make in MODELS.items() if not _too_large(name, side, work)}
            for name, seconds in alternately(work, models, torch.randn(1, 3, side, side), TURNS[side]).items():
                row = {"work": work.__name__, "side": side, "name": name, "seconds": seconds}
                report["rows"].append(row)
                print(f"{row['work']:<9} {side} px  {name:<18} {1e3 * seconds:9.1f} ms", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def alternately(work, models: dict, images, turns: int) -> dict[str, float]:
    """Seconds of the processor, the median of the turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            before = time.process_time()
            work(model, images)
            if turn:
                found[name].append(time.process_time() - before)
    return {name: statistics.median(times) for name, times in found.items()}


def forward(model, images) -> None:
    with torch.no_grad():
        model(images)


def training(model, images) -> None:
    """Loss and gradients."""
    model.zero_grad()
    F.cross_entropy(model(images), torch.tensor([1])).backward()


def _too_large(name: str, side: int, work) -> bool:
    return name == "mambapy's blocks" and side > 224 and work is training


class Ours(nn.Module):
    def __init__(self, side: int):
        super().__init__()
        config = dataclasses.replace(preset("vim-tiny"), task_options={"image_size": side, "num_classes": CLASSES})
        self.model = factory.build(config, backend="torch", device="cpu")

    def forward(self, images):
        return self.model(images).logits


class Blocks(nn.Module):
    """mambapy's between patches and a head."""

    def __init__(self, side: int):
        from mambapy import vim

        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 192, 16, 16), nn.Linear(192, CLASSES)
        self.blocks = vim.VMamba(vim.MambaConfig(d_model=192, n_layers=24))

    def forward(self, images):
        return self.head(self.blocks(self.patches(images).flatten(2).mT).mean(1))


class Vit(nn.Module):
    def __init__(self, side: int):
        from transformers import ViTConfig, ViTForImageClassification

        super().__init__()
        sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
        self.model = ViTForImageClassification(ViTConfig(**sizes, image_size=side, num_labels=CLASSES))

    def forward(self, images):
        return self.model(images).logits


MODELS = {"ours": Ours, "mambapy's blocks": Blocks, "ViT-tiny": Vit}

if __name__ == "__main__":
    main()
