"""Writes initial_values.json, digests of a small model's initial values: `python -m tests.golden.initial_values`."""

import hashlib
import json
from pathlib import Path

from mamba_core.config import MambaConfig
from mamba_core.spec.init import initial_values

CONFIG = MambaConfig(d_model=24, n_layer=2, vocab_size=37, d_state=5, tie_embeddings=False)


def digests() -> dict[str, str]:
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in initial_values(CONFIG, seed=7)}


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(json.dumps(digests(), indent=1) + "\n")
