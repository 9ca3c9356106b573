"""One position of Mamba-2's recurrence in MLX: its plain form, and the choice of a kernel.

The kernel for GPUs is in `kernels/gpu_ssd_step.py`.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mamba_core.backends.mlx.arrays import default_device, keep_float32
from mamba_core.backends.mlx.kernels import gpu_language, gpu_ssd_step
from mamba_core.kernels import choose
from mamba_core.selftest import Trial
from mamba_core.spec import ops
from mamba_core.spec.ops.ssd import NO_LIMIT, check_ssd_step

# A rate below it forgets as fast. Its product with a gradient must be finite: MLX's `where` makes NaN of an infinite
# one at positions that do not count.
LEAST_RATE = -1e30


def one_position(
    x, dt, A, B, C, D=None, *, z=None, dt_bias=None, dt_softplus=False, dt_limit=NO_LIMIT, state, kernel="auto"
):
    """`ssd_step` by the kernel of that name: (y, new state)."""
    check_ssd_step(x, dt, A, B, C, D, z, dt_bias, dt_limit, state)
    keep_float32()
    arrays = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "state": state}
    available = kernels(None, x.dtype, tuple(arrays.values()))
    name = choose(kernel, available, "ssd_step", "mlx", default_device())
    return KERNELS[name](**arrays, dt_softplus=dt_softplus, dt_limit=tuple(dt_limit))


def kernels(device=None, dtype=None, arrays=()) -> dict[str, str | None]:
    """Fastest first, for x of that dtype and these arrays."""
    device = device or default_device()
    languages = (gpu_language.CUDA, gpu_language.METAL)
    reasons = {language.name: gpu_language.reason(language, device, dtype, arrays) for language in languages}
    return dict.fromkeys(KERNELS) | reasons


def plain(*, x, dt, A, B, C, D, z, dt_bias, state, dt_softplus, dt_limit):
    dtype = x.dtype
    x, A, B, C, D, z, state = (float32(value) for value in (x, A, B, C, D, z, state))
    step = step_size(dt, dt_bias, dt_softplus, dt_limit)
    linear, h = advance(state, x, step, mx.maximum(A, LEAST_RATE), B, C)
    return output(linear, x, D, z).astype(dtype), h


# Fastest first, the plain one last.
KERNELS = {
    "cuda": gpu_ssd_step.step(gpu_language.CUDA, plain),
    "metal": gpu_ssd_step.step(gpu_language.METAL, plain),
    "plain": plain,
}


def step_size(dt, dt_bias, dt_softplus, dt_limit):
    step = float32(dt)
    step = step if dt_bias is None else step + float32(dt_bias)
    step = mx.logaddexp(step, 0.0) if dt_softplus else step
    if dt_softplus and dt_limit == NO_LIMIT:
        return step
    least, most = dt_limit
    return mx.where(step < least, least, mx.where(step > most, most, step))


@mx.compile
def advance(h, x, step, A, B, C):
    """(h C, h) after one position: x (b, h, p), step (b, h), B and C (b, g, n), h (b, h, p, n)."""
    B, C = (mx.repeat(value, x.shape[1] // value.shape[1], axis=1)[:, :, None] for value in (B, C))
    h = mx.exp(step * A)[..., None, None] * h + (step[..., None] * x)[..., None] * B
    return (h * C).sum(axis=-1), h


def output(linear, x, D, z):
    """(h C + D x) * silu(z)."""
    if D is not None:
        linear = linear + (D if D.ndim == 2 else D[:, None]) * x
    return linear if z is None else linear * nn.silu(z)


def float32(value):
    return None if value is None else value.astype(mx.float32)


# --- what the kernels are tried with -----------------------------------------------------------------------


# A call each: dtype, rows, heads, channels, groups, states, whether D has a value a channel, the limit, and what is
# given beside x, dt, A, B, C. The arrays have 8 elements at least, as Metal's kernel wants.
TRIALS = (
    ("float32", 2, 24, 64, 1, 128, False, NO_LIMIT, ("D", "dt_bias", "z")),
    ("float32", 3, 8, 5, 2, 7, True, (1e-3, 0.5), ("D", "dt_bias")),
    ("bfloat16", 1, 8, 64, 1, 128, False, NO_LIMIT, ("D", "dt_bias", "z")),
    ("float16", 1, 16, 6, 4, 16, False, NO_LIMIT, ()),
)


def trials(device: str):
    op = ops.public()["ssd"]
    for number, (dtype, b, h, p, g, n, per_channel, limit, given) in enumerate(TRIALS):
        rng = np.random.default_rng(number)
        sizes = {"x": (b, h, p), "dt": (b, h), "A": (h,), "B": (b, g, n), "C": (b, g, n), "state": (b, h, p, n)}
        optional = {"D": (h, p) if per_channel else (h,), "dt_bias": (h,), "z": (b, h, p)}
        sizes |= {name: optional[name] for name in given}
        arrays = {name: rng.normal(size=size) for name, size in sizes.items()}
        arrays["A"] = -np.exp(arrays["A"])
        kinds = {name: "float32" if name in (*op.float32, "state") else dtype for name in arrays}
        options = {"dt_softplus": True, "dt_limit": limit}
        yield Trial(
            name=f"{dtype}, {b} rows, {h} heads of {p} channels and {n} states",
            dtype=dtype,
            arrays={name: (value, kinds[name]) for name, value in arrays.items()},
            outputs={"y": ((b, h, p), dtype), "state": ((b, h, p, n), "float32")},
            call=partial(_tried, names=tuple(arrays), options=options),
        )


def _tried(kernel: str, *values, names, options):
    named = dict(zip(names, values, strict=True))
    return one_position(**named, **options, kernel=kernel)
