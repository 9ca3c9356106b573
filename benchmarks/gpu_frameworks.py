"""The JAX and MLX backends on one GPU: the scan's rows in bfloat16 with all options, and JAX's training step.

    python -m mamba_core.benchmarks.gpu_frameworks --framework jax --out jax.json          about a minute
    python -m mamba_core.benchmarks.gpu_frameworks --framework mlx --part scan

Times are medians in milliseconds by the host's clock, of calls that follow one another without waiting; a scan is
called on several sets of inputs in turn. A row that fails is reported and the rest goes on.
"""

import argparse
import json
import statistics
import time
import traceback
from pathlib import Path

import numpy as np

import mamba_core as mc
from mamba_core import registry
from mamba_core.benchmarks.machine import cores, processor
from mamba_core.training import TrainSettings

# (b, l, e, n); beside each how many sets of inputs there are: more than the cache holds.
ROWS = {
    (8, 2048, 1536, 16): 4,
    (1, 2048, 1536, 16): 12,
    (1, 65536, 1536, 16): 2,
    (8, 2048, 1536, 64): 4,
}
CALLS, ROUNDS = 12, 5
KEPT_IN_FLOAT32 = ("A", "D", "delta_bias")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("jax", "mlx"), required=True)
    parser.add_argument(
        "--part", action="append", choices=("check", "scan", "training"), help="repeatable; all by default"
    )
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = {"jax": JAX, "mlx": MLX}[arguments.framework]
    backend = registry.get(arguments.framework)
    report = {"framework": arguments.framework, "device": parts.device(), "processor": processor(), "cores": cores()}
    report["kernels"], report["rows"] = backend.kernels(), []
    print(json.dumps(report), flush=True)
    for part in arguments.part or ("check", "scan", "training"):
        started = time.perf_counter()
        for name, measure in rows(part, parts, arguments.kernel):
            try:
                row = {"name": name} | measure()
            except Exception as fault:  # the other rows are worth having
                traceback.print_exc()
                row = {"name": name, "error": f"{type(fault).__name__}: {fault}"[:400]}
            report["rows"].append(row)
            print(row, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"[{part}: {time.perf_counter() - started:.0f} s]", flush=True)
    for row in report["rows"]:
        print(row)


def rows(part, framework, kernel):
    if part == "check":
        yield "difference from kernel 'chunked'", lambda: framework.check(kernel)
    if part == "scan":
        for shape, sets in ROWS.items():
            for backward in (False, True):
                name = f"scan {'forward and backward' if backward else 'forward'} {shape}"
                yield (
                    name,
                    lambda shape=shape, sets=sets, backward=backward: framework.scan(shape, sets, backward, kernel),
                )
    if part == "training" and framework is JAX:
        yield "training step 130m b8 l2048", JAX.training


def inputs(shape, seed: int) -> dict[str, np.ndarray]:
    b, l, e, n = shape
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (b, l, e),
        "delta": (b, l, e),
        "A": (e, n),
        "B": (b, l, n),
        "C": (b, l, n),
        "D": (e,),
        "z": (b, l, e),
    }
    # One array of numbers for all: drawing them takes longer than the scans.
    numbers = rng.standard_normal(1 << 22, dtype=np.float32)
    arrays = {name: np.resize(np.roll(numbers, 977 * k), size) for k, (name, size) in enumerate(shapes.items())}
    return arrays | {"A": -np.exp(arrays["A"]), "delta_bias": np.full(e, -4.0, np.float32)}


def median_ms(call, count: int) -> float:
    """Of one of the `count` that a call to `call` makes."""
    call()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started) / count)
    return statistics.median(times)


def differences(found, wanted) -> dict:
    apart = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, wanted, strict=True)]
    return {"error_rel": max(apart)}


