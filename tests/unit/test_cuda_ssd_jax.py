"""JAX's side of Mamba-2's recurrence on a GPU, on a CPU: XLA calls back, and Triton's interpreter runs the kernels.

The interpreter must be asked for before Triton is imported, so that the tests run in a process of their own.
"""

import importlib
import importlib.util
import os

import numpy as np
import pytest

from mamba_core.backends.gpu import triton_image
from mamba_core.spec.ops import ssd as spec
from mamba_core.spec.tolerances import relative_l2, tolerance

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
jnp = jax.numpy

from mamba_core.backends.jax.arrays import vjp  # noqa: E402 (after the package that it needs)
from mamba_core.backends.jax.kernels import cuda_ssd  # noqa: E402
from mamba_core.backends.jax.kernels.operator import Kernel  # noqa: E402
from mamba_core.backends.jax.ops import ssd as jax_ssd  # noqa: E402
from mamba_core.backends.jax.positions import call_of  # noqa: E402
from tests.unit.triton_compile import run_in_the_interpreter  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
here = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, in a process of its own")
MULTIPROCESSORS = 4
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# dtype, length, heads, channels, groups, states, what is given, positions.
CASES = {
    "one segment": ("float32", 60, 2, 16, 1, 16, (), ()),
    "all": ("float32", 200, 4, 8, 2, 24, spec.OPTIONAL, ("mask", "segment_ids")),
    "halves": ("bfloat16", 130, 4, 64, 1, 32, spec.OPTIONAL, ("segment_ids",)),
}


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_of_them_in_the_interpreter():
    run_in_the_interpreter(__file__)


class Device:
    core_count = MULTIPROCESSORS


@pytest.fixture
def interpreted(monkeypatch):
    """Launches go to the interpreter, on the host."""
    asked = []

    def compiled(module, kernel, kinds, constants, options, capability):
        asked.append((kernel, constants | {"PRECISION": "widened"}))
        return triton_image.Image(kernel, b"", b"", 0, 128)

    def launch(code, name, grid, threads, shared, parameters):
        kernel, constants = asked.pop()
        assert kernel == name
        *parameters, _, _ = parameters  # Triton's own
        kernels = importlib.import_module(cuda_ssd.MODULE)
        arrays = [value for value in parameters if isinstance(value, jax.Array)]
        results = [value for value in parameters if isinstance(value, jax.ShapeDtypeStruct)]

        def host(*values):
            known, written = iter(values), []
            given = []
            for value in parameters:
                if isinstance(value, jax.Array):
                    given.append(as_torch(np.asarray(next(known))))
                elif isinstance(value, jax.ShapeDtypeStruct):
                    written.append(torch.full(value.shape, torch.nan, dtype=HALF.get(value.dtype.name, torch.float32)))
                    given.append(written[-1])
                else:
                    given.append(torch.zeros(1) if value is None else int(value))
            names = {name: value for name, value in constants.items() if name in arguments(kernels, kernel)}
            getattr(kernels, kernel)[grid](*given, **names)
            pairs = zip(written, results, strict=True)
            return [value.float().numpy().astype(like.dtype) for value, like in pairs]

        return jax.pure_callback(host, results, *arrays)

    monkeypatch.setattr(cuda_ssd, "CUDA", Kernel("cuda", "cpu", "a CPU"))
    monkeypatch.setattr(cuda_ssd, "device", Device)
    monkeypatch.setattr(cuda_ssd, "capability", lambda: 90)
    monkeypatch.setattr(cuda_ssd, "launch", launch)
    monkeypatch.setattr(triton_image, "compiled", compiled)


def arguments(kernels, kernel):
    return getattr(kernels, kernel).arg_names


def as_torch(value):
    half = HALF.get(value.dtype.name)
    return torch.from_numpy(value.copy()) if half is None else torch.from_numpy(value.astype(np.float32)).to(half)


@here
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(interpreted, case):
    dtype, l, h, p, g, n, given, where = CASES[case]
    rng = np.random.default_rng(0)
    drawn = spec._draw(rng, 2, l, h, p, g, n, True, spec.LIMIT, "D" in given, given)
    positions = spec.draw_positions(rng, 2, l, where)
    stored = {
        name: jnp.asarray(value, jnp.float32 if name in spec.OP.float32 else dtype)
        for name, value in drawn.arrays.items()
    }
    call = call_of(positions.get("mask"), positions.get("segment_ids"), length=l)
    kernel = cuda_ssd.beside(jax_ssd.chunked)

    def run(*values):
        named = dict(zip(stored, values, strict=True))
        optional = (named.get(name) for name in ("D", "z", "dt_bias", "initial_state"))
        inputs = (*(named[name] for name in ("x", "dt", "A", "B", "C")), *optional)
        masks = [None if value is None else jnp.asarray(value) for value in (call.mask, call.restart)]
        return kernel(*inputs, *masks, **drawn.options)

    exact = {name: np.asarray(value).astype(np.float64) for name, value in stored.items()}
    wanted = spec.ssd(**exact, **positions, **drawn.options, return_final_state=True)
    cotangents = [
        jnp.asarray(rng.normal(size=value.shape), kind) for value, kind in zip(wanted, (dtype, "float32"), strict=True)
    ]
    gradients = spec.ssd_vjp(
        *(np.asarray(value).astype(np.float64) for value in cotangents), **exact, **positions, **drawn.options
    )
    found, returned = vjp(run, list(stored.values()), cotangents)
    for value, right in zip(found, wanted, strict=True):
        assert relative_l2(value, right) < tolerance(dtype)
    for name, value in zip(stored, returned, strict=True):
        assert relative_l2(value, gradients[name]) < tolerance(dtype, "gradient"), name
        assert value.dtype == stored[name].dtype
