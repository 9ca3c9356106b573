"""Errors of every backend against the float64 reference, on the model of `tests/conformance/test_accuracy.py`.

    python -m mamba_core.benchmarks.accuracy

Writes results/accuracy.json, with the machine, and prints the table of the README.
"""

import json
from pathlib import Path

import numpy as np

import mamba_core as mc
from mamba_core import registry
from mamba_core.benchmarks.machine import machine
from mamba_core.registry import installed
from mamba_core.spec.init import initial_values
from mamba_core.spec.reference import ReferenceModel
from mamba_core.spec.tolerances import relative_l2
from mamba_core.tasks.lm import cross_entropy

CONFIG = mc.MambaConfig(d_model=256, n_layer=4, vocab_size=1000)
DTYPES = ("float32", "bfloat16", "float16")
LENGTH = 512


def main() -> None:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, LENGTH + 1)).astype(np.int32)
    model = ReferenceModel(CONFIG, dict(initial_values(CONFIG)))
    logits = model(tokens[:, :-1]).logits
    _, dlogits = cross_entropy(logits, tokens[:, 1:])
    gradients, _ = model.vjp(dlogits, tokens[:, :-1])
    rows = {name: measure(name, tokens, logits, gradients) for name in installed()}
    report = {"machine": machine(), "config": CONFIG.to_dict(), "length": LENGTH, "errors": rows}
    Path(__file__).parent.joinpath("results", "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))


def measure(name: str, tokens, logits, gradients) -> dict[str, dict[str, float]]:
    """dtype -> the relative L2 error of the logits, and the largest of any parameter's gradient."""
    backend, found = registry.get(name), {}
    for dtype in DTYPES:
        model = mc.build(CONFIG, backend=name, dtype=dtype)
        out = model(backend.from_numpy(tokens[:, :-1], device=model.device))
        _, given = backend.loss_and_gradients(model, tokens)
        worst = max(relative_l2(given[key], value) for key, value in gradients.items())
        found[dtype] = {"logits": relative_l2(backend.to_numpy(out.logits), logits), "gradient": worst}
    return found


def table(rows) -> str:
    lines = ["| | " + " | ".join(f"{dtype} logits | worst gradient" for dtype in DTYPES) + " |"]
    lines.append("|---" * (1 + 2 * len(DTYPES)) + "|")
    for name, found in rows.items():
        cells = [f"{found[dtype][kind]:.1e}" for dtype in DTYPES for kind in ("logits", "gradient")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