class JAX:
    @staticmethod
    def device() -> str:
        import jax

        return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"

    @staticmethod
    def arrays(shape, seed):
        import jax.numpy as jnp

        return {
            name: jnp.asarray(value, "float32" if name in KEPT_IN_FLOAT32 else "bfloat16")
            for name, value in inputs(shape, seed).items()
        }

    @staticmethod
    def functions(kernel):
        import jax

        def forward(arrays):
            return mc.selective_scan(**arrays, delta_softplus=True, kernel=kernel)

        def both(arrays):
            _, pullback = jax.vjp(forward, arrays)
            return pullback(arrays["z"])[0]

        return forward, both

    @staticmethod
    def check(kernel) -> dict:
        import jax

        found = []
        for name in (kernel, "chunked"):
            _, both = JAX.functions(name)
            values = jax.jit(both)(JAX.arrays((2, 333, 384, 16), 0))
            found.append([np.asarray(value, np.float32) for value in jax.tree.leaves(values)])
        return differences(*found)

    @staticmethod
    def scan(shape, sets, backward, kernel) -> dict:
        import jax

        run = jax.jit(JAX.functions(kernel)[backward])
        given = [JAX.arrays(shape, seed) for seed in range(sets)]
        jax.block_until_ready(run(given[0]))

        def call():
            results = [run(given[k % sets]) for k in range(CALLS)]
            jax.block_until_ready(results)

        return {"ms": median_ms(call, CALLS)} | JAX.memory()

    @staticmethod
    def memory() -> dict:
        import jax

        found = jax.devices()[0].memory_stats() or {}
        return {"peak_gb": found.get("peak_bytes_in_use", 0) / 1e9}

    @staticmethod
    def training() -> dict:
        model = mc.build(mc.preset("mamba-130m"), backend="jax", dtype="bfloat16", seed=0)
        trainer = registry.get("jax").trainer(model, TrainSettings(steps=1000, warmup_steps=10))
        tokens = np.random.default_rng(0).integers(0, 50277, (8, 2049)).astype(np.int32)
        started = time.perf_counter()
        losses = [trainer.step(tokens)[0]]
        compiled = time.perf_counter() - started
        trainer.step(tokens)
        times = []
        for _ in range(8):
            started = time.perf_counter()
            losses.append(trainer.step(tokens)[0])
            times.append(1e3 * (time.perf_counter() - started))
        return {"ms": statistics.median(times), "compile_s": compiled, "losses": [losses[0], losses[-1]]} | JAX.memory()


class MLX:
    @staticmethod
    def device() -> str:
        import mlx.core as mx

        return f"{mx.default_device()}, mlx {mx.__version__}"

    @staticmethod
    def arrays(shape, seed):
        import mlx.core as mx

        found = {
            name: mx.array(value).astype(mx.float32 if name in KEPT_IN_FLOAT32 else mx.bfloat16)
            for name, value in inputs(shape, seed).items()
        }
        mx.eval(found)
        return found

    @staticmethod
    def functions(kernel):
        import mlx.core as mx

        def forward(arrays):
            return [mc.selective_scan(**arrays, delta_softplus=True, kernel=kernel)]

        def both(arrays):
            names = list(arrays)

            def run(*values):
                return mc.selective_scan(**dict(zip(names, values, strict=True)), delta_softplus=True, kernel=kernel)

            return mx.vjp(run, list(arrays.values()), [arrays["z"]])[1]

        return forward, both

    @staticmethod
    def check(kernel) -> dict:
        import mlx.core as mx

        found = []
        for name in (kernel, "chunked"):
            values = MLX.functions(name)[1](MLX.arrays((2, 333, 384, 16), 0))
            found.append([np.array(value.astype(mx.float32)) for value in values])
        return differences(*found)

    @staticmethod
    def scan(shape, sets, backward, kernel) -> dict:
        import mlx.core as mx

        run = MLX.functions(kernel)[backward]
        given = [MLX.arrays(shape, seed) for seed in range(sets)]

        def call():
            for k in range(CALLS):
                mx.async_eval(last := run(given[k % sets]))
            mx.eval(last)
            mx.synchronize()

        mx.reset_peak_memory()
        return {"ms": median_ms(call, CALLS), "peak_gb": mx.get_peak_memory() / 1e9}


if __name__ == "__main__":
    main()
