"""The recurrence of Mamba-2 on one GPU, on each backend, beside mamba_ssm's where it is installed.

    python -m mamba_core.benchmarks.gpu_ssd --backend torch mamba_ssm --out ssd.json
    python -m mamba_core.benchmarks.gpu_ssd --backend jax

As `gpu_scan` measures the scan: bfloat16, with D, bias and softplus, with and without the gate. Floors: the bytes that
must move at 4.28 TB/s, and the products of chunks of 64 at 790e12 operations a second, as measured on an H200.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

import mamba_core as mc
from mamba_core.benchmarks import gpu_scan

# b, l, h, p, n, and whether with the gate.
ROWS = ((8, 2048, 24, 64, 128, False), (8, 2048, 24, 64, 128, True), (1, 65536, 24, 64, 128, False))
ROWS += ((8, 2048, 80, 64, 128, False),)
CHUNK, OPERATIONS_A_SECOND = 64, 790e12


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the recurrence of Mamba-2 on a GPU.")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["torch", "mamba_ssm"])
    parser.add_argument("--row", nargs="+", type=int, help="numbers of the rows, from 0; all by default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    found = []
    for row in [ROWS[number] for number in arguments.row or range(len(ROWS))]:
        values = inputs(*row)
        for backend in arguments.backend:
            found.append(
                {"backend": backend, "shape": row} | gpu_scan.measure(BACKENDS[backend], values) | floors(*row)
            )
            print(found[-1], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def floors(b: int, l: int, h: int, p: int, n: int, gated: bool) -> dict[str, float]:
    """Milliseconds of the forward: x (and z) read and y written in bfloat16, and the products."""
    moved = 2 * b * l * ((3 if gated else 2) * h * p + h + 2 * n)
    products = 2 * b * l * h * (CHUNK * (n + p) + 2 * n * p)
    return {
        "byte floor": round(moved / gpu_scan.BYTES_A_SECOND * 1e3, 4),
        "product floor": round(products / OPERATIONS_A_SECOND * 1e3, 4),
    }


def inputs(b: int, l: int, h: int, p: int, n: int, gated: bool) -> dict[str, np.ndarray]:
    """In float32, of the size that they have in a model that was just initialised; dy last."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    values = {"x": normal(b, l, h, p), "dt": 0.5 * normal(b, l, h) - 3}
    values |= {"A": -rng.uniform(1, 16, h).astype(np.float32), "B": normal(b, l, 1, n), "C": normal(b, l, 1, n)}
    values |= {"D": normal(h), "dt_bias": 0.1 * normal(h)}
    return values | ({"z": normal(b, l, h, p)} if gated else {}) | {"dy": normal(b, l, h, p)}


def ssd(given: dict):
    return mc.ssd(**given, dt_softplus=True)


def mamba_ssm(values):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def theirs(given):
        rest = {name: given[name] for name in ("D", "z", "dt_bias") if name in given}
        five = (given[name] for name in ("x", "dt", "A", "B", "C"))
        return mamba_chunk_scan_combined(*five, chunk_size=256, dt_softplus=True, **rest)

    return gpu_scan.torch_(values, theirs)


BACKENDS = {"torch": partial(gpu_scan.torch_, op=ssd), "mamba_ssm": mamba_ssm}
BACKENDS |= {"jax": partial(gpu_scan.jax_, op=ssd), "mlx": partial(gpu_scan.mlx, op=ssd)}

if __name__ == "__main__":
    main()
