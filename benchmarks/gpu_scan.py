"""The selective scan on one GPU, on each backend, beside mamba_ssm's where it is installed.

    python -m mamba_core.benchmarks.gpu_scan --backend torch mamba_ssm --out scan.json
    python -m mamba_core.benchmarks.gpu_scan --backend jax

bfloat16, with gate, D, bias and softplus; forward alone, and forward with the gradient of every input. A time is that
of the GPU: calls are captured in a CUDA graph and replayed (PyTorch), or queued without waiting for one another; the
median of ROUNDS rounds. Floors: the bytes that must move at 4.28 TB/s and the exponentials at 4.14e12 a second, as
measured on an H200. Frameworks keep a GPU's memory to themselves: name one a process where memory is short.
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

import mamba_core as mc

# b, l, e, n.
ROWS = ((8, 2048, 1536, 16), (1, 2048, 1536, 16), (1, 16384, 1536, 16), (1, 65536, 1536, 16), (8, 2048, 5120, 16))
ROWS += ((8, 2048, 1536, 64),)
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")
# In bfloat16; all else is float32.
HALF = ("x", "delta", "dt", "B", "C", "z", "dy")
ROUNDS, CALLS = 9, 10
BYTES_A_SECOND, EXPONENTIALS_A_SECOND = 4.28e12, 4.14e12


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the selective scan on a GPU.")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["torch", "mamba_ssm"])
    parser.add_argument("--row", nargs="+", type=int, help="numbers of the rows, from 0; all by default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    found = []
    for row in [ROWS[number] for number in arguments.row or range(len(ROWS))]:
        values = inputs(*row)
        for backend in arguments.backend:
            found.append({"backend": backend, "shape": row} | measure(BACKENDS[backend], values) | floors(*row))
            print(found[-1], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(backend: Callable, values: dict[str, np.ndarray]) -> dict:
    """Milliseconds; what went wrong, instead, if something did. values: the arrays by name, dy last."""
    try:
        forward, both = backend(dict(values))
        times = {"forward": forward(), "forward and backward": both()}
    except Exception as fault:
        traceback.print_exc()
        return {"error": f"{type(fault).__name__}: {fault}"}
    return {name: round(seconds * 1e3, 4) for name, seconds in times.items()}


def floors(b: int, l: int, e: int, n: int) -> dict[str, float]:
    """Milliseconds of the forward: x, delta, z read and y written in bfloat16, B and C read; an exponential a state."""
    moved = 2 * b * l * (4 * e + 2 * n)
    return {
        "byte floor": round(moved / BYTES_A_SECOND * 1e3, 4),
        "exponential floor": round(b * l * e * n / EXPONENTIALS_A_SECOND * 1e3, 4),
    }


def inputs(b: int, l: int, e: int, n: int) -> dict[str, np.ndarray]:
    """NAMES and dy in float32, of the size that they have in a model that was just initialised."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    values = {"x": normal(b, l, e), "delta": 0.5 * normal(b, l, e) - 3}
    values |= {
        "A": -np.tile(np.arange(1.0, n + 1, dtype=np.float32), (e, 1)),
        "B": normal(b, l, n),
        "C": normal(b, l, n),
    }
    return values | {"D": normal(e), "z": normal(b, l, e), "delta_bias": 0.1 * normal(e), "dy": normal(b, l, e)}


def median_of_rounds(start: Callable[[], object], wait: Callable[[object], object]) -> float:
    """Seconds of a call, of CALLS that are queued together."""
    wait(start())
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(CALLS):
            result = start()
        wait(result)
        taken.append((time.perf_counter() - started) / CALLS)
    return statistics.median(taken)


def scan(given: dict):
    return mc.selective_scan(**given, delta_softplus=True)


def torch_(values, op=scan, transposed=()):
    """(forward, forward and gradient): functions that give the seconds of op(arrays by name)."""
    import torch

    given = {
        name: torch.tensor(value, device="cuda", dtype=torch.bfloat16 if name in HALF else torch.float32)
        for name, value in values.items()
    }
    given |= {name: given[name].transpose(1, 2).contiguous() for name in transposed}
    dy = given.pop("dy")

    def replayed(call):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return median_of_rounds(graph.replay, lambda _: torch.cuda.synchronize())

    def forward():
        with torch.no_grad():
            return replayed(lambda: op(given))

    def both():
        leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
        return replayed(lambda: torch.autograd.grad(op(leaves), list(leaves.values()), dy))

    return forward, both


def mamba_ssm(values):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def theirs(given):
        return selective_scan_fn(given["x"], *(given[name] for name in NAMES[1:]), delta_softplus=True)

    return torch_(values, theirs, transposed=("x", "delta", "B", "C", "z", "dy"))


def jax_(values, op=scan):
    import jax
    import jax.numpy as jnp

    given = [jnp.asarray(value, jnp.bfloat16 if name in HALF else jnp.float32) for name, value in values.items()]

    def call(*arguments):
        return op(dict(zip(values, arguments, strict=False)))

    forward = jax.jit(call)
    both = jax.jit(lambda *arguments: jax.vjp(call, *arguments[:-1])[1](arguments[-1]))
    return (
        lambda: median_of_rounds(lambda: forward(*given[:-1]), jax.block_until_ready),
        lambda: median_of_rounds(lambda: both(*given), jax.block_until_ready),
    )


def mlx(values, op=scan):
    import mlx.core as mx

    given = [mx.array(value).astype(mx.bfloat16 if name in HALF else mx.float32) for name, value in values.items()]
    mx.eval(given)

    def call(*arguments):
        return op(dict(zip(values, arguments, strict=False)))

    def queued(call):
        def start():
            result = call()
            mx.async_eval(result)
            return result

        return lambda: median_of_rounds(start, mx.eval)

    return (
        queued(lambda: call(*given[:-1])),
        queued(lambda: mx.vjp(call, given[:-1], given[-1:])[1]),
    )


BACKENDS = {"torch": torch_, "mamba_ssm": mamba_ssm, "jax": jax_, "mlx": mlx}

if __name__ == "__main__":
    main()
